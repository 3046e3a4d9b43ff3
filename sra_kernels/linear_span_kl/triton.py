"""linear_span_kl on a GPU: cuBLAS's products in large chunks, and span_kl's kernel between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sra_kernels.linear_span_kl import chunks, tiles
from sra_kernels.linear_span_kl.restore_kernel import linear_span_kl_restore
from sra_kernels.linear_span_kl.tiles import linear_span_kl_tiles
from sra_kernels.span_kl import triton as span_kl

compare_chunk = chunks.with_kernel(span_kl.compare)


def linear_span_kl_forward(*args: Any) -> tuple[Tensor, ...]:
    return chunks.forward(compare_chunk, *args)


def linear_span_kl_backward(*args: Any) -> tuple[Tensor, ...]:
    return chunks.backward(compare_chunk, *args)


def plan(*args: Any, preset: str = "chunks", **options: Any) -> tuple[str, int]:
    if preset == "tiles":
        return tiles.plan(*args, **options)
    return chunks.plan_with(buffers, *args, **options)


def buffers(
    rows: int, ours: int, theirs: int, student: Tensor, direction: str, outside: str
) -> int:
    """The table of partners and the mask of shared entries."""
    return 4 * ours + theirs


__all__ = [
    "linear_span_kl_backward",
    "linear_span_kl_forward",
    "linear_span_kl_restore",
    "linear_span_kl_tiles",
    "plan",
]
