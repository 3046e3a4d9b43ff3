"""span_kl by a `compare` of C++, CUDA or Triton: what is allocated, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.native import rows
from sra_kernels.span_kl.portable import STATS


def forward(
    compare: Callable[..., None],
    student_logits: Tensor,
    teacher_logits: Tensor,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *objective, need_mass, need_grad = constants
    spans = len(student_logits)
    kl = student_logits.new_empty(spans, dtype=check.accumulator(student_logits.dtype))
    mass, stats = kl.new_empty(spans if need_mass else 0), kl.new_empty(0)
    if need_grad:
        stats = kl.new_empty(spans, STATS)
    compare(
        rows(student_logits), rows(teacher_logits), *objective, kl=kl,
        mass=mass if need_mass else None, stats=stats if need_grad else None,
    )  # fmt: skip
    return kl, mass, stats


def backward(
    compare: Callable[..., None],
    grad_kl: Tensor,
    stats: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *constants: Any,
) -> Tensor:
    grad = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    compare(
        rows(student_logits), rows(teacher_logits), *constants, factors=grad_kl.contiguous(),
        known=stats, grad=grad,
    )  # fmt: skip
    return grad
