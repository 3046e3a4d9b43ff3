"""attention_mass in C++ (csrc/cpu/attention_mass.cpp): fills the params struct and calls."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.attention_mass.portable import check_index
from sra_kernels.native import DTYPES, OK, address, rows


class Params(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("query_index", ctypes.c_void_p),
        ("key_mask", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("query_strides", ctypes.c_int64 * 3),
        ("key_strides", ctypes.c_int64 * 3),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
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
    assert native.cpu is not None
    query, key = rows(query), rows(key)
    query_index = None if query_index is None else query_index.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    lse = None if lse is None else lse.contiguous()
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    mass = query.new_empty(batch, keys, dtype=check.accumulator(query.dtype))
    params = Params(
        query=address(query),
        key=address(key),
        query_index=address(query_index),
        key_mask=address(key_mask),
        lse=address(lse),
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
        threads=torch.get_num_threads(),
    )
    if native.cpu.sra_attention_mass_forward(ctypes.byref(params)) != OK:
        check_index(query_index, queries)
    return mass


# As in csrc/cpu: attention_row.h, attention_tile.h, attention_mass.cpp.
ROW_RUN = 512
COLUMNS, SCORE_BYTES, TILE_RUN = 64, 2 << 20, 96
BLOCKS = 128


def plan(
    query: Tensor,
    key: Tensor,
    *,
    query_index: Tensor | None = None,
    window: int | None = None,
    lse: Tensor | None = None,
    **options: Any,
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs)."""
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    size = check.accumulator(query.dtype).itemsize
    threads = torch.get_num_threads()
    if query_index is not None:
        runs = -(-keys // ROW_RUN)
        scratch = threads * (heads // kv_heads + 32) * dim
        numbers = batch * (keys + heads * (keys + 2 * runs)) + scratch
        return f"runs of {ROW_RUN} keys, read once", numbers * size
    seen = keys if window is None else min(keys, window + COLUMNS)
    panel = 64 // size
    columns = max(panel, min(COLUMNS, SCORE_BYTES // size // max(1, seen) // panel * panel))
    tiles = kv_heads * -(-queries * (heads // kv_heads) // columns)
    blocks = max(1, min(tiles, BLOCKS // max(1, batch)))
    runs = 1 if lse is not None else -(-seen // TILE_RUN)
    tile = columns * dim + TILE_RUN * dim + runs * (TILE_RUN + 2) * columns
    numbers = batch * (1 + blocks) * keys + threads * tile + 2 * batch * queries
    return f"tiles of {columns} query rows, {blocks} partial masses a sample", numbers * size
