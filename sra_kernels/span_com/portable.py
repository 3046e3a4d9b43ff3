"""span_com in torch operations, for any device.

On a CPU the rows of all spans are listed and added up in chunks. Elsewhere their number is not
known without making the host wait, so each chunk of spans is a dense [spans, N] matrix of shares
times the rows: more arithmetic, but deterministic, and no synchronisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sra_kernels import check

CHUNK_BYTES = 32 << 20


def span_com_forward(
    hidden: Tensor, spans: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    check.spans_content(spans, hidden.shape[0])
    check.weights_content(weights)
    wide = check.accumulator(hidden.dtype)
    mass = _mass(spans, weights, hidden.shape[0], wide)
    com = hidden.new_zeros(len(spans), hidden.shape[1], dtype=wide)
    if hidden.device.type == "cpu":
        rows, owners = _rows_of(spans)
        shares = _shares(rows, owners, spans, weights, mass)
        step = max(1, CHUNK_BYTES // max(1, hidden.shape[1] * wide.itemsize))
        for i in range(0, len(rows), step):
            part = hidden[rows[i : i + step]].to(wide).mul_(shares[i : i + step, None])
            com.index_add_(0, owners[i : i + step], part)
    else:
        used = _cover(spans, hidden.shape[0])
        known = torch.where(used[:, None], hidden, hidden.new_zeros(())).to(wide)
        for i, matrix in _share_matrices(spans, weights, mass, hidden.shape[0], wide):
            com[i : i + len(matrix)] = matrix @ known
    return com.to(hidden.dtype), mass


def span_com_backward(
    grad_com: Tensor,
    grad_mass: Tensor,
    spans: Tensor,
    weights: Tensor | None,
    mass: Tensor,
    hidden: Tensor | None,
    tokens: int,
    need_hidden: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    wide = mass.dtype
    on_cpu = grad_com.device.type == "cpu"
    grad = grad_com.to(wide)
    grad_hidden = grad.new_zeros((tokens, grad.shape[1]) if need_hidden else 0)
    grad_weights = grad.new_zeros(tokens if need_weights else 0)
    if on_cpu:
        rows, owners = _rows_of(spans)
        shares = _shares(rows, owners, spans, weights, mass)
        dots = grad.new_empty(len(rows) if need_weights else 0)
        step = max(1, CHUNK_BYTES // max(1, grad.shape[1] * wide.itemsize))
        for i in range(0, len(rows), step):
            row, owner = rows[i : i + step], owners[i : i + step]
            if need_hidden:
                grad_hidden.index_add_(0, row, grad[owner].mul_(shares[i : i + step, None]))
            if need_weights:
                assert hidden is not None
                dots[i : i + step] = hidden[row].to(wide).mul_(grad[owner]).sum(dim=1)
        if need_weights:
            # g·(h - com) = g·h - the mean of g·h over the span: the centre is not needed.
            centre = mass.new_zeros(len(spans)).index_add_(0, owners, shares * dots)
            slope = (dots - centre[owners]) / mass[owners]
            slope = torch.where(mass[owners] == 0, 0, slope) + grad_mass[owners]
            grad_weights.index_add_(0, rows, slope)
    else:
        for i, matrix in _share_matrices(spans, weights, mass, tokens, wide):
            part = slice(i, i + len(matrix))
            if need_hidden:
                grad_hidden.addmm_(matrix.T, grad[part])
            if need_weights:
                assert hidden is not None
                slope = grad[part] @ hidden.to(wide).T
                slope -= torch.where(matrix > 0, matrix * slope, 0).sum(dim=1, keepdim=True)
                slope = torch.where(mass[part, None] == 0, 0, slope / mass[part, None])
                inside = _inside(spans[part], tokens)
                grad_weights += torch.where(inside, slope + grad_mass[part, None], 0).sum(dim=0)
    return grad_hidden.to(grad_com.dtype), grad_weights


def plan(hidden: Tensor, spans: Tensor, weights: Tensor | None = None) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): com, mass, the gradient of hidden, in wide
    precision, and a chunk of rows."""
    wide = check.accumulator(hidden.dtype).itemsize
    rows = len(spans) + hidden.shape[0]
    row = hidden.shape[1] * wide
    step = max(1, min(hidden.shape[0], CHUNK_BYTES // max(1, row)))
    narrow = rows * hidden.shape[1] * hidden.element_size() * (hidden.element_size() < wide)
    peak = rows * row + narrow + 2 * step * row + wide * len(spans)
    return f"chunks of {step} rows", peak


def _mass(spans: Tensor, weights: Tensor | None, tokens: int, wide: torch.dtype) -> Tensor:
    if weights is None:
        return (spans[:, 1] - spans[:, 0]).to(wide)
    if spans.device.type == "cpu":
        rows, owners = _rows_of(spans)
        return weights.new_zeros(len(spans)).index_add_(0, owners, weights[rows])
    step = max(1, CHUNK_BYTES // max(1, tokens * wide.itemsize))
    parts = [torch.where(_inside(s, tokens), weights, 0).sum(dim=1) for s in spans.split(step)]
    return torch.cat(parts) if parts else weights.new_zeros(0)


def _rows_of(spans: Tensor) -> tuple[Tensor, Tensor]:
    """Every (row, span) pair, span by span."""
    lengths = spans[:, 1] - spans[:, 0]
    owners = torch.repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    rows = torch.arange(len(owners), device=spans.device) - (first - spans[:, 0])[owners]
    return rows, owners


def _shares(
    rows: Tensor, owners: Tensor, spans: Tensor, weights: Tensor | None, mass: Tensor
) -> Tensor:
    plain = 1 / (spans[:, 1] - spans[:, 0]).to(mass.dtype)
    if weights is None:
        return plain[owners]
    return torch.where(mass[owners] == 0, plain[owners], weights[rows] / mass[owners])


def _inside(spans: Tensor, tokens: int) -> Tensor:
    row = torch.arange(tokens, device=spans.device)
    return (row >= spans[:, :1]) & (row < spans[:, 1:])


def _cover(spans: Tensor, tokens: int) -> Tensor:
    """Which rows lie in a span: the spans over row t are [first that ends after t, first after)."""
    row = torch.arange(tokens, device=spans.device)
    begin, end = spans.to(row.dtype).unbind(dim=1)
    starts_before = torch.searchsorted(begin.contiguous(), row, right=True)
    return torch.searchsorted(end.contiguous(), row, right=True) < starts_before


def _share_matrices(
    spans: Tensor, weights: Tensor | None, mass: Tensor, tokens: int, wide: torch.dtype
) -> Any:
    step = max(1, CHUNK_BYTES // max(1, tokens * wide.itemsize))
    for i in range(0, len(spans), step):
        part, m = spans[i : i + step], mass[i : i + step, None]
        plain = 1 / (part[:, 1:] - part[:, :1]).to(wide)
        share = plain if weights is None else torch.where(m == 0, plain, weights / m)
        yield i, torch.where(_inside(part, tokens), share, 0)
