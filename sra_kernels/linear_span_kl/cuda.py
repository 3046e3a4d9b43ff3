"""linear_span_kl in CUDA: torch's products, and csrc/cuda/span_kl.cu between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.linear_span_kl import chunks
from sra_kernels.linear_span_kl.cpu import HeadRows
from sra_kernels.native import DTYPES, address
from sra_kernels.span_kl import cuda as span_kl

compare_chunk = chunks.with_kernel(span_kl.compare)


def linear_span_kl_forward(*args: Any) -> tuple[Tensor, ...]:
    return chunks.forward(compare_chunk, *args)


def linear_span_kl_backward(*args: Any) -> tuple[Tensor, ...]:
    return chunks.backward(compare_chunk, *args)


def linear_span_kl_restore(
    grad: Tensor, factor: Tensor | None, ids: Tensor, entries: int, dtype: torch.dtype
) -> Tensor:
    grad, ids = grad.contiguous(), ids.long().contiguous()
    head = grad.new_empty((entries, grad.shape[1]), dtype=dtype)
    params = HeadRows(
        rows=address(grad),
        ids=address(ids),
        head=address(head),
        count=len(grad),
        entries=entries,
        dim=grad.shape[1],
        rows_dtype=DTYPES[grad.dtype],
        head_dtype=DTYPES[dtype],
    )
    # It stays on the device: as a number of the struct it would make the host wait.
    factor = None if factor is None else factor.to(check.accumulator(grad.dtype))
    native.cuda_call("linear_span_kl_restore", params, grad, address(factor))
    return head


def plan(*args: Any, **options: Any) -> tuple[str, int]:
    return chunks.plan_with(buffers, *args, **options)


def buffers(
    rows: int, ours: int, theirs: int, student: Tensor, direction: str, outside: str
) -> int:
    """The kernels work in the multiprocessors' own memory."""
    return 0
