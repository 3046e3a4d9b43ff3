"""attention_mass in C++ (csrc/cpu/attention_mass.cpp)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.attention_mass import params
from sra_kernels.attention_mass.portable import check_index
from sra_kernels.native import OK


def attention_mass_forward(
    query: Tensor, key: Tensor, query_index: Tensor | None, *options: Any
) -> Tensor:
    def launch(function: str, given: ctypes.Structure, like: Tensor) -> None:
        if native.cpu_call(function, given) != OK:
            check_index(query_index, query.shape[2])

    return params.forward(launch, query, key, query_index, *options)


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
