"""The gradients of linear_span_kl.

The sum has one upstream scalar, a plain factor, so its gradients are formed in the forward sweep.
An upstream gradient for each span has to enter before the products that sum over spans, so there
the backward sweeps again.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        need = ctx.needs_input_grad[1:4]
        return None, *restored(grads, need, grad_sum, rows, ctx.like), *[None] * 15


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
        rows = rows_in_use(*inputs, *ctx.options)
        return None, *restored(grads, need, None, rows, ctx.like), *[None] * 15


def rows_in_use(*args: Any) -> Tensor | None:
    """The student's ids where only those rows of its head are read; None for the whole head."""
    student_ids, outside = args[6], args[16]
    return None if outside == "bucket" else student_ids


def restored(
    grads: Sequence[Tensor], need: Sequence[bool], factor: Tensor | None, rows: Tensor | None,
    like: list[Any],
) -> list[Any]:  # fmt: skip
    """Each needed gradient times the factor in its input's dtype; those of the head's rows in use
    among zeros."""
    out: list[Any] = []
    for i, (grad, needed, shape_and_dtype) in enumerate(zip(grads, need, like, strict=True)):
        if not needed:
            out.append(None)
            continue
        shape, dtype = shape_and_dtype
        if i == 0 or rows is None:
            out.append((grad if factor is None else grad * factor).to(dtype))
        else:
            whole = ops.linear_span_kl_restore(
                grad.view(len(grad), -1), factor, rows, shape[0], dtype
            )
            out.append(whole.view(shape))
    return out
