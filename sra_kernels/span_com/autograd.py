"""The gradient of span_com. Only what a requested gradient needs is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sra_kernels import library

ops = library.ops


class SpanCom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, spans: Tensor, weights: Tensor | None) -> Any:
        need_weights = ctx.needs_input_grad[2]
        com, mass = ops.span_com_forward(hidden, spans, weights)
        ctx.save_for_backward(spans, weights, mass, hidden if need_weights else None)
        ctx.tokens = hidden.shape[0]
        if not need_weights:
            ctx.mark_non_differentiable(mass)
        return com, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_com: Tensor, grad_mass: Tensor) -> Any:
        spans, weights, mass, hidden = ctx.saved_tensors
        need_hidden, _, need_weights = ctx.needs_input_grad
        grad_hidden, grad_weights = ops.span_com_backward(
            grad_com, grad_mass, spans, weights, mass, hidden, ctx.tokens, need_hidden,
            need_weights,
        )  # fmt: skip
        return grad_hidden if need_hidden else None, None, grad_weights if need_weights else None
