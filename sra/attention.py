"""The token weights w of SRA, read from any attention implementation of a transformers model.

w is one layer's attention row of the last real token, summed over heads and normalised over the
sample's tokens (SRA, arXiv 2605.01205, section 3). It needs one query row, so no ``T×T`` matrix is
made and ``output_attentions``, which works with eager attention alone, is not used: the layer's
own attention runs as ever (eager, sdpa, flash, flex), and :func:`sra_kernels.attention_mass` reads
the rotated queries and keys on their way in.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from sra.model import causal_lm, trunk_of
from sra_kernels import attention_mass

IMPLEMENTATION = "sra_attention_mass"
# Arguments that models hand to their attention function and that change the weights in ways that
# one softmax over queries and keys does not show: biases, sinks of each row, keys that are chosen.
UNSUPPORTED = ("position_bias", "head_mask", "sinks", "indices", "block_indices")


class AttentionMass:
    """The attention mass of the last forward pass; see :func:`record_attention_mass`."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        self.attend = attend
        self.padding_mask: Tensor | None = None
        self.position_ids: Tensor | None = None
        self._mass: Tensor | None = None

    @property
    def mass(self) -> Tensor:
        """``[B, T]`` float32, detached: sums to 1 over each sequence's tokens, 0 at padding.

        Raises:
            RuntimeError: the model has not run since the recording began.
        """
        if self._mass is None:
            raise RuntimeError(
                "No attention mass yet: run the model inside `with record_attention_mass(model)`."
            )
        return self._mass

    def read(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        attention_mask: Any,
        options: Mapping[str, Any],
    ) -> None:
        """Compute the mass from ``query [B, Hq, T, d]`` and ``key [B, Hkv, T, d]``."""
        for name in UNSUPPORTED:
            if options.get(name) is not None:
                raise NotImplementedError(
                    f"{type(module).__name__} uses {name!r}, which the attention mass does not "
                    "account for. Choose a layer without it, or another model."
                )
        batch, _, tokens, _ = query.shape
        if key.shape[2] != tokens:
            raise ValueError(
                f"The layer sees {tokens} queries and {key.shape[2]} keys. Run whole sequences, "
                "with use_cache=False and no past_key_values."
            )
        last = torch.full((batch,), tokens - 1, device=query.device)
        visible = self.padding_mask
        if visible is not None:
            if visible.shape != (batch, tokens):
                raise ValueError(
                    f"attention_mask has shape {[*visible.shape]}; the attention mass needs the "
                    f"two-dimensional mask [{batch}, {tokens}], 1 at real tokens, or none."
                )
            visible = visible.bool()
            last = last - visible.flip(1).int().argmax(1)
        elif (starts := _sequence_starts(self.position_ids)) is not None:
            # Sequences one behind the other: each is a batch of its own, by views.
            masses = []
            for start, end in zip(starts, [*starts[1:], tokens], strict=True):
                part = slice(start, end)
                own = torch.full_like(last, end - 1 - start)
                seen = _visible(attention_mask, own + start, part)
                views = query[:, :, part], key[:, :, part]
                masses.append(self._row(module, *views, own, seen, options))
            self._mass = torch.cat(masses, dim=1)
            return
        seen = _visible(attention_mask, last, slice(0, tokens))
        if seen is not None:
            visible = seen if visible is None else seen & visible
        self._mass = self._row(module, query, key, last, visible, options)

    @staticmethod
    def _row(
        module: Any,
        query: Tensor,
        key: Tensor,
        last: Tensor,
        visible: Tensor | None,
        options: Mapping[str, Any],
    ) -> Tensor:
        scale = options.get("scaling")
        scale = _default_scale(module, query) if scale is None else scale
        softcap, window = options.get("softcap"), options.get("sliding_window")
        sinks = options.get("s_aux")
        if sinks is None:
            return attention_mass(
                query,
                key,
                query_index=last,
                scale=scale,
                key_mask=visible,
                softcap=softcap,
                window=window,
            )
        if softcap is not None:
            raise NotImplementedError(
                f"{type(module).__name__} has both attention sinks and a softcap, which the "
                "attention mass does not account for together. Choose another model."
            )
        query, key = _with_sinks(query, key, sinks / scale)
        index = torch.arange(key.shape[2] - 1, device=key.device)
        seen = index <= last[:, None]
        if window is not None:
            seen &= index > last[:, None] - window
        if visible is not None:
            seen &= visible
        mass = attention_mass(
            query, key, query_index=last + 1, scale=scale, key_mask=F.pad(seen, (1, 0), value=True)
        )[:, 1:]
        return mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def _with_sinks(query: Tensor, key: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """One more key before all others, to which query head h gives `score[h]`.

    The heads of a group share their keys and not their sinks, so the score stands in the queries:
    in a column that is 0 in every other key. Eight columns, since kernels like multiples of it.
    """
    query, key = F.pad(query.detach(), (0, 8, 1, 0)), F.pad(key.detach(), (0, 8, 1, 0))
    query[..., -1] = score.detach().to(query.dtype)[:, None]
    key[:, :, 0, -1] = 1
    return query, key


def _visible(mask: Any, last: Tensor, keys: slice) -> Tensor | None:
    """``[B, keys]``: what the row `last` of each sample sees by the mask that the layer is given,
    which knows of windows, chunks and packing too. Heads share it. None where it has no rows."""
    if isinstance(mask, BlockMask):  # of flex_attention: a function of indices
        rows = torch.arange(len(last), device=last.device)[:, None]
        index = torch.arange(keys.start, keys.stop, device=last.device)[None]
        seen = mask.mask_mod(rows, torch.zeros_like(rows), last[:, None], index)
        return seen.expand(len(last), index.shape[1])
    if not (isinstance(mask, Tensor) and mask.ndim == 4):
        return None
    rows = torch.arange(len(last), device=last.device) % mask.shape[0]
    seen = mask[rows, 0, last, keys]
    if seen.dtype == torch.bool:
        return seen
    return seen > torch.finfo(seen.dtype).min / 2  # additive: 0 where a key is seen


def _sequence_starts(position_ids: Tensor | None) -> list[int] | None:
    """First rows of the sequences in ``position_ids [1, N]``; None unless there are several."""
    if position_ids is None or len(position_ids) > 1:
        return None
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    return starts if len(starts) > 1 else None


@contextmanager
def record_attention_mass(model: Any, layer: int = -1) -> Iterator[AttentionMass]:
    """Record one layer's attention mass in every forward pass made inside the ``with`` block.

    Args:
        model: a transformers model, with or without its language-model head, compiled or inside
            PEFT, called with a two-dimensional ``attention_mask`` (padding on either side), or none
            and ``position_ids [1, N]`` that start from 0 in each of several sequences without
            padding. Only the chosen layer is touched, and it is put back on leaving, exceptions
            included.
        layer: which of the model's self-attention layers; negative counts from the last.

    Yields:
        an :class:`AttentionMass`; its ``mass`` is ``[B, T]`` float32, without gradient: the
        attention that the sequence's last real token pays to each of its tokens in that layer,
        summed over heads, sum 1. Attention dropout is left out. The model's own outputs are what
        they were.

    Raises:
        TypeError: the model's layers do not call transformers' ``AttentionInterface``.
        IndexError: no such layer.
        NotImplementedError: the layer uses a position bias, a head mask or chosen keys.

    >>> with record_attention_mass(model) as record:
    ...     hidden = model.base_model(input_ids, attention_mask=mask).last_hidden_state
    >>> weights = record.mass
    """
    module = _attention_layer(model, layer)
    record = AttentionMass(_attention_function(module))
    trunk = trunk_of(model)
    signature = inspect.signature(trunk.forward)

    def keep_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(*args, **kwargs).arguments
        # Arguments that a trunk takes as **kwargs are bound under that name.
        given = {**given, **given.get("kwargs", {})}
        record.padding_mask = given.get("attention_mask")
        record.position_ids = given.get("position_ids")

    # The layer alone gets a configuration of its own; the model still makes the masks of the
    # implementation that it was set to.
    config = module.config
    module.config = copy.deepcopy(config)
    module.config._attn_implementation = IMPLEMENTATION
    hook = trunk.register_forward_pre_hook(keep_mask, with_kwargs=True)
    _records[module] = record
    try:
        yield record
    finally:
        del _records[module]
        hook.remove()
        module.config = config


_records: dict[nn.Module, AttentionMass] = {}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> Any:
    record = _records[module]
    record.read(module, query, key, attention_mask, options)
    return record.attend(module, query, key, value, attention_mask, **options)


AttentionInterface.register(IMPLEMENTATION, _attend)


def _default_scale(module: Any, query: Tensor) -> float:
    """What an attention function does without ``scaling``; GPT-2's options as of transformers 4."""
    scale = query.shape[-1] ** -0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scale /= module.layer_idx + 1
    return scale


def _forward_function(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _attention_layers(model: Any) -> list[Any]:
    layers = [
        module
        for module in trunk_of(model).modules()
        if "ALL_ATTENTION_FUNCTIONS" in _forward_function(module).__code__.co_names
        and hasattr(module, "layer_idx")
        and not getattr(module, "is_cross_attention", False)
    ]
    if not layers:
        raise TypeError(
            f"{type(causal_lm(model)).__name__} has no decoder layer that calls transformers' "
            "AttentionInterface, so its queries and keys cannot be read. Use a model class that "
            "does (Llama, Qwen2, Gemma, Mistral, GPT-2, ...)."
        )
    return layers


def _attention_layer(model: Any, layer: int) -> Any:
    layers = _attention_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise IndexError(
            f"{type(causal_lm(model)).__name__} has {len(layers)} self-attention layers; there is "
            f"no {layer}."
        )
    return layers[layer]


def attention_of(model: Any, layer: int) -> int:
    """Which self-attention layer to record for decoder layer `layer`, counted from 0: its own, or,
    where it has none (linear attention, state spaces), the nearest before it, else the first.

    Raises:
        TypeError: see `record_attention_mass`.
    """
    before = [i for i, one in enumerate(_attention_layers(model)) if one.layer_idx <= layer]
    return before[-1] if before else 0


def _attention_function(module: Any) -> Callable[..., Any]:
    """The function that the layer calls as it is set now; eager is a name in the layer's file."""
    if module in _records:
        raise RuntimeError("This layer's attention mass is being recorded already; nest no record.")
    names = _forward_function(module).__globals__
    if module.config._attn_implementation == "eager":
        return names["eager_attention_forward"]
    return names["ALL_ATTENTION_FUNCTIONS"][module.config._attn_implementation]
