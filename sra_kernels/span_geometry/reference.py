"""Eager `span_geometry`, one sample at a time: what the tests and the "eager" benchmark use."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check


def span_geometry(student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    wide = check.accumulator(student.dtype)
    losses = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        ours, theirs = student[begin:end].to(wide), teacher[begin:end].to(wide)
        w = weights[begin:end].to(wide)
        pairs = torch.outer(w, w).fill_diagonal_(0)
        total = pairs.sum()
        squares = (cosines(ours) - cosines(theirs)).square()
        losses.append((pairs * squares).sum() / torch.where(total == 0, 1, total))
    return torch.stack(losses) if losses else student.new_zeros(0, dtype=wide)


def cosines(x: Tensor) -> Tensor:
    """[S, S]; a zero vector has cosine 0 with everything, and no gradient."""
    square = x.square().sum(1, keepdim=True)
    unit = torch.where(square == 0, 0, x / torch.where(square == 0, 1, square).sqrt())
    return unit @ unit.T
