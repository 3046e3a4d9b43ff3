"""A language model's output layer as plain tensors, with what the model does to its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Head(NamedTuple):
    """logits = softcap * tanh(scale * (states @ weight.T + bias) / softcap), where they are set."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None

    def to(self, dtype: torch.dtype) -> Head:
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)

    def logits(self, states: Tensor) -> Tensor:
        """``[..., V]`` in float32 or wider, of post-final-norm states ``[..., D]``."""
        logits = F.linear(states.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def head_of(model: Any) -> Head:
    """The head of a causal language model of transformers.

    Raises:
        TypeError: the model has no output embeddings.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise TypeError(
            f"{type(model).__name__} has no output embeddings, so it predicts no tokens. Load it "
            "with AutoModelForCausalLM."
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    return Head(
        layer.weight,
        getattr(layer, "bias", None),
        scale=1 / divisor if divisor else scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
