"""A causal language model of transformers in its two halves: the trunk, and the output layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class States(NamedTuple):
    """What distillation reads from a model: one entry for each layer asked for.

    hidden: ``[B, T, D]``, the layer's output; of the last layer, after the final norm.
    mass: ``[B, T]`` fp32, detached: the layer's attention row of each sequence's last real token,
        summed over heads, normalised over the sequence's tokens (arXiv 2605.01205). Empty where
        nothing reads it.
    """

    hidden: tuple[Tensor, ...]
    mass: tuple[Tensor, ...]

    def rows(self, device: torch.device | None = None) -> States:
        """``[B * T, D]`` and ``[B * T]``; a layer asked for twice stays one tensor."""
        every = {id(x): x.flatten(0, 1).to(device) for x in (*self.hidden, *self.mass)}
        return States(*(tuple(every[id(x)] for x in side) for side in self))


class Head(NamedTuple):
    """logits = softcap * tanh(scale * (states @ weight.T + bias) / softcap), where they are set."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None

    def to(self, dtype: torch.dtype) -> Head:
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)

    def to_device(self, device: torch.device) -> Head:
        bias = None if self.bias is None else self.bias.to(device)
        return self._replace(weight=self.weight.to(device), bias=bias)

    def logits(self, states: Tensor) -> Tensor:
        """``[..., V]`` in float32 or wider, of post-final-norm states ``[..., D]``."""
        logits = F.linear(states.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def causal_lm(model: Any) -> Any:
    """The transformers model inside what `torch.compile` and PEFT put around it.

    Raises:
        TypeError: an encoder-decoder model, or a PEFT adapter of virtual tokens.
    """
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise TypeError(
                "The PEFT adapter puts virtual tokens before the text, which spans do not count. "
                "Use one that changes the layers, such as LoRA."
            )
        model = model.get_base_model()
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(model).__name__} is an encoder-decoder model; spans need one sequence with the "
            "prompt and the completion in it. Use a decoder-only model (AutoModelForCausalLM)."
        )
    return model


def trunk_of(model: Any) -> Any:
    """Everything below the output layer: gives post-final-norm states. LoRA layers stay inside.

    Of a model that reads images or sound too, the part that reads text.
    """
    trunk = causal_lm(model).base_model
    inner = getattr(trunk, "language_model", None)
    return trunk if inner is None else inner.base_model


def call_inside(module: Any, function: Callable[..., Any], **inputs: Any) -> Any:
    """``function(**inputs)`` as the forward pass of `module`: what FSDP shards with a module
    itself, and not with a part of it, is whole in that module's forward pass alone."""
    if not hasattr(module, "unshard"):
        return function(**inputs)
    names = vars(module)
    own = names.get("forward")  # Accelerate puts one there, for autocast
    names["forward"] = function
    try:
        return module(**inputs)
    finally:
        del names["forward"]
        if own is not None:
            names["forward"] = own


def head_of(model: Any) -> Head:
    """The head of a causal language model of transformers, adapters included; a sharded one is
    gathered.

    Raises:
        TypeError: the model has no output embeddings, or an adapter on them adds more than a
            product of two matrices. Whether `Head` says all of a model, `check_head` finds out.
    """
    model = causal_lm(model)
    layer = model.get_output_embeddings()
    if layer is None:
        raise TypeError(
            f"{type(model).__name__} has no output embeddings, so it predicts no tokens. Load it "
            "with AutoModelForCausalLM."
        )
    for unit in (layer, model):
        # The gradient of a gathered copy would not be reduced over the ranks, FSDP's own is.
        if hasattr(unit, "unshard") and torch.is_grad_enabled() and _trained(layer):
            unit.unshard()
    config = model.config.get_text_config()
    weight, bias = _weight(layer)
    return Head(
        weight,
        bias,
        scale=logit_scale(config),
        softcap=logit_softcap(config),
    )


_checked: WeakSet[nn.Module] = WeakSet()  # by check_head


def check_head(model: Any) -> None:
    """Raise TypeError unless `head_of` makes the logits of a model from its last states.

    Some models transform or normalise states before the output layer, or change logits behind it,
    and their configurations say so under any name. So a model is asked, once, with a few tokens;
    one that is sharded, offloaded, without weights or not a class of transformers is not.
    """
    if torch.compiler.is_compiling() or (model := causal_lm(model)) in _checked:
        return
    from transformers import PreTrainedModel

    known = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    if known and all(map(_is_here, model.parameters())):
        share = _share_of_other_logits(model)
        if share is not None:
            raise TypeError(
                f"The logits of {type(model).__name__} are not its output layer times its last "
                f"states: they differ by {share:.1%}. Something between the two, or behind them, "
                "is not known here (sra.model.head_of), and spans would be compared by other "
                "predictions than the model's. Choose a model without it."
            )
    _checked.add(model)


def _is_here(weight: Tensor) -> bool:
    """Whether a parameter holds its numbers: not one of FSDP's, DeepSpeed's or the meta device."""
    plain = nn.Parameter in type(weight).__mro__ and not hasattr(weight, "ds_id")
    return plain and weight.device.type != "meta"


@torch.no_grad()
def _share_of_other_logits(model: Any) -> float | None:
    """How far the model's logits are from `head_of`'s, in parts of them; None if it is rounding."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(1, 9, device=device)[None] % model.config.get_text_config().vocab_size
    # Eager, so that nothing is compiled for eight tokens.
    with without_dropout(model), torch.compiler.set_stance("force_eager"):
        states = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
    head = head_of(model)
    ours = head.logits(states.to(head.weight.device)).to(logits.device)
    if ours.shape != logits.shape:
        return 1.0
    kinds = [logits.dtype, states.dtype, head.weight.dtype]
    if torch.is_autocast_enabled(device.type):
        kinds.append(torch.get_autocast_dtype(device.type))
    change = (ours - logits).float().norm(dim=-1) / logits.float().norm(dim=-1)
    # Not the greatest: rounding may send a token or two to other experts.
    share = float(change.nan_to_num(0.0).median())
    # A few roundings; a head with LoRA adds in another order.
    return share if share > max(1e-3, *(4 * torch.finfo(kind).eps for kind in kinds)) else None


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, each part of it; afterwards each in its own."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def logit_scale(config: Any) -> float | None:
    """What the logits are multiplied by."""
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        if getattr(config, name, None) is not None:  # Cohere, Falcon-H1, Muse
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None or config.model_type.startswith("hyperclovax"):
        return scaling
    return 1 / scaling  # Granite divides by what HyperCLOVA X, under this name, multiplies by


def logit_softcap(config: Any) -> float | None:
    """What the logits are kept below, by a tanh."""
    # Gemma, RecurrentGemma, xLSTM
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None)) is not None), None)


def head_rows(model: Any) -> int:
    """Entries of the vocabulary that the head has, padding rows included."""
    return _head_shape(model)[0]


def state_width(model: Any, layer: int) -> int:
    """Of a layer's states. The last ones are as wide as the head (OPT-350m narrows them)."""
    config = model.config.get_text_config()
    last = layer in (-1, config.num_hidden_layers - 1)
    return _head_shape(model)[1] if last else config.hidden_size


def _head_shape(model: Any) -> Sequence[int]:
    """Nothing is gathered for it."""
    layer = _in_use(causal_lm(model).get_output_embeddings())
    weight = getattr(layer, "base_layer", layer).weight
    return getattr(weight, "ds_shape", weight.shape)  # DeepSpeed leaves a stub behind


def linear_map(student: Any, width: int, out: int) -> nn.Linear:
    """A linear layer without bias, in a student's dtype and on its device."""
    weight = next(p for p in student.parameters() if p.is_floating_point())
    return nn.Linear(width, out, bias=False, dtype=weight.dtype, device=weight.device)


@contextmanager
def loaded_whole(args: Any) -> Iterator[None]:
    """Models loaded in here are whole on each rank, though `args`, the configuration of a run, is
    of DeepSpeed's ZeRO-3, under which `from_pretrained` splits every model. For teachers."""
    if not args.deepspeed:
        yield
        return
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def place_teacher(teacher: Any, device: torch.device) -> None:
    """Move a teacher to a device, as a Trainer moves the student alone. One that is somewhere on
    purpose stays there: one that is sharded, or on a GPU already.

    Raises:
        ValueError: it was loaded under DeepSpeed's ZeRO-3.
        RuntimeError: the ranks of a run hold different weights of it.
    """
    if not isinstance(teacher, nn.Module):
        teacher.to(device)  # a cache
        return
    first = next(teacher.parameters())
    if hasattr(first, "ds_id"):
        raise ValueError(
            "The teacher was loaded in DeepSpeed's parts (ZeRO-3), and no engine gathers them. "
            "Load it before SRAConfig(deepspeed=...) is made, or inside `with "
            "sra.model.loaded_whole(config):`. It is then whole on each rank."
        )
    if hasattr(first, "full_tensor"):
        return
    if first.device.type == "cpu":
        teacher.to(device)
    if dist.is_available() and dist.is_initialized():
        _check_same_on_ranks(teacher)


def _check_same_on_ranks(teacher: nn.Module) -> None:
    floats = (p.detach() for p in teacher.parameters() if p.is_floating_point())
    norm = sum(float(torch.linalg.vector_norm(p, 1, dtype=torch.float64)) for p in floats)
    norms: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(norms, norm)
    if not all(math.isclose(other, norms[0], rel_tol=1e-4) for other in norms):
        raise RuntimeError(
            "The teacher's weights differ between ranks (sums of absolute values: "
            f"{', '.join(f'{x:.6g}' for x in norms)}). With fsdp_cpu_ram_efficient_loading, rank 0 "
            "alone reads weights, and only the student's are passed on. Switch it off, or load the "
            "same teacher on each rank."
        )


def _weight(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an output layer, whatever PEFT and FSDP made of it."""
    layer = _in_use(layer)
    if hasattr(layer, "base_layer"):  # LoRA: the product of its two matrices is added
        weight, bias = _weight(layer.base_layer)
        if not (layer.merged or layer.disable_adapters):
            for adapter in layer.active_adapters:
                _check_adapter(layer, adapter)
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        return weight, bias
    bias = getattr(layer, "bias", None)  # PEFT's layer of trainable tokens has none
    return _whole(layer.weight), None if bias is None else _whole(bias)


def _check_adapter(layer: Any, adapter: str) -> None:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    biased = getattr(layer, "lora_bias", {}).get(adapter)
    if variant is not None or biased or not hasattr(layer, "get_delta_weight"):
        kind = "lora_bias" if biased else type(variant or layer).__name__
        raise TypeError(
            f"The PEFT adapter {adapter!r} of the output layer ({kind}) is more than a product of "
            "two matrices, and the distiller reads no more of it. Train that layer with plain "
            "LoRA (use_dora=False, lora_bias=False), or whole: "
            'modules_to_save=["lm_head"].'
        )


def _in_use(layer: Any) -> Any:
    """The layer itself, or the full copy that PEFT trains in its place."""
    if hasattr(layer, "modules_to_save"):
        return layer.modules_to_save[layer.active_adapters[0]]
    return layer


def _trained(layer: Any) -> bool:
    """Whether a parameter that FSDP holds in parts at the moment gets a gradient."""
    return any(p.requires_grad and hasattr(p, "full_tensor") for p in layer.parameters())


def _whole(weight: Tensor) -> Tensor:
    """A sharded parameter, gathered."""
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor()
    if getattr(weight, "ds_shape", weight.shape) == weight.shape:
        return weight
    # DeepSpeed gathers by itself what a forward pass of its engine reads; this is outside of one.
    import deepspeed

    with deepspeed.zero.GatheredParameters(weight):
        return weight.detach().clone()
