"""Shapes and dtypes of span_com's operators, for torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check


def span_com_forward(
    hidden: Tensor, spans: Tensor, weights: Tensor | None, wide_com: bool
) -> tuple[Tensor, Tensor]:
    wide = check.accumulator(hidden.dtype)
    dtype = wide if wide_com else hidden.dtype
    com = hidden.new_empty(spans.shape[0], hidden.shape[1], dtype=dtype)
    return com, hidden.new_empty(spans.shape[0], dtype=wide)


def span_com_backward(
    grad_com: Tensor,
    grad_mass: Tensor,
    spans: Tensor,
    weights: Tensor | None,
    mass: Tensor,
    hidden: Tensor | None,
    com: Tensor | None,
    tokens: torch.SymInt,
    need_hidden: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    grad_hidden = grad_com.new_empty((tokens, grad_com.shape[1]) if need_hidden else (0,))
    return grad_hidden, mass.new_empty((tokens,) if need_weights else (0,))
