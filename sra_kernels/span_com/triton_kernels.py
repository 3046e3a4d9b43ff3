"""The Triton kernels of span_com, and how they find the spans around a row. See triton.py.

Sums are in ACC, float32 or float64. A span that is out of range or out of order gets NaN, and no
row is read for it; so does one around a weight that is negative or not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(dim, BLOCK_D: tl.constexpr):
    """This program's block of rows and its first column; columns change fastest."""
    blocks = tl.maximum(tl.cdiv(dim, BLOCK_D), 1)
    program = tl.program_id(0)
    return program // blocks, program % blocks * BLOCK_D


@triton.jit
def _load_weights(weights, rows, known, ACC: tl.constexpr):
    """1 for a row where there are no weights; NaN for a weight that may not be."""
    w = tl.where(known, 1.0, 0.0).to(ACC)
    if weights is not None:
        w = tl.load(weights + rows.to(tl.int64), mask=known, other=0.0).to(ACC)
        w = tl.where((w >= 0) & (w < float("inf")), w, float("nan"))
    return w


@triton.jit
def _divisor(mass, length):
    """What weights are divided by, and whether rows count instead of weights: where there is no
    mass, and where there is one row, whose share is 1 whatever the rounding."""
    plain = (mass == 0) | ((length == 1) & (mass > 0))
    return tl.where(plain, tl.maximum(length, 1).to(mass.dtype), mass), plain


@triton.jit
def _shares(weights, rows, known, plain, divisor, COUNT: tl.constexpr, ACC: tl.constexpr):
    """weights[rows] / divisor, or where plain COUNT / divisor."""
    w = tl.where(known, COUNT, 0).to(ACC)
    if weights is not None:
        w = tl.where(plain, w, tl.load(weights + rows.to(tl.int64), mask=known, other=0.0))
    return (w / divisor)[:, None]


@triton.jit
def _load_spans(spans, index, known, tokens):
    """begin, end, and whether they may stand there; if not, both are 0, so that nothing is read."""
    at = spans + index.to(tl.int64) * 2
    begin = tl.load(at, mask=known, other=0)
    end = tl.load(at + 1, mask=known, other=0)
    good = (begin >= 0) & (begin <= end) & (end <= tokens)
    follows = known & (index > 0)
    good &= begin >= tl.load(at - 2, mask=follows, other=0)
    good &= end >= tl.load(at - 1, mask=follows, other=0)
    return tl.where(good, begin, 0).to(tl.int32), tl.where(good, end, 0).to(tl.int32), good


@triton.jit
def _count_up_to(column, count, limits, PROBES: tl.constexpr):
    """How many of the `count` entries of a sorted column of spans do not exceed each limit."""
    below = limits * 0
    size = count
    while size > 0:
        # Cut into PROBES pieces: those whose last entry is within the limit lie below.
        step = (size + PROBES - 1) // PROBES
        last = below[:, None] + (tl.arange(0, PROBES) + 1)[None, :] * step - 1
        known = last < count
        entries = tl.load(column + last.to(tl.int64) * 2, mask=known, other=0)
        below += step * tl.sum((known & (entries <= limits[:, None])).to(tl.int32), axis=1)
        size = step - 1
    return below


@triton.jit(do_not_specialize=["count"])
def chunks_kernel(
    hidden, spans, weights, means, masses, count, dim, stride,
    CHUNK: tl.constexpr, PROBES: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The mean and the mass of each chunk that lies within a span."""
    chunk, first_column = _tile(dim, BLOCK_D)
    begin = chunk * CHUNK
    rows = begin + tl.arange(0, CHUNK)
    # Of the spans that do not end before the chunk does, the first begins the earliest.
    limit = begin + CHUNK - 1 + tl.arange(0, 1)
    around = tl.max(_count_up_to(spans + 1, count, limit, PROBES), axis=0)
    if tl.load(spans + around.to(tl.int64) * 2, mask=around < count, other=begin + 1) <= begin:
        columns = first_column + tl.arange(0, BLOCK_D)
        known = rows >= begin
        mass = tl.sum(_load_weights(weights, rows, known, ACC), axis=0)
        divisor, plain = _divisor(mass, CHUNK)
        share = _shares(weights, rows, known, plain, divisor, 1, ACC)
        at = hidden + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        x = tl.load(at, mask=(columns < dim)[None, :], other=0.0).to(ACC)
        at = means + chunk.to(tl.int64) * dim + columns
        tl.store(at, tl.sum(share * x, axis=0), mask=columns < dim)
        if first_column == 0:
            tl.store(masses + chunk, mass)


@triton.jit(do_not_specialize=["tokens", "count"])
def spans_kernel(
    hidden, spans, weights, means, masses, com, mass_out, tokens, count, dim, stride,
    LEAST: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """com and mass of the spans of at least LEAST rows."""
    block, first_column = _tile(dim, BLOCK_D)
    columns = first_column + tl.arange(0, BLOCK_D)[None, :]
    index = block * BLOCK_S + tl.arange(0, BLOCK_S)
    begin, end, good = _load_spans(spans, index, index < count, tokens)
    length = end - begin
    wanted = (index < count) & (length >= LEAST)

    # A span is `head` rows, some chunks, and the rest of its `singles` rows behind them.
    first_chunk = (begin + CHUNK - 1) // CHUNK
    chunks = tl.where(wanted, tl.maximum(end // CHUNK - first_chunk, 0), 0)
    skipped = chunks * CHUNK
    singles = tl.where(wanted, length - skipped, 0)
    head = tl.where(chunks > 0, first_chunk * CHUNK - begin, singles)
    most_singles, most_chunks = tl.max(singles, axis=0), tl.max(chunks, axis=0)

    # 94 % of real spans are one row: the first is outside of the loop, and on its way already
    # while the mass is summed.
    first_row = begin + tl.where(head > 0, 0, skipped)
    offset = first_row.to(tl.int64)[:, None] * stride + columns
    first = tl.load(hidden + offset, mask=(singles > 0)[:, None] & (columns < dim), other=0.0)

    mass = length.to(ACC)
    if weights is not None:
        i = tl.arange(0, 2 * CHUNK)[None, :]
        rows = begin[:, None] + i + tl.where(i < head[:, None], 0, skipped[:, None])
        mass = tl.sum(_load_weights(weights, rows, i < singles[:, None], ACC), axis=1)
        for c in range(0, most_chunks, 2 * CHUNK):
            inside = c + i < chunks[:, None]
            more = tl.load(masses + first_chunk[:, None] + c + i, mask=inside, other=0.0)
            mass += tl.sum(more, axis=1)
    mass = tl.where(good, mass, float("nan"))
    if first_column == 0:
        tl.store(mass_out + index, mass, mask=wanted)
    divisor, plain = _divisor(mass, length)

    sums = first.to(ACC) * _shares(weights, first_row, singles > 0, plain, divisor, 1, ACC)
    for j in range(1, most_singles, UNROLL):
        for u in tl.static_range(UNROLL):
            row = begin + j + u + tl.where(j + u < head, 0, skipped)
            known = j + u < singles
            offset = row.to(tl.int64)[:, None] * stride + columns
            x = tl.load(hidden + offset, mask=known[:, None] & (columns < dim), other=0.0).to(ACC)
            sums += x * _shares(weights, row, known, plain, divisor, 1, ACC)
    for j in range(0, most_chunks):
        known = j < chunks
        offset = (first_chunk + j).to(tl.int64)[:, None] * dim + columns
        x = tl.load(means + offset, mask=known[:, None] & (columns < dim), other=0.0)
        sums += x * _shares(masses, first_chunk + j, known, plain, divisor, CHUNK, ACC)

    offset = index.to(tl.int64)[:, None] * dim + columns
    mask = wanted[:, None] & (columns < dim)
    tl.store(com + offset, sums.to(com.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "count"])
def cover_kernel(spans, cover, tokens, count, PROBES: tl.constexpr, BLOCK_T: tl.constexpr):
    """cover[t]: the first span around row t, and how many there are: those between the first that
    ends behind it and the first that begins behind it, because both columns are sorted."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = _count_up_to(spans + 1, count, row, PROBES)
    behind = _count_up_to(spans, count, row, PROBES)
    at = cover + row.to(tl.int64) * 2
    tl.store(at, first, mask=row < tokens)
    tl.store(at + 1, behind - first, mask=row < tokens)


@triton.jit
def _load_cover(cover, rows, tokens):
    at = cover + rows.to(tl.int64) * 2
    first = tl.load(at, mask=rows < tokens, other=0)
    return first, tl.load(at + 1, mask=rows < tokens, other=0)


@triton.jit
def _load_mass(mass, spans, index, known):
    """Of spans, and their number of rows."""
    at = spans + index.to(tl.int64) * 2
    length = tl.load(at + 1, mask=known, other=1) - tl.load(at, mask=known, other=0)
    return tl.load(mass + index, mask=known, other=1.0), length


@triton.jit(do_not_specialize=["tokens"])
def grad_hidden_kernel(
    grad_com, spans, weights, mass, cover, grad_hidden, tokens, dim, stride,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block, first_column = _tile(dim, BLOCK_D)
    columns = first_column + tl.arange(0, BLOCK_D)[None, :]
    row = block * BLOCK_T + tl.arange(0, BLOCK_T)
    first, around = _load_cover(cover, row, tokens)
    sums = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    for k in range(0, tl.max(around, axis=0)):
        index, known = first + k, k < around
        at = grad_com + index.to(tl.int64)[:, None] * stride + columns
        g = tl.load(at, mask=known[:, None] & (columns < dim), other=0.0).to(ACC)
        m, length = _load_mass(mass, spans, index, known)
        divisor, plain = _divisor(m, length)
        sums += g * _shares(weights, row, known, plain, divisor, 1, ACC)
    at = grad_hidden + row.to(tl.int64)[:, None] * dim + columns
    mask = (row < tokens)[:, None] & (columns < dim)
    tl.store(at, sums.to(grad_hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def grad_weights_kernel(
    grad_com, grad_mass, hidden, com, spans, mass, cover, grad_weights, tokens, dim, grad_stride,
    hidden_stride, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first, around = _load_cover(cover, row, tokens)
    sums = tl.zeros([BLOCK_T], ACC)
    for k in range(0, tl.max(around, axis=0)):
        index = first + k
        m, length = _load_mass(mass, spans, index, k < around)
        # The com of a lone row, and of a span without mass, does not depend on the weights.
        learns = (k < around) & (length > 1) & (m != 0)
        if tl.max(learns.to(tl.int32), axis=0) > 0:
            dots = tl.zeros([BLOCK_T, BLOCK_D], ACC)
            g_row = grad_com + index.to(tl.int64)[:, None] * grad_stride
            h_row = hidden + row.to(tl.int64)[:, None] * hidden_stride
            c_row = com + index.to(tl.int64)[:, None] * dim
            for d in range(0, dim, BLOCK_D):
                columns = d + tl.arange(0, BLOCK_D)[None, :]
                mask = learns[:, None] & (columns < dim)
                g = tl.load(g_row + columns, mask=mask, other=0.0).to(ACC)
                h = tl.load(h_row + columns, mask=mask, other=0.0).to(ACC)
                dots += g * (h - tl.load(c_row + columns, mask=mask, other=0.0))
            sums += tl.sum(dots, axis=1) / tl.where(learns, m, 1.0)
        sums += tl.load(grad_mass + index, mask=k < around, other=0.0)
    tl.store(grad_weights + row, sums, mask=row < tokens)
