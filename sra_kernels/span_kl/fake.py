"""Shapes and dtypes of span_kl's operators, for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.span_kl.portable import saved_dtype


def span_kl_forward(student_logits: Tensor, *constants: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_mass, need_grad = constants
    spans, columns = student_logits.shape
    kl = student_logits.new_empty(spans, dtype=check.accumulator(student_logits.dtype))
    mass = kl.new_empty(spans if need_mass else 0)
    shape = (spans, columns) if need_grad else (0,)
    return kl, mass, kl.new_empty(shape, dtype=saved_dtype(student_logits.dtype))


def span_kl_backward(grad_kl: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)
