"""Whether a model keeps apart sequences that stand one behind the other, without padding."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sra.model import call_inside, causal_lm, trunk_of, without_dropout

MEND = 'Pad them: padding_free=False, or SpanCollator(padding="right").'
_apart: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # with its attention


def check_packing(model: Any, device: torch.device) -> None:
    """Raise TypeError unless positions that start anew are all that a model needs to begin anew.

    Convolutions and recurrent layers (LFM2, Qwen3-Next, Granite 4, Jamba) do not look at positions,
    and some models (OPT, GPT-OSS) do not make a mask of them, so what a model's code takes says
    little. It is asked, once: two texts one behind the other, and then another first text, must
    leave the states of the second as they are.
    """
    trunk = trunk_of(model)
    attention = str(trunk.config._attn_implementation)
    if torch.compiler.is_compiling() or _apart.get(trunk) == attention:
        return
    name = type(trunk).__name__
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        raise TypeError(
            f"{name} takes no position_ids, so it would read sequences without padding as one. "
            f"{MEND}"
        )
    share = _share_that_passes(model, trunk, device)
    if share is not None:
        raise TypeError(
            f"{name} (attention {attention!r}) does not begin anew where the positions do: what "
            f"stands before a sequence changes its states, by {share:.0%} of what it would change "
            f"them as one text. {MEND} Another attn_implementation may serve, unless the model has "
            "layers without attention."
        )
    _apart[trunk] = attention


@torch.no_grad()
def _share_that_passes(model: Any, trunk: Any, device: torch.device) -> float | None:
    """Of what a first text does to the states of a second that goes on with it, the share that it
    does to one that begins anew; None if it is rounding."""
    first, other, second = torch.arange(1, 15, device=device).split((5, 5, 4))
    entries = trunk.config.get_text_config().vocab_size

    def states(text: Tensor, positions: Tensor) -> Tensor:
        ids = torch.cat([text, second]) % entries
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
        out = call_inside(causal_lm(model), trunk, **inputs)
        return out.last_hidden_state[0, len(text) :]

    on = torch.arange(9, device=device)
    anew = torch.cat([on[:5], on[:4]])
    with without_dropout(trunk):
        apart, together = (
            (states(first, positions), states(other, positions)) for positions in (anew, on)
        )
    rounding = torch.finfo(apart[0].dtype).eps
    if torch.is_autocast_enabled(device.type):
        rounding = max(rounding, torch.finfo(torch.get_autocast_dtype(device.type)).eps)
    changes = [(x - y).float().norm(dim=-1) for x, y in (apart, together)]
    # Token by token, for a convolution reaches the next few alone.
    share = float((changes[0] / changes[1]).nan_to_num(0.0).max())
    # Half of the digits: an expert that is given other tokens beside these may round otherwise.
    return share if share > rounding**0.5 else None
