"""linear_span_kl in C++: torch's products, and csrc/cpu/span_kl.cpp between them."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.linear_span_kl import chunks
from sra_kernels.native import DTYPES, OK, address
from sra_kernels.span_kl import cpu as span_kl

compare_chunk = chunks.with_kernel(span_kl.compare)


def linear_span_kl_forward(*args: Any) -> tuple[Tensor, ...]:
    return chunks.forward(compare_chunk, *args)


def linear_span_kl_backward(*args: Any) -> tuple[Tensor, ...]:
    return chunks.backward(compare_chunk, *args)


class HeadRows(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("entries", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("factor", ctypes.c_double),
        ("rows_dtype", ctypes.c_int32),
        ("head_dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def linear_span_kl_restore(
    grad: Tensor, factor: Tensor | None, ids: Tensor, entries: int, dtype: torch.dtype
) -> Tensor:
    assert native.cpu is not None
    grad, ids = grad.contiguous(), ids.long().contiguous()
    head = grad.new_empty((entries, grad.shape[1]), dtype=dtype)
    params = HeadRows(
        rows=address(grad),
        ids=address(ids),
        head=address(head),
        count=len(grad),
        entries=entries,
        dim=grad.shape[1],
        factor=1.0 if factor is None else float(factor),
        rows_dtype=DTYPES[grad.dtype],
        head_dtype=DTYPES[dtype],
        threads=torch.get_num_threads(),
    )
    if native.cpu.sra_linear_span_kl_restore(ctypes.byref(params)) != OK:
        raise RuntimeError(f"No C++ kernel takes {grad.dtype} to {dtype}: use_backend('torch').")
    return head


def plan(*args: Any, **options: Any) -> tuple[str, int]:
    return chunks.plan_with(buffers, *args, **options)


def buffers(
    rows: int, ours: int, theirs: int, student: Tensor, direction: str, outside: str
) -> int:
    """One pair of rows in each thread: exponentials of both, their differences, the cap's slope."""
    return 4 * ours * check.accumulator(student.dtype).itemsize * torch.get_num_threads()
