"""attention_mass of one query row in CUDA (csrc/cuda/attention_mass.cu)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sra_kernels import check, native
from sra_kernels.attention_mass import params
from sra_kernels.attention_mass.portable import check_index

# As in csrc/cuda/attention_mass.cu.
RUN, RUNS = 128, 128
QUERY_BYTES = 48 << 10

ALL_ROWS = (
    "attention_mass of all query rows has no CUDA kernel, only that of one row (query_index). "
    'use_backend("triton") has it.'
)


def attention_mass_forward(
    query: Tensor, key: Tensor, query_index: Tensor | None, *options: Any
) -> Tensor:
    if query_index is None:
        raise RuntimeError(ALL_ROWS)
    dim, size = query.shape[3], check.accumulator(query.dtype).itemsize
    if dim * size > QUERY_BYTES:
        raise RuntimeError(
            f"The CUDA kernel of attention_mass takes heads of up to {QUERY_BYTES // size} numbers "
            f'in {query.dtype}, not {dim}. use_backend("triton") takes any.'
        )
    if check.contents(query.device):
        check_index(query_index, query.shape[2])
    return params.forward(native.cuda_call, query, key, query_index, *options)


def plan(
    query: Tensor, key: Tensor, *, query_index: Tensor | None = None, **options: Any
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): the result, a score for each head and key."""
    if query_index is None:
        raise RuntimeError(ALL_ROWS)
    (batch, heads, _, _), keys = query.shape, key.shape[2]
    run = RUN * max(1, -(-keys // (RUN * RUNS)))
    runs = -(-keys // run)
    numbers = batch * (keys + heads * (keys + 2 * runs))
    return (
        f"runs of {run} keys, read once; two launches",
        numbers * check.accumulator(query.dtype).itemsize,
    )
