"""span_com, one span at a time: what the tests and the "eager" benchmark compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check


def span_com(hidden: Tensor, spans: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = check.accumulator(hidden.dtype)
    coms, masses = [], []
    for begin, end in spans.tolist():
        rows = hidden[begin:end].to(wide)
        w = rows.new_ones(end - begin) if weights is None else weights[begin:end].to(wide)
        mass = w.sum()
        if begin == end:
            com = rows.sum(dim=0)
        elif mass == 0:
            com = rows.mean(dim=0)
        else:
            com = (w[:, None] * rows).sum(dim=0) / mass
        coms.append(com)
        masses.append(mass)
    if not coms:
        none = hidden.new_zeros(0, dtype=wide) if weights is None else weights[:0].to(wide)
        return hidden[:0], none
    return torch.stack(coms).to(hidden.dtype), torch.stack(masses)
