"""The kernels of tiles.py: the statistics of every span's compared logits, then its divergence.

A program has a tile of spans and a slice of the compared entries. It makes the logits of the slice
block by block, in registers, and they are gone when their block is summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sra_kernels.span_kl.divergence_terms import NOTHING, log_ratio, term_and_slope
from sra_kernels.span_kl.row_sweeps import LOWEST, absorb, exactly, finished, relative, together

STATISTICS = tl.constexpr(4)  # of a span and slice: (top, sum) of the student, of the teacher
TOGETHER = tl.constexpr(32)  # slices that are read at once


@triton.jit
def _logits(
    hidden, head, bias, ids, hidden_stride, head_stride, entries, dim, finish, row, column, live,
    REST: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SPANS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """[spans, entries] finished logits; REST where `live` is not. With an id out of range, NaN."""
    WIDE: tl.constexpr = tl.float64 if head.dtype.element_ty == tl.float64 else tl.float32
    entry = column
    if ids is not None:
        entry = tl.load(ids + column, mask=live, other=0)
    good = live & (entry >= 0) & (entry < entries)
    # What is nowhere reads row 0: a mask of the head's rows would be one in the innermost loop.
    entry = tl.where(good, entry, 0).to(tl.int64)
    factor = tl.where(tl.max((live & (good == 0)).to(tl.int32), 0) == 0, finish[0], float("nan"))
    hidden += row[:, None] * hidden_stride
    head += entry[:, None] * head_stride
    z = tl.zeros([BLOCK_SPANS, BLOCK_ENTRIES], WIDE)
    for start in range(0, dim, BLOCK_DIM):
        at = (start + tl.arange(0, BLOCK_DIM))[None, :]
        x = tl.load(hidden + at, mask=at < dim, other=0.0)
        w = tl.load(head + at, mask=at < dim, other=0.0)
        z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION, out_dtype=WIDE)
    z = z.to(ACC)
    if bias is not None:
        z += tl.load(bias + column, mask=live, other=0.0).to(ACC)[None, :]
    return tl.where(live[None, :], finished(z, (factor, finish[1]), CAP), REST)


@triton.jit
def _all_slices(statistics, slices, BLOCK_SPANS: tl.constexpr, ACC: tl.constexpr):
    """(top, sum) of each span; `statistics` points to those of its first slice."""
    top = tl.full([BLOCK_SPANS], LOWEST, ACC)
    total = tl.zeros([BLOCK_SPANS], ACC)
    for first in range(0, slices, TOGETHER):
        slice_ = first + tl.arange(0, TOGETHER)[:, None]
        at = statistics[None, :] + slice_ * STATISTICS
        tops = tl.load(at, mask=slice_ < slices, other=LOWEST)
        more_top, more = together(tops, tl.load(at + 1, mask=slice_ < slices, other=0.0))
        higher = tl.maximum(top, more_top)
        total = relative(top, total, higher) + relative(more_top, more, higher)
        top = higher
    return top, total


@triton.jit
def _place(spans, slices, length, shared, BLOCK_SPANS: tl.constexpr):
    """The program's spans (the last one again where there are no more), whether they are there, its
    slice, and where this begins and ends.

    Programs with the same spans are neighbours: those at work at once then have few spans and few
    entries, which the cache holds.
    """
    program = tl.program_id(0)
    row = program // slices * BLOCK_SPANS + tl.arange(0, BLOCK_SPANS)
    slice_ = program % slices
    begin = slice_ * length
    within = row < spans
    row = tl.minimum(row, spans - 1).to(tl.int64)
    return row, within, slice_, begin, tl.minimum(begin + length, shared)


@triton.jit(do_not_specialize=["spans", "slices", "length"])
def tile_statistics_kernel(
    student, student_head, student_bias, student_ids, teacher, teacher_head, teacher_bias,
    teacher_ids, statistics,
    student_stride, student_head_stride, student_entries, student_dim, student_finish,
    teacher_stride, teacher_head_stride, teacher_entries, teacher_dim, teacher_finish,
    spans, shared, slices, length,
    STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_SPANS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    row, within, slice_, begin, end = _place(spans, slices, length, shared, BLOCK_SPANS)
    student_finish = exactly(student_finish[0], ACC), exactly(student_finish[1], ACC)
    teacher_finish = exactly(teacher_finish[0], ACC), exactly(teacher_finish[1], ACC)
    s_top = tl.full([BLOCK_SPANS], LOWEST, ACC)
    s_sum = tl.zeros([BLOCK_SPANS], ACC)
    t_top, t_sum = s_top, s_sum
    for start in range(begin, end, BLOCK_ENTRIES):
        column = start + tl.arange(0, BLOCK_ENTRIES)
        live = column < end
        z = _logits(
            student, student_head, student_bias, student_ids, student_stride, student_head_stride,
            student_entries, student_dim, student_finish, row, column, live, float("-inf"),
            STUDENT_CAP, ACC, PRECISION, BLOCK_SPANS, BLOCK_ENTRIES, BLOCK_DIM,
        )  # fmt: skip
        s_top, s_sum = absorb(s_top, s_sum, z)
        z = _logits(
            teacher, teacher_head, teacher_bias, teacher_ids, teacher_stride, teacher_head_stride,
            teacher_entries, teacher_dim, teacher_finish, row, column, live, float("-inf"),
            TEACHER_CAP, ACC, PRECISION, BLOCK_SPANS, BLOCK_ENTRIES, BLOCK_DIM,
        )  # fmt: skip
        t_top, t_sum = absorb(t_top, t_sum, z)
    to = statistics + (row * slices + slice_) * STATISTICS
    tl.store(to, s_top, mask=within)
    tl.store(to + 1, s_sum, mask=within)
    tl.store(to + 2, t_top, mask=within)
    tl.store(to + 3, t_sum, mask=within)


@triton.jit(do_not_specialize=["spans", "slices", "length"])
def tile_divergence_kernel(
    student, student_head, student_bias, student_ids, teacher, teacher_head, teacher_bias,
    teacher_ids, statistics, weights, kl,
    student_stride, student_head_stride, student_entries, student_dim, student_finish,
    teacher_stride, teacher_head_stride, teacher_entries, teacher_dim, teacher_finish,
    spans, shared, slices, length, beta,
    DIRECTION: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_SPANS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """kl [spans, slices]: each slice's part of a span's weighted divergence."""
    row, within, slice_, begin, end = _place(spans, slices, length, shared, BLOCK_SPANS)
    student_finish = exactly(student_finish[0], ACC), exactly(student_finish[1], ACC)
    teacher_finish = exactly(teacher_finish[0], ACC), exactly(teacher_finish[1], ACC)
    beta = exactly(beta, ACC)
    statistics += row * slices * STATISTICS
    s_top, s_sum = _all_slices(statistics, slices, BLOCK_SPANS, ACC)
    t_top, t_sum = _all_slices(statistics + 2, slices, BLOCK_SPANS, ACC)
    s_share, t_share = 1.0 / s_sum, 1.0 / t_sum
    log_sums = tl.log(s_sum) - tl.log(t_sum)
    value = tl.zeros([BLOCK_SPANS], ACC)
    for start in range(begin, end, BLOCK_ENTRIES):
        column = start + tl.arange(0, BLOCK_ENTRIES)
        live = column < end
        s = _logits(
            student, student_head, student_bias, student_ids, student_stride, student_head_stride,
            student_entries, student_dim, student_finish, row, column, live, NOTHING,
            STUDENT_CAP, ACC, PRECISION, BLOCK_SPANS, BLOCK_ENTRIES, BLOCK_DIM,
        ) - s_top[:, None]  # fmt: skip
        t = _logits(
            teacher, teacher_head, teacher_bias, teacher_ids, teacher_stride, teacher_head_stride,
            teacher_entries, teacher_dim, teacher_finish, row, column, live, NOTHING,
            TEACHER_CAP, ACC, PRECISION, BLOCK_SPANS, BLOCK_ENTRIES, BLOCK_DIM,
        ) - t_top[:, None]  # fmt: skip
        p_s, p_t = tl.exp(s) * s_share[:, None], tl.exp(t) * t_share[:, None]
        r = log_ratio(s, t, DIRECTION) - log_sums[:, None]
        term, _ = term_and_slope(p_s, p_t, r, beta, DIRECTION)
        value += tl.sum(term, 1)
    weight = tl.full([BLOCK_SPANS], 1.0, ACC)
    if weights is not None:
        weight = tl.load(weights + row).to(ACC)
        weight = tl.where((weight >= 0) & (weight < float("inf")), weight, float("nan"))
    left_out = (weight == 0) | (t_sum == 0)  # or the teacher has nothing to teach
    tl.store(kl + row * slices + slice_, tl.where(left_out, 0.0, value * weight), mask=within)
