"""sra_span_geometry of csrc/include/sra_kernels.h, and the call that C++ and CUDA share."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sra_kernels.native import DTYPES, Launch, address, rows
from sra_kernels.span_kl.portable import saved_dtype


class Params(ctypes.Structure):
    _fields_ = (
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("spans", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("student_dim", ctypes.c_int64),
        ("teacher_dim", ctypes.c_int64),
        ("student_stride", ctypes.c_int64),
        ("teacher_stride", ctypes.c_int64),
        ("student_dtype", ctypes.c_int32),
        ("teacher_dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def forward(
    launch: Launch,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    offsets: Tensor,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (loss [B], its gradient [S, Ds] or [0])."""
    student, teacher = rows(student), rows(teacher)
    weights, offsets = weights.contiguous(), offsets.contiguous()
    loss = weights.new_empty(len(offsets) - 1)
    grad = student.new_empty(student.shape if need_grad else 0, dtype=saved_dtype(student.dtype))
    params = Params(
        student=address(student),
        teacher=address(teacher),
        weights=address(weights),
        offsets=address(offsets),
        loss=address(loss),
        grad=address(grad) if need_grad else None,
        spans=len(student),
        samples=len(loss),
        student_dim=student.shape[1],
        teacher_dim=teacher.shape[1],
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        student_dtype=DTYPES[student.dtype],
        teacher_dtype=DTYPES[teacher.dtype],
        threads=torch.get_num_threads(),
    )
    launch("span_geometry_forward", params, student)
    return loss, grad
