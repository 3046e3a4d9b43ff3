"""Shapes and dtypes of span_kl's operators, for torch.compile."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sra_kernels import check
from sra_kernels.span_kl.portable import STATS


def span_kl_forward(student_logits: Tensor, *constants: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_mass, need_grad = constants
    spans = student_logits.shape[0]
    kl = student_logits.new_empty(spans, dtype=check.accumulator(student_logits.dtype))
    stats = kl.new_empty((spans, STATS) if need_grad else (0,))
    return kl, kl.new_empty(spans if need_mass else 0), stats


def span_kl_backward(
    grad_kl: Tensor, stats: Tensor, student_logits: Tensor, *constants: Any
) -> Tensor:
    return student_logits.new_empty(student_logits.shape)
