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
from torch import Tensor, nn
from transformers import AttentionInterface

from sra_kernels import attention_mass

IMPLEMENTATION = "sra_attention_mass"
# Arguments that models hand to their attention function and that change the weights in ways that
# one softmax over queries and keys does not show (attention sinks, relative position biases).
UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


class AttentionMass:
    """The attention mass of the last forward pass; see :func:`record_attention_mass`."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        self.attend = attend
        self.padding_mask: Tensor | None = None
        self._mass: Tensor | None = None

    @property
    def mass(self) -> Tensor:
        """``[B, T]`` float32, detached: sums to 1 over each sample's tokens, 0 at padding.

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
                    f"The attention layer uses {name!r}, which the attention mass does not "
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
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
            # The mask of this very layer knows of windows, chunks and packing too. Heads share it.
            rows = torch.arange(batch, device=query.device) % attention_mask.shape[0]
            seen = attention_mask[rows, 0, last, :tokens]
            if seen.dtype != torch.bool:  # additive: 0 where a key is seen
                seen = seen > torch.finfo(seen.dtype).min / 2
            visible = seen if visible is None else seen & visible
        scale = options.get("scaling")
        self._mass = attention_mass(
            query,
            key,
            query_index=last,
            scale=_default_scale(module, query) if scale is None else scale,
            key_mask=visible,
            softcap=options.get("softcap"),
            window=options.get("sliding_window"),
        )


@contextmanager
def record_attention_mass(model: Any, layer: int = -1) -> Iterator[AttentionMass]:
    """Record one layer's attention mass in every forward pass made inside the ``with`` block.

    Args:
        model: a transformers model, with or without its language-model head, called with a
            two-dimensional ``attention_mask`` (padding on either side) or none. Only the chosen
            layer is touched, and it is put back on leaving, exceptions included.
        layer: which of the model's self-attention layers; negative counts from the last.

    Yields:
        an :class:`AttentionMass`; its ``mass`` is ``[B, T]`` float32, without gradient: the
        attention that the sample's last real token pays to each token in that layer, summed over
        heads, sum 1. Attention dropout is left out. The model's own outputs are what they were.

    Raises:
        TypeError: the model's layers do not call transformers' ``AttentionInterface``.
        IndexError: no such layer.
        NotImplementedError: the layer uses attention sinks, a position bias or a head mask.

    >>> with record_attention_mass(model) as record:
    ...     hidden = model.base_model(input_ids, attention_mask=mask).last_hidden_state
    >>> weights = record.mass
    """
    module = _attention_layer(model, layer)
    record = AttentionMass(_attention_function(module))
    trunk = model.base_model
    signature = inspect.signature(trunk.forward)

    def keep_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.padding_mask = signature.bind(*args, **kwargs).arguments.get("attention_mask")

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


def _attention_layer(model: Any, layer: int) -> Any:
    layers = [
        module
        for module in model.base_model.modules()
        if "ALL_ATTENTION_FUNCTIONS" in _forward_function(module).__code__.co_names
        and hasattr(module, "layer_idx")
        and not getattr(module, "is_cross_attention", False)
    ]
    if not layers:
        raise TypeError(
            f"{type(model).__name__} has no decoder layer that calls transformers' "
            "AttentionInterface, so its queries and keys cannot be read. Use a model class that "
            "does (Llama, Qwen2, Gemma, Mistral, GPT-2, ...)."
        )
    if not -len(layers) <= layer < len(layers):
        raise IndexError(
            f"{type(model).__name__} has {len(layers)} self-attention layers; there is no {layer}."
        )
    return layers[layer]


def _attention_function(module: Any) -> Callable[..., Any]:
    """The function that the layer calls as it is set now; eager is a name in the layer's file."""
    if module in _records:
        raise RuntimeError("This layer's attention mass is being recorded already; nest no record.")
    names = _forward_function(module).__globals__
    if module.config._attn_implementation == "eager":
        return names["eager_attention_forward"]
    return names["ALL_ATTENTION_FUNCTIONS"][module.config._attn_implementation]
