"""The gradient of span_kl: formed in the forward sweep, scaled by each span's upstream gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sra_kernels import library

ops = library.ops


class SpanKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, *constants: Any) -> Any:
        kl, mass, grad = ops.span_kl_forward(student_logits, *constants)
        ctx.save_for_backward(grad)
        ctx.dtype = student_logits.dtype
        ctx.mark_non_differentiable(mass)
        return kl, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor, _: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return ops.span_kl_backward(grad_kl, grad, ctx.dtype), *[None] * 9
