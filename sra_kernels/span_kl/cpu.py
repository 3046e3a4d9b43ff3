"""span_kl in C++ (csrc/cpu/span_kl.cpp): fills the params struct and calls."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.native import OK
from sra_kernels.span_kl import calls
from sra_kernels.span_kl.params import params_of
from sra_kernels.span_kl.portable import STATS, check_ids


def span_kl_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return calls.forward(compare, *args)


def span_kl_backward(*args: Any) -> Tensor:
    return calls.backward(compare, *args)


def compare(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    *objective: Any,
    **wanted: Any,
) -> None:
    """Fills `kl`, `mass`, `stats` and `grad`, those that are given. `grad` may be `student`."""
    assert native.cpu is not None
    ids = [None if x is None else x.long().contiguous() for x in (student_ids, teacher_ids)]
    params = params_of(student, teacher, ids[0], ids[1], *objective, **wanted)
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
