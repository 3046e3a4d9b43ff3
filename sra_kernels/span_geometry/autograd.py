"""The gradient of span_geometry: formed in the forward sweep, scaled for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sra_kernels import library

ops = library.ops


class SpanGeometry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        offsets: Tensor,
        need_grad: bool,
    ) -> Tensor:
        loss, grad = ops.span_geometry_forward(student, teacher, weights, offsets, need_grad)
        ctx.save_for_backward(grad, offsets)
        ctx.dtype = student.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        grad, offsets = ctx.saved_tensors
        index = torch.arange(grad.shape[0], device=grad.device)
        sample = torch.searchsorted(offsets[1:], index, right=True)
        sample = sample.clamp(max=grad_loss.shape[0] - 1)  # where bad offsets leave spans over
        return (grad * grad_loss[sample, None]).to(ctx.dtype), None, None, None, None
