"""Shapes and dtypes of span_com's operators, for torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check


def span_com_forward(
    hidden: Tensor, spans: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    com = hidden.new_empty(spans.shape[0], hidden.shape[1])
    return com, hidden.new_empty(spans.shape[0], dtype=check.accumulator(hidden.dtype))


def span_com_backward(
    grad_com: Tensor,
    grad_mass: Tensor,
    spans: Tensor,
    weights: Tensor | None,
    mass: Tensor,
    hidden: Tensor | None,
    tokens: torch.SymInt,
    need_hidden: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    grad_hidden = grad_com.new_empty((tokens, grad_com.shape[1]) if need_hidden else (0,))
    return grad_hidden, mass.new_empty((tokens,) if need_weights else (0,))
