"""span_geometry in C++ (csrc/cpu/span_geometry.cpp): fills the params struct and calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.native import DTYPES, OK, address, rows
from sra_kernels.span_geometry.portable import check_offsets
from sra_kernels.span_kl.portable import saved_dtype

BAND_BYTES = 16 << 20  # kBandBytes of the C++: cosines held at a time


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


def span_geometry_forward(
    student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Returns (loss [B], its gradient [S, Ds] or [0])."""
    assert native.cpu is not None
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
    if native.cpu.sra_span_geometry_forward(ctypes.byref(params)) != OK:
        check_offsets(offsets, len(student))
        check.weights_content(weights)
    return loss, grad


def plan(student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): the gradient twice, and what one sample needs.

    The samples' lengths are not read, so one sample may hold all spans.
    """
    spans, size = len(student), check.accumulator(student.dtype).itemsize
    band = min(spans, max(1, BAND_BYTES // (2 * max(spans, 1) * size)))
    gradients = student.numel() * (saved_dtype(student.dtype).itemsize + student.element_size())
    vectors = (student.numel() + teacher.numel()) * size
    return (
        f"sample by sample, bands of at most {band} spans",
        gradients + vectors + 2 * band * spans * size,
    )
