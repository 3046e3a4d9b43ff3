"""`attention_mass` in torch operations: a few samples and query rows at a time.

The queries that share a key head are stacked, so keys are never repeated; a chunk reads only the
keys that its rows can see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sra_kernels import check

CHUNK_BYTES = 32 << 20  # the scores of a chunk, and as much again for its keys in wide precision


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
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    check_index(query_index, queries)
    wide = check.accumulator(query.dtype)
    mass = query.new_zeros(batch, keys, dtype=wide)
    behind = keys - queries  # the position of query row 0
    if query_index is not None:
        at = query_index[:, None, None, None].expand(batch, heads, 1, dim)
        query = query.gather(2, at)
    samples, step = chunk(batch, heads, query.shape[2], key.shape[1], keys, dim, wide.itemsize)
    for b in range(0, batch, samples):
        part = slice(b, b + samples)
        real = None if key_mask is None else key_mask[part]
        if query_index is not None:
            position = query_index[part, None] + behind
            mass[part] = rows_mass(
                query[part], key[part], position, 0, scale, real, softcap, window, None, None
            )
            continue
        for row in range(0, queries, step):
            end = min(row + step, queries)
            begin = 0 if window is None else max(0, row + behind - window + 1)
            seen = slice(begin, end + behind)
            position = torch.arange(row + behind, end + behind, device=query.device)[None]
            own = None if real is None else real[:, row + behind : end + behind]
            mass[part, seen] += rows_mass(
                query[part, :, row:end], key[part, :, seen], position, begin, scale,
                None if real is None else real[:, seen], softcap, window, own,
                None if lse is None else lse[part, :, row:end],
            )  # fmt: skip
    total = mass.sum(1, keepdim=True)
    return mass.div_(total.masked_fill_(total == 0, 1))


def rows_mass(
    query: Tensor,
    key: Tensor,
    position: Tensor,
    first_key: int,
    scale: float,
    key_mask: Tensor | None,
    softcap: float | None,
    window: int | None,
    used: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """Softmax rows summed over heads and query rows, [b, T].

    `position` [b or 1, R] is each row's own key; rows that are not `used` [b, R] give nothing.
    `lse` [b, heads, R] is the log-sum-exp of each row, where it is known.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    wide = check.accumulator(query.dtype)
    stacked = query.reshape(batch, kv_heads, heads // kv_heads * rows, dim).to(wide).mul(scale)
    scores = (stacked @ key.to(wide).transpose(2, 3)).view(batch, heads, rows, keys)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    column = torch.arange(first_key, first_key + keys, device=key.device)
    visible = column <= position[:, :, None]
    if window is not None:
        visible &= column > position[:, :, None] - window
    if key_mask is not None:
        visible = visible & key_mask[:, None]
    if used is not None:
        visible = visible & used[:, :, None]
    # After every transform: a masked key may hold anything, NaN included.
    scores.masked_fill_(~visible[:, None], -torch.inf)
    if lse is not None:
        # Rows that give nothing may hold anything.
        empty = lse == -torch.inf if used is None else (lse == -torch.inf) | ~used[:, None]
        return scores.sub_(lse.masked_fill(empty, torch.inf)[..., None]).exp_().sum((1, 2))
    top = scores.amax(3, keepdim=True)
    share = scores.sub_(top.masked_fill_(top == -torch.inf, 0)).exp_()
    total = share.sum(3, keepdim=True)
    return share.div_(total.masked_fill_(total == 0, 1)).sum((1, 2))


def plan(
    query: Tensor, key: Tensor, *, query_index: Tensor | None = None, **options: Any
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): the result, the scores, the chunk's keys."""
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    rows = queries if query_index is None else 1
    size = check.accumulator(query.dtype).itemsize
    samples, step = chunk(batch, heads, rows, kv_heads, keys, dim, size)
    scores = samples * heads * step * keys * size
    wider = samples * kv_heads * keys * dim * size * (key.element_size() != size)
    return (
        f"chunks of {samples} samples by {step} query rows",
        2 * batch * keys * size + 2 * scores + wider,
    )


def chunk(
    batch: int, heads: int, rows: int, kv_heads: int, keys: int, dim: int, size: int
) -> tuple[int, int]:
    """(samples, query rows) of a chunk, at least one of each."""
    sample = max(heads, kv_heads * dim) * max(keys, 1) * size
    samples = max(1, min(batch, CHUNK_BYTES // sample))
    return samples, max(1, min(rows, CHUNK_BYTES // (samples * heads * max(keys, 1) * size)))


def check_index(query_index: Tensor | None, queries: int) -> None:
    if query_index is None or query_index.numel() == 0:
        return
    good = (query_index >= 0) & (query_index < queries)
    rule = f"query_index must lie in 0..{queries - 1}, the rows of query"
    if query_index.device.type != "cpu":
        torch._assert_async(good.all(), rule)
    elif not good.all():
        i = int((~good).nonzero()[0, 0])
        raise ValueError(
            f"query_index[{i}] = {int(query_index[i])}: {rule}. It counts rows of that tensor, "
            "padding included, from 0."
        )
