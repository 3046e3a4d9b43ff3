"""attention_mass in Triton: keys are read in tiles, and no program waits for another.

One row: a first kernel leaves the scores of each run of keys and their softmax statistics, a second
one combines runs and heads. All rows: each row's largest score and sum, unless its log-sum-exp is
given; then each tile of keys adds up what the rows that see it pay, in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sra_kernels import check
from sra_kernels.attention_mass import triton_kernels as kernels
from sra_kernels.attention_mass.portable import check_index
from sra_kernels.native import rows
from sra_kernels.tuning import Config, architecture, chosen

RUNS = 128  # the runs that one row's keys are cut into at most: one tile of statistics a head
ROW_TILE = 8192  # scores of all heads that a program of row_mass_kernel adds up
NORMALISE = {"BLOCK_PARTS": 8, "BLOCK_KEYS": 512}
# mass_kernel: rows are cut into shares until there are so many programs, or a share has so few
# tiles of rows.
PROGRAMS, LEAST_TILES = 1024, 8

# By kernel, bits of an input number and, of 16 bits, head size. BLOCK_D columns of the heads are in
# a tile at most: whole rows of wide numbers would not fit into registers.
CONFIGS = {
    "row, 16, 64": (
        Config({"BLOCK_KEYS": 256, "BLOCK_D": 64}),
        Config({"BLOCK_KEYS": 128, "BLOCK_D": 64}),
    ),
    "row, 16, 128": (
        Config({"BLOCK_KEYS": 128, "BLOCK_D": 128}),
        Config({"BLOCK_KEYS": 64, "BLOCK_D": 128}),
    ),
    "row, 16, 256": (
        Config({"BLOCK_KEYS": 64, "BLOCK_D": 256}),
        Config({"BLOCK_KEYS": 128, "BLOCK_D": 256}, num_warps=8),
    ),
    "row, 16, 512": (Config({"BLOCK_KEYS": 64, "BLOCK_D": 128}),),
    "row, 32": (Config({"BLOCK_KEYS": 128, "BLOCK_D": 32}),),
    "row, 64": (Config({"BLOCK_KEYS": 64, "BLOCK_D": 32}),),
    "statistics, 16, 64": (
        Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 64, "BLOCK_D": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 128, "BLOCK_D": 64}, num_warps=8),
        Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "BLOCK_D": 64}, num_stages=3),
    ),
    "statistics, 16, 128": (
        Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 64, "BLOCK_D": 128}, num_warps=8, num_stages=3),
        Config({"BLOCK_ROWS": 128, "BLOCK_KEYS": 128, "BLOCK_D": 128}, num_warps=8),
        Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "BLOCK_D": 128}, num_stages=3),
    ),
    "statistics, 16, 256": (Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "BLOCK_D": 256}),),
    "statistics, 16, 512": (
        Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "BLOCK_D": 128}, num_warps=8),
    ),
    "statistics, 32": (Config({"BLOCK_ROWS": 64, "BLOCK_KEYS": 32, "BLOCK_D": 32}),),
    "statistics, 64": (Config({"BLOCK_ROWS": 32, "BLOCK_KEYS": 32, "BLOCK_D": 32}),),
    "mass, 16, 64": (
        Config({"BLOCK_KEYS": 128, "BLOCK_ROWS": 64, "BLOCK_D": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_KEYS": 128, "BLOCK_ROWS": 128, "BLOCK_D": 64}, num_warps=8),
        Config({"BLOCK_KEYS": 64, "BLOCK_ROWS": 64, "BLOCK_D": 64}, num_stages=3),
    ),
    "mass, 16, 128": (
        Config({"BLOCK_KEYS": 128, "BLOCK_ROWS": 64, "BLOCK_D": 128}, num_warps=8, num_stages=3),
        Config({"BLOCK_KEYS": 128, "BLOCK_ROWS": 128, "BLOCK_D": 128}, num_warps=8),
        Config({"BLOCK_KEYS": 64, "BLOCK_ROWS": 64, "BLOCK_D": 128}, num_stages=3),
    ),
    "mass, 16, 256": (Config({"BLOCK_KEYS": 64, "BLOCK_ROWS": 64, "BLOCK_D": 256}),),
    "mass, 16, 512": (Config({"BLOCK_KEYS": 64, "BLOCK_ROWS": 64, "BLOCK_D": 128}, num_warps=8),),
    "mass, 32": (Config({"BLOCK_KEYS": 64, "BLOCK_ROWS": 32, "BLOCK_D": 32}),),
    "mass, 32@sm_80": (Config({"BLOCK_KEYS": 32, "BLOCK_ROWS": 32, "BLOCK_D": 32}),),
    "mass, 64": (Config({"BLOCK_KEYS": 32, "BLOCK_ROWS": 32, "BLOCK_D": 32}),),
}


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
    (batch, heads, queries, _), (_, kv_heads, keys, _) = query.shape, key.shape
    if check.contents(query.device):
        check_index(query_index, queries)
    wide = check.accumulator(query.dtype)
    if 0 in (batch, queries, keys):
        return query.new_zeros(batch, keys, dtype=wide)
    query, key = rows(query), rows(key)
    key_mask = None if key_mask is None else key_mask.contiguous()
    window = None if window is None else min(window, keys)
    model = {
        "GROUP": heads // kv_heads,
        "SCALE": scale,  # compiled in: an argument would be float32 for float64 inputs too
        "SOFTCAP": softcap,
        "ACC": tl.float64 if wide == torch.float64 else tl.float32,
        "PRECISION": _precision(query),
    }
    if query_index is not None:
        return _one_row(query, key, query_index.contiguous(), key_mask, window, model)
    return _all_rows(query, key, key_mask, window, lse, model)


def _one_row(
    query: Tensor,
    key: Tensor,
    query_index: Tensor,
    key_mask: Tensor | None,
    window: int | None,
    model: dict[str, Any],
) -> Tensor:
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    wide = check.accumulator(query.dtype)
    mass = query.new_empty(batch, keys, dtype=wide)
    top, total = (query.new_empty(batch, heads, RUNS, dtype=wide) for _ in range(2))

    def scores(config: Config) -> tuple[Tensor, int]:
        run_tiles, runs, padded = _runs(keys, config)
        score = query.new_empty(batch, heads, padded, dtype=wide)
        kernels.row_scores_kernel[(runs, kv_heads, batch)](
            query, key, query_index, key_mask, score, top, total,
            *query.stride()[:3], *key.stride()[:3], queries, keys, dim, padded, window, run_tiles,
            BLOCK_GROUP=max(16, triton.next_power_of_2(model["GROUP"])), RUNS=RUNS,
            **model, **_blocks(config, dim),
        )  # fmt: skip
        return score, runs

    score, runs = scores(_chosen("row", query, scores))
    block_heads = triton.next_power_of_2(heads)
    block = max(16, ROW_TILE // block_heads)
    kernels.row_mass_kernel[(triton.cdiv(keys, block), batch)](
        score, top, total, query_index, mass, queries, keys, score.shape[2], runs,
        HEADS=heads, ACC=model["ACC"], RUNS=RUNS, BLOCK_HEADS=block_heads, BLOCK_KEYS=block,
    )  # fmt: skip
    return mass


def _all_rows(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    window: int | None,
    lse: Tensor | None,
    model: dict[str, Any],
) -> Tensor:
    (batch, _, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    wide = check.accumulator(query.dtype)
    entries = queries * model["GROUP"]
    strides = (*query.stride()[:3], *key.stride()[:3])
    top, inverse = lse, None
    if lse is None:
        top, inverse = (query.new_empty(batch, kv_heads, entries, dtype=wide) for _ in range(2))

        def statistics(config: Config) -> None:
            tiles = triton.cdiv(entries, config.blocks["BLOCK_ROWS"])
            kernels.statistics_kernel[(tiles, kv_heads, batch)](
                query, key, key_mask, top, inverse, *strides, queries, keys, dim, window,
                **model, **_blocks(config, dim),
            )  # fmt: skip

        statistics(_chosen("statistics", query, statistics))
    else:
        top = lse.contiguous()

    def masses(config: Config) -> tuple[Tensor, Tensor]:
        tiles, parts = _parts(batch, kv_heads, entries, keys, config)
        part_mass = query.new_empty(batch, parts, keys, dtype=wide)
        part_total = query.new_empty(batch, parts, tiles, dtype=wide)
        kernels.mass_kernel[(tiles, parts, batch)](
            query, key, key_mask, top, inverse, part_mass, part_total, *strides,
            queries, keys, dim, window, parts // kv_heads, **model, **_blocks(config, dim),
        )  # fmt: skip
        return part_mass, part_total

    part_mass, part_total = masses(_chosen("mass", query, masses))
    mass = query.new_empty(batch, keys, dtype=wide)
    parts, tiles = part_total.shape[1:]
    kernels.normalise_kernel[(triton.cdiv(keys, NORMALISE["BLOCK_KEYS"]), batch)](
        part_mass, part_total, mass, keys, parts, parts * tiles, ACC=model["ACC"], **NORMALISE
    )
    return mass


def _precision(x: Tensor) -> str:
    """How `tl.dot` multiplies float32: on NVIDIA's tensor cores three tf32 products make one."""
    nvidia = architecture(x.device).startswith("sm_")
    return "tf32x3" if x.dtype == torch.float32 and nvidia else "ieee"


def _chosen(kernel: str, query: Tensor, launch: Callable[[Config], object] | None) -> Config:
    bits = 8 * query.element_size()
    bucket = f"{kernel}, {bits}"
    if bits == 16:
        bucket += f", {min(512, max(64, triton.next_power_of_2(query.shape[3])))}"
    return chosen("attention_mass", CONFIGS, bucket, query.device, launch)


def _blocks(config: Config, dim: int) -> dict[str, int]:
    """The launch arguments, with no more columns in a tile than it takes for `dim`."""
    columns = min(config.blocks["BLOCK_D"], max(16, triton.next_power_of_2(dim)))
    whole = max(1, triton.cdiv(dim, columns)) * columns
    return {**config.launch(), "BLOCK_D": columns, "DIM": whole}


def _runs(keys: int, config: Config) -> tuple[int, int, int]:
    """(tiles of a run, runs, keys of all tiles)."""
    tiles = triton.cdiv(keys, config.blocks["BLOCK_KEYS"])
    run_tiles = triton.cdiv(tiles, RUNS)
    return run_tiles, triton.cdiv(tiles, run_tiles), tiles * config.blocks["BLOCK_KEYS"]


def _parts(batch: int, kv_heads: int, entries: int, keys: int, config: Config) -> tuple[int, int]:
    """(tiles of keys, partial masses of a sample)."""
    tiles = triton.cdiv(keys, config.blocks["BLOCK_KEYS"])
    wanted = triton.cdiv(PROGRAMS, batch * kv_heads * tiles)
    splits = max(1, min(wanted, entries // (LEAST_TILES * config.blocks["BLOCK_ROWS"])))
    return tiles, kv_heads * splits


def plan(
    query: Tensor,
    key: Tensor,
    *,
    query_index: Tensor | None = None,
    lse: Tensor | None = None,
    **options: Any,
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs)."""
    (batch, heads, queries, _), (_, kv_heads, keys, _) = query.shape, key.shape
    size = check.accumulator(query.dtype).itemsize
    if query_index is not None:
        config = _chosen("row", query, None)
        run_tiles, runs, padded = _runs(keys, config)
        run = run_tiles * config.blocks["BLOCK_KEYS"]
        numbers = batch * (keys + heads * (padded + 2 * RUNS))
        return f"{runs} runs of {run} keys, read once", numbers * size
    config = _chosen("mass", query, None)
    tiles, parts = _parts(batch, kv_heads, queries * heads // kv_heads, keys, config)
    numbers = batch * (keys + parts * (keys + tiles))
    numbers += 0 if lse is not None else 2 * batch * heads * queries
    return f"{tiles} tiles of keys, {parts} partial masses a sample", numbers * size
