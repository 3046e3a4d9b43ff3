"""Shapes and dtypes of linear_span_kl's operators, for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.span_kl.portable import saved_dtype


def linear_span_kl_forward(
    student: Tensor, student_head: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student_ids, outside, need_mass = args[4], args[14], args[15]
    kl = student.new_empty(student.shape[0], dtype=check.accumulator(student.dtype))
    mass = kl.new_empty(student.shape[0] if need_mass else 0)
    return kl, mass, *_grads(student, student_head, student_ids, outside, *args[-3:])


def linear_span_kl_backward(
    grad_kl: Tensor, student: Tensor, student_head: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _grads(student, student_head, args[4], args[14], *args[-3:])


def linear_span_kl_restore(
    grad: Tensor, factor: Tensor | None, ids: Tensor, entries: torch.SymInt, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty((entries, grad.shape[1]), dtype=dtype)


def linear_span_kl_tiles(student: Tensor, *args: Any) -> Tensor:
    return student.new_empty(student.shape[0], dtype=check.accumulator(student.dtype))


def _grads(
    student: Tensor,
    student_head: Tensor,
    student_ids: Tensor | None,
    outside: str,
    need_student: bool,
    need_head: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    cut = student_ids is not None and outside != "bucket"
    entries = student_ids.shape[0] if cut and student_ids is not None else student_head.shape[0]
    empty = student.new_empty(0, dtype=saved_dtype(student.dtype))
    return (
        empty.new_empty(student.shape if need_student else (0,)),
        empty.new_empty((entries, student.shape[1]) if need_head else (0,)),
        empty.new_empty((entries,) if need_bias else (0,)),
    )
