"""span_kl in C++ (csrc/cpu/span_kl.cpp): fills the params struct and calls."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.native import DTYPES, OK, address, rows
from sra_kernels.span_kl.portable import STATS, check_ids

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


def span_kl_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
    need_mass: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kl = student_logits.new_empty(
        len(student_logits), dtype=check.accumulator(student_logits.dtype)
    )
    mass = kl.new_empty(len(kl)) if need_mass else None
    stats = kl.new_empty(len(kl), STATS) if need_grad else None
    compare(
        rows(student_logits), rows(teacher_logits), student_ids, teacher_ids, temperature,
        direction, beta, outside, kl=kl, mass=mass, stats=stats,
    )  # fmt: skip
    mass = kl.new_empty(0) if mass is None else mass
    return kl, mass, kl.new_empty(0) if stats is None else stats


def span_kl_backward(
    grad_kl: Tensor, stats: Tensor, student_logits: Tensor, teacher_logits: Tensor, *constants: Any
) -> Tensor:
    grad = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    compare(
        rows(student_logits), rows(teacher_logits), *constants, factors=grad_kl.contiguous(),
        known=stats, grad=grad,
    )  # fmt: skip
    return grad


def compare(
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
) -> None:
    """Fills `kl`, `mass`, `stats` and `grad`, those that are given. `grad` may be `student`."""
    assert native.cpu is not None
    ids = [None if x is None else x.contiguous() for x in (student_ids, teacher_ids)]
    params = Params(
        student=address(student),
        teacher=address(teacher),
        student_ids=address(ids[0]),
        teacher_ids=address(ids[1]),
        factors=address(factors),
        kl=address(kl),
        mass=address(mass),
        stats=address(stats),
        known=address(known),
        grad=address(grad),
        rows=len(student),
        student_entries=student.shape[1],
        teacher_entries=teacher.shape[1],
        shared=0 if ids[1] is None else len(ids[1]),
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
    if native.cpu.sra_span_kl_forward(ctypes.byref(params)) != OK:
        check_ids(student_ids, student.shape[1], "student")
        check_ids(teacher_ids, teacher.shape[1], "teacher")


def plan(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    vocab: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs), the backward included if there is one."""
    size = check.accumulator(student_logits.dtype).itemsize
    entries = student_logits.shape[1] if vocab is None else len(vocab[0])
    spans, threads = len(student_logits), torch.get_num_threads()
    grad = student_logits.numel() * student_logits.element_size() * student_logits.requires_grad
    return (
        f"one pair of rows in each of {threads} threads",
        grad + (2 + STATS) * spans * size + 4 * entries * size * threads,
    )
