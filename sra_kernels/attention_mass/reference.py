"""Eager `attention_mass`, one query row at a time: what the tests and the "eager" benchmark use."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check


def attention_mass(
    query: Tensor,
    key: Tensor,
    query_index: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    softcap: float | None,
    window: int | None,
    lse: Tensor | None = None,
) -> Tensor:
    wide = check.accumulator(query.dtype)
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    query = query.detach().to(wide)
    key = key.detach().to(wide).repeat_interleave(heads // key.shape[1], dim=1)
    mass = query.new_zeros(batch, keys)
    for b in range(batch):
        real = [True] * keys if key_mask is None else key_mask[b].tolist()
        for row in range(queries) if query_index is None else [int(query_index[b])]:
            position = row + keys - queries
            if query_index is None and not real[position]:
                continue
            visible = [
                j
                for j in range(position + 1)
                if real[j] and (window is None or position - j < window)
            ]
            scores = scale * (key[b, :, visible] @ query[b, :, row, :, None]).squeeze(2)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            share = scores.softmax(1) if lse is None else (scores - lse[b, :, row, None]).exp()
            mass[b, visible] += share.sum(0)
        total = mass[b].sum()
        if total > 0:
            mass[b] /= total
    return mass
