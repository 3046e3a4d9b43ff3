"""Run a model for what distillation reads from it: hidden states, and the attention on them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from sra.attention import attention_of, record_attention_mass
from sra.model import States, call_inside, causal_lm, check_head, trunk_of
from sra.packing import check_packing


def trunk_inputs(
    input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> dict[str, Any]:
    """What a trunk is called with, of a batch in either form of `model_states`."""
    if attention_mask is not None and position_ids is None:
        # Positions count from the first real token: learnt ones differ behind padding on the left.
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    inputs = {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids
    }  # fmt: skip
    return {name: x for name, x in inputs.items() if x is not None} | {"use_cache": False}


def run_trunk(model: Any, **inputs: Any) -> Any:
    """The outputs of `trunk_of`, of a model that is sharded too.

    Raises:
        TypeError: a model whose logits are more than its head makes of its states, or sequences
            without padding and a model that would mix them.
    """
    check_head(model)
    if "position_ids" in inputs and "attention_mask" not in inputs:
        check_packing(model, inputs["input_ids"].device)
    return call_inside(causal_lm(model), trunk_of(model), **inputs)


def model_states(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    layers: Sequence[int] = (-1,),
    mass: bool = True,
) -> States:
    """Run a model's trunk, under any attention implementation.

    Args:
        input_ids: ``[B, T]``, with `attention_mask` ``[B, T]`` (padding on either side); or
            ``[1, N]``, sequences one behind the other without padding, with `position_ids`
            ``[1, N]`` that start from 0 in each.
        layers: which decoder layers; negative ones count from the last, -1. The mass of one without
            softmax attention is that of the nearest layer before it that has it.
        mass: whether to record the attention mass, which needs attention whose queries and keys
            can be read.

    Raises:
        IndexError: there is no such layer.
        TypeError, NotImplementedError: see `record_attention_mass`.
    """
    check_head(model)  # before anything of its layers is recorded
    trunk = trunk_of(model)
    count = trunk.config.get_text_config().num_hidden_layers
    for layer in layers:
        if not -count <= layer < count:
            raise IndexError(
                f"{type(causal_lm(model)).__name__} has {count} decoder layers; there is no "
                f"{layer}. Layers are counted from 0, or from the last, -1."
            )
    chosen = [layer % count for layer in layers]
    attentions = {layer: attention_of(model, layer) for layer in chosen} if mass else {}
    inner = any(layer != count - 1 for layer in chosen)
    with ExitStack() as stack:
        records = {
            index: stack.enter_context(record_attention_mass(model, index))
            for index in {*attentions.values()}
        }
        out = run_trunk(
            model,
            **trunk_inputs(input_ids, attention_mask, position_ids),
            **({"output_hidden_states": True} if inner else {}),
        )
    hidden = [  # hidden_states[0] is the embedding
        out.last_hidden_state if i == count - 1 else out.hidden_states[i + 1] for i in chosen
    ]
    masses = [records[attentions[i]].mass for i in chosen] if mass else []
    return States(tuple(hidden), tuple(masses))
