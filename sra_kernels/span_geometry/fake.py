"""Shapes and dtypes of span_geometry's operator, for torch.compile."""

from __future__ import annotations

from torch import Tensor

from sra_kernels import check
from sra_kernels.span_kl.portable import saved_dtype


def span_geometry_forward(
    student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty(offsets.shape[0] - 1, dtype=check.accumulator(student.dtype))
    shape = student.shape if need_grad else (0,)
    return loss, student.new_empty(shape, dtype=saved_dtype(student.dtype))
