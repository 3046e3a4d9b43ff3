"""The gradient of span_kl: a sweep of the backward, with the upstream gradient folded in.

Saved are the logits themselves and a few sums over each row; the gradient is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sra_kernels import library

ops = library.ops


class SpanKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        kl, mass, stats = ops.span_kl_forward(*args)
        ctx.save_for_backward(stats, *args[:4])
        ctx.options = args[4:-2]
        ctx.mark_non_differentiable(mass)
        return kl, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor, _: Tensor) -> Any:
        return ops.span_kl_backward(grad_kl, *ctx.saved_tensors, *ctx.options), *[None] * 9
