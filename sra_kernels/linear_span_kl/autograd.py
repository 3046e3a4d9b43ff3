"""The gradients of linear_span_kl.

The sum has one upstream scalar, a plain factor, so its gradients are formed in the forward sweep.
An upstream gradient for each span has to enter before the products that sum over spans, so there
the backward sweeps again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sra_kernels import library

ops = library.ops


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_enabled: bool, *args: Any) -> Any:
        need = [grad_enabled and needed for needed in ctx.needs_input_grad[1:4]]
        kl, mass, *grads = ops.linear_span_kl_forward(*args, *need)
        ctx.save_for_backward(rows_in_use(*args), *grads)
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in args[:3]]
        ctx.mark_non_differentiable(mass)
        return kl.sum(), mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> Any:
        rows, *grads = ctx.saved_tensors
        scaled = [
            grad * grad_sum if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad[1:4], strict=True)
        ]
        return None, *restored(scaled, rows, ctx.like), *[None] * 15


class Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_enabled: bool, *args: Any) -> Any:
        kl, mass, *_ = ops.linear_span_kl_forward(*args, False, False, False)
        inputs, ctx.options = args[:9], args[9:-1]
        ctx.save_for_backward(*inputs)
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in args[:3]]
        ctx.mark_non_differentiable(mass)
        return kl, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor, _: Tensor) -> Any:
        inputs = ctx.saved_tensors
        need = ctx.needs_input_grad[1:4]
        grads = ops.linear_span_kl_backward(grad_kl, *inputs, *ctx.options, *need)
        grads = [grad if needed else None for grad, needed in zip(grads, need, strict=True)]
        rows = rows_in_use(*inputs, *ctx.options)
        return None, *restored(grads, rows, ctx.like), *[None] * 15


def rows_in_use(*args: Any) -> Tensor | None:
    """The student's ids where only those rows of its head are read; None for the whole head."""
    student_ids, outside = args[6], args[16]
    return None if outside == "bucket" else student_ids


def restored(grads: list[Tensor | None], rows: Tensor | None, like: list[Any]) -> list[Any]:
    """Each gradient in its input's dtype; those of the head's rows in use among zeros."""
    student, *head_and_bias = grads
    out: list[Any] = [None if student is None else student.to(like[0][1])]
    for grad, shape_and_dtype in zip(head_and_bias, like[1:], strict=True):
        if grad is not None:
            shape, dtype = shape_and_dtype
            grad = grad.to(dtype)
            if rows is not None:
                grad = grad.new_zeros(shape).index_copy_(0, rows, grad)
        out.append(grad)
    return out
