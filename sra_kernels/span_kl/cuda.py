"""span_kl in CUDA (csrc/cuda/span_kl.cu): fills the params struct and calls."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from sra_kernels import check, native
from sra_kernels.native import address
from sra_kernels.span_kl import calls
from sra_kernels.span_kl.params import params_of
from sra_kernels.span_kl.portable import STATS
from sra_kernels.span_kl.tables import tables


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
    """Fills `kl`, `mass`, `stats` and `grad`, those that are given. `grad` may be `student`.

    The kernel goes by tables made of the ids, and the options are those of `params_of`.
    """
    partner, shared = tables(student_ids, teacher_ids, student.shape[1], teacher.shape[1])
    params = params_of(student, teacher, None, None, *objective, **wanted)
    native.cuda_call("span_kl_forward", params, student, address(partner), address(shared))


def plan(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    vocab: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs), the backward included if there is one."""
    assert native.cuda is not None
    size = check.accumulator(student_logits.dtype).itemsize
    (spans, entries), theirs = student_logits.shape, teacher_logits.shape[1]
    options = {"beta": None, "outside": "renormalise"} | options
    objective = (options[x] for x in ("temperature", "direction", "beta", "outside"))
    params = params_of(student_logits, teacher_logits, None, None, *objective)
    workspace = native.cuda.sra_cuda_span_kl_workspace
    workspace.restype = ctypes.c_int64
    parts = workspace(ctypes.byref(params))
    grad = student_logits.numel() * student_logits.element_size() * student_logits.requires_grad
    # The tables, and 32-bit ids from which the first is made.
    tables_of_ids = 0 if vocab is None else 4 * entries + theirs + 4 * len(vocab[0])
    return (
        "several blocks for each pair of rows, a launch for each sweep"
        if parts
        else "a block for each pair of rows",
        grad + (2 + STATS) * spans * size + parts + tables_of_ids,
    )
