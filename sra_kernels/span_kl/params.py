"""sra_span_kl of csrc/include/sra_kernels.h: the params struct of the C++ and CUDA kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sra_kernels.native import DTYPES, address

DIRECTIONS = {"forward": 0, "reverse": 1, "jsd": 2}
OUTSIDE = {"renormalise": 0, "weight": 1, "bucket": 2}


class Params(ctypes.Structure):
    _fields_ = (
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("student_ids", ctypes.c_void_p),
        ("teacher_ids", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("kl", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("known", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("student_entries", ctypes.c_int64),
        ("teacher_entries", ctypes.c_int64),
        ("shared", ctypes.c_int64),
        ("student_stride", ctypes.c_int64),
        ("teacher_stride", ctypes.c_int64),
        ("grad_stride", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("beta", ctypes.c_double),
        ("student_scale", ctypes.c_double),
        ("student_softcap", ctypes.c_double),
        ("teacher_scale", ctypes.c_double),
        ("teacher_softcap", ctypes.c_double),
        ("student_dtype", ctypes.c_int32),
        ("teacher_dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("direction", ctypes.c_int32),
        ("outside", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def params_of(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
    *,
    factors: Tensor | None = None,
    kl: Tensor | None = None,
    mass: Tensor | None = None,
    stats: Tensor | None = None,
    known: Tensor | None = None,
    grad: Tensor | None = None,
    student_scale: float | None = None,
    student_softcap: float | None = None,
    teacher_scale: float | None = None,
    teacher_softcap: float | None = None,
) -> Params:
    """Addresses alone: the tensors must live until the kernel has been called."""
    return Params(
        student=address(student),
        teacher=address(teacher),
        student_ids=address(student_ids),
        teacher_ids=address(teacher_ids),
        factors=address(factors),
        kl=address(kl),
        mass=address(mass),
        stats=address(stats),
        known=address(known),
        grad=address(grad),
        rows=len(student),
        student_entries=student.shape[1],
        teacher_entries=teacher.shape[1],
        shared=0 if teacher_ids is None else len(teacher_ids),
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        grad_stride=0 if grad is None else grad.stride(0),
        temperature=temperature,
        beta=0 if beta is None else beta,
        student_scale=1 if student_scale is None else student_scale,
        student_softcap=0 if student_softcap is None else student_softcap,
        teacher_scale=1 if teacher_scale is None else teacher_scale,
        teacher_softcap=0 if teacher_softcap is None else teacher_softcap,
        student_dtype=DTYPES[student.dtype],
        teacher_dtype=DTYPES[teacher.dtype],
        grad_dtype=DTYPES[student.dtype if grad is None else grad.dtype],
        direction=DIRECTIONS[direction],
        outside=OUTSIDE[outside],
        threads=torch.get_num_threads(),
    )
