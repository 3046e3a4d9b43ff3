"""attention_mass of one query row in CUDA (csrc/cuda/attention_mass.cu)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sra_kernels import check, native
from sra_kernels.attention_mass.cpu import Params
from sra_kernels.attention_mass.portable import check_index
from sra_kernels.native import DTYPES, address, rows

# As in csrc/cuda/attention_mass.cu.
RUN, RUNS = 128, 128
QUERY_BYTES = 48 << 10

ALL_ROWS = (
    "attention_mass of all query rows has no CUDA kernel, only that of one row (query_index). "
    'use_backend("triton") has it.'
)


def attention_mass_forward(
    query: Tensor,
    key: Tensor,
    query_index: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    softcap: float | None,
    window: int | None,
    lse: Tensor | None,
) -> Tensor:
    if query_index is None:
        raise RuntimeError(ALL_ROWS)
    query, key = rows(query), rows(key)
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    wide = check.accumulator(query.dtype)
    if dim * wide.itemsize > QUERY_BYTES:
        raise RuntimeError(
            f"The CUDA kernel of attention_mass takes heads of up to {QUERY_BYTES // wide.itemsize}"
            f' numbers in {query.dtype}, not {dim}. use_backend("triton") takes any.'
        )
    if check.contents(query.device):
        check_index(query_index, queries)
    query_index = query_index.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    mass = query.new_empty(batch, keys, dtype=wide)
    params = Params(
        query=address(query),
        key=address(key),
        query_index=address(query_index),
        key_mask=address(key_mask),
        mass=address(mass),
        query_strides=query.stride()[:3],
        key_strides=key.stride()[:3],
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        dim=dim,
        window=min(window or 0, keys),
        scale=scale,
        softcap=softcap or 0,
        dtype=DTYPES[query.dtype],
    )
    native.cuda_call("attention_mass_forward", params, query)
    return mass


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
