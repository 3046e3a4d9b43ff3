"""span_kl's Triton kernel: one pair of rows, or one of its slices, in up to three sweeps.

The first sweep gives the largest finished logit of each side and the sum of exponentials below it
(kept apart: the rounding of one log-sum-exp would enter every probability); the second the value,
and for "forward" the gradient; for the other directions the third gives the gradient. Each walks
against the one before it, and so begins with what the cache still holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sra_kernels.span_kl.divergence_terms import FORWARD, log_ratio, term_and_slope
from sra_kernels.span_kl.row_sweeps import (
    BUCKET,
    LOWEST,
    WEIGHT,
    at_largest,
    exactly,
    relative,
    statistics,
    sweep,
    together,
)

# The whole row at once; or its slices, one launch for each sweep.
STAGES = WHOLE, STATISTICS, DIVERGENCE, RESULT = [tl.constexpr(i) for i in range(4)]

# Sums of a row that the backward gets; behind those of the C++ kernel, which stay zero.
FIRST_STAT = tl.constexpr(5)
STATS = tl.constexpr(16)
PARTIALS = tl.constexpr(16)  # sums of a slice
MOST_SLICES = tl.constexpr(32)


@triton.jit
def _store(to, s_top, s_sum, t_top, t_sum, s_rest_top, s_rest, t_rest_top, t_rest):
    tl.store(to, s_top)
    tl.store(to + 1, s_sum)
    tl.store(to + 2, t_top)
    tl.store(to + 3, t_sum)
    tl.store(to + 4, s_rest_top)
    tl.store(to + 5, s_rest)
    tl.store(to + 6, t_rest_top)
    tl.store(to + 7, t_rest)


@triton.jit
def _slices_together(partials, slices):
    """What statistics gives, of all slices of a row."""
    index = tl.arange(0, MOST_SLICES)
    there = index < slices
    at = partials + index * PARTIALS
    s_tops = tl.load(at, mask=there, other=LOWEST)
    mate = at_largest(s_tops, tl.load(at + 8, mask=there, other=0.0), MOST_SLICES)
    s_top, s_sum = together(s_tops, tl.load(at + 1, mask=there, other=0.0))
    t_top, t_sum = together(
        tl.load(at + 2, mask=there, other=LOWEST), tl.load(at + 3, mask=there, other=0.0)
    )
    s_rest_top, s_rest = together(
        tl.load(at + 4, mask=there, other=LOWEST), tl.load(at + 5, mask=there, other=0.0)
    )
    t_rest_top, t_rest = together(
        tl.load(at + 6, mask=there, other=LOWEST), tl.load(at + 7, mask=there, other=0.0)
    )
    return s_top, s_sum, t_top, t_sum, mate, s_rest_top, s_rest, t_rest_top, t_rest


@triton.jit
def _part(entries, slice_, slices, BLOCK: tl.constexpr):
    """Where a slice begins and ends, in whole blocks."""
    length = tl.cdiv(tl.cdiv(entries, BLOCK), slices) * BLOCK
    begin = slice_ * length  # a multiple of BLOCK, and so is said to be: loads are wide by that
    return begin, tl.maximum(begin, tl.minimum(begin + length, entries))


@triton.jit(do_not_specialize=["slices"])
def span_kl_kernel(
    student, teacher, grad, partner, shared, factors, kl, mass, stats, known, partials,
    student_stride, teacher_stride, grad_stride, student_entries, teacher_entries, slices,
    student_finish, teacher_finish, beta,
    STAGE: tl.constexpr, DIRECTION: tl.constexpr, OUTSIDE: tl.constexpr, REST: tl.constexpr,
    STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Fills kl, mass, stats and grad, those that are given; grad may be the student's logits.

    The grid is [rows, slices]. WHOLE sums over the whole row and writes its slice of the gradient:
    there may be several only where all that is asked for is a gradient, of rows that are `known`.
    """
    SLOPES: tl.constexpr = DIRECTION != FORWARD and not (grad is None and stats is None)
    BLOCK: tl.constexpr = LANES * WIDTH
    row = tl.program_id(0).to(tl.int64)
    slice_ = tl.program_id(1)
    student += row * student_stride
    teacher += row * teacher_stride
    if grad is not None:
        grad += row * grad_stride
    if stats is not None:
        stats += row * STATS
    if STAGE != WHOLE:
        partials += row * slices * PARTIALS
    student_finish = exactly(student_finish[0], ACC), exactly(student_finish[1], ACC)
    teacher_finish = exactly(teacher_finish[0], ACC), exactly(teacher_finish[1], ACC)
    beta = exactly(beta, ACC)

    factor = tl.full([], 1.0, ACC)
    if factors is not None:
        factor = tl.load(factors + row).to(ACC)
    alive = factor != 0
    # Whether the row has to be summed: not if it is left out, or known.
    unknown = alive if mass is None else alive | (factor == factor)
    if known is not None:
        known += row * STATS + FIRST_STAT
        unknown &= tl.load(known + 3) == 0

    # --- the first sweep ---
    begin, end = _part(student_entries, slice_, slices, BLOCK)
    first, last, rest_first, rest_last = 0, student_entries, 0, teacher_entries
    if STAGE != WHOLE:
        first, last = begin, end
        rest_first, rest_last = _part(teacher_entries, slice_, slices, BLOCK)
    if STAGE <= STATISTICS:
        s_top, s_sum, t_top, t_sum, mate, s_rest_top, s_rest, t_rest_top, t_rest = statistics(
            student, teacher, partner, shared, first, tl.where(unknown, last, first), rest_first,
            tl.where(unknown, rest_last, rest_first), student_finish, teacher_finish,
            OUTSIDE, REST, SLOPES, STUDENT_CAP, TEACHER_CAP, ACC, LANES, WIDTH, PADDED,
        )  # fmt: skip
    else:
        s_top, s_sum, t_top, t_sum, mate, s_rest_top, s_rest, t_rest_top, t_rest = _slices_together(
            partials, slices
        )
    if STAGE == STATISTICS:
        to = partials + slice_ * PARTIALS
        _store(to, s_top, s_sum, t_top, t_sum, s_rest_top, s_rest, t_rest_top, t_rest)
        tl.store(to + 8, mate)
        return
    if known is not None:
        s_top = tl.where(unknown, s_top, tl.load(known))
        s_sum = tl.where(unknown, s_sum, tl.load(known + 1))
        t_top = tl.where(unknown, t_top, tl.load(known + 2))
        t_sum = tl.where(unknown, t_sum, tl.load(known + 3))
        s_rest_top = tl.where(unknown, s_rest_top, tl.load(known + 4))
        s_rest = tl.where(unknown, s_rest, tl.load(known + 5))
        t_rest_top = tl.where(unknown, t_rest_top, tl.load(known + 6))
        t_rest = tl.where(unknown, t_rest, tl.load(known + 7))

    weight = factor
    inside = tl.full([], 1.0, ACC)  # the teacher's mass
    if REST:
        top = tl.maximum(t_top, t_rest_top)
        part = relative(t_top, t_sum, top)
        all_of_it = part + relative(t_rest_top, t_rest, top)
        inside = tl.where(all_of_it == 0, 0.0, part / all_of_it)
        if known is not None:
            inside = tl.where(unknown, inside, tl.load(known + 8))
        if OUTSIDE == WEIGHT:
            weight = factor * inside

    # What is known by now is stored now: the sweeps need the registers.
    if STAGE != DIVERGENCE and slice_ == 0:
        if mass is not None:
            tl.store(mass + row, inside)
        if stats is not None:
            others = tl.arange(0, 8)
            tl.store(stats + others, tl.zeros([8], ACC), mask=others < FIRST_STAT)
            to = stats + FIRST_STAT
            _store(to, s_top, s_sum, t_top, t_sum, s_rest_top, s_rest, t_rest_top, t_rest)
            tl.store(to + 8, inside)

    # With a bucket, everything outside is one more class.
    s_all_top, s_all, t_all_top, t_all = s_top, s_sum, t_top, t_sum
    if OUTSIDE == BUCKET:
        s_all_top, t_all_top = tl.maximum(s_top, s_rest_top), tl.maximum(t_top, t_rest_top)
        s_bucket = relative(s_rest_top, s_rest, s_all_top)
        t_bucket = relative(t_rest_top, t_rest, t_all_top)
        s_all = relative(s_top, s_sum, s_all_top) + s_bucket
        t_all = relative(t_top, t_sum, t_all_top) + t_bucket
        s_bucket, t_bucket = s_bucket / s_all, t_bucket / t_all
        r = log_ratio(
            s_rest_top - s_all_top + tl.log(s_rest), t_rest_top - t_all_top + tl.log(t_rest),
            DIRECTION,
        ) - (tl.log(s_all) - tl.log(t_all))  # fmt: skip
        bucket_term, bucket_slope = term_and_slope(s_bucket, t_bucket, r, beta, DIRECTION)
    alive &= t_all != 0  # or the teacher has nothing to teach

    # Slopes are taken from that of the student's likeliest class: where it holds nearly all the
    # mass, its own would cancel against the mean.
    centre = tl.full([], 0.0, ACC)
    if SLOPES:
        s, t = s_top - s_all_top, mate - t_all_top
        p = tl.exp(s) / s_all
        r = log_ratio(s, t, DIRECTION) - (tl.log(s_all) - tl.log(t_all))
        _, centre = term_and_slope(p, tl.exp(t) / t_all, r, beta, DIRECTION)
        if OUTSIDE == BUCKET:
            centre = tl.where(s_bucket > p, bucket_slope, centre)
        if known is not None:
            centre = tl.where(unknown, centre, tl.load(known + 9))

    # --- the second sweep ---
    rest_gradient = centre
    if OUTSIDE == BUCKET and DIRECTION == FORWARD:
        rest_gradient = tl.where(s_rest == 0, 0.0, bucket_slope / s_rest)
    scale = weight * student_finish[0]
    if STUDENT_CAP:
        scale *= student_finish[1]
    if DIRECTION == FORWARD:
        first, last = begin, end
    else:
        last = tl.where(unknown & alive, last, first)
    if STAGE == RESULT:
        index = tl.arange(0, MOST_SLICES)
        at = partials + index * PARTIALS + 9
        value = tl.sum(tl.load(at, mask=index < slices, other=0.0), 0)
        mean = tl.sum(tl.load(at + 1, mask=index < slices, other=0.0), 0)
    else:
        value, mean = sweep(
            student, teacher, partner, grad, first, last, alive, student_finish, teacher_finish,
            beta, s_all_top, s_all, t_all_top, t_all, centre, centre, s_rest_top, rest_gradient,
            scale,
            grad is not None and DIRECTION == FORWARD, DIRECTION, OUTSIDE, STUDENT_CAP,
            TEACHER_CAP, ACC, LANES, WIDTH, PADDED,
        )  # fmt: skip
    if STAGE == DIVERGENCE:
        to = partials + slice_ * PARTIALS + 9
        tl.store(to, value)
        tl.store(to + 1, mean)
        return
    if OUTSIDE == BUCKET:
        value += bucket_term
        mean += s_bucket * (bucket_slope - centre)
    if known is not None:
        mean = tl.where(unknown, mean, tl.load(known + 10))

    # --- the results, and the third sweep ---
    if slice_ == 0:
        if kl is not None:
            tl.store(kl + row, tl.where(alive, value * weight, 0.0))
        if stats is not None:
            tl.store(stats + FIRST_STAT + 9, centre)
            tl.store(stats + FIRST_STAT + 10, mean)
    if grad is not None and DIRECTION != FORWARD:
        if OUTSIDE == BUCKET:
            rest_gradient = s_bucket * ((bucket_slope - centre) - mean)
            rest_gradient = tl.where(s_rest == 0, 0.0, rest_gradient / s_rest)
        sweep(
            student, teacher, partner, grad, begin, end, alive, student_finish, teacher_finish,
            beta, s_all_top, s_all, t_all_top, t_all, centre, mean, s_rest_top, rest_gradient,
            scale,
            True, DIRECTION, OUTSIDE, STUDENT_CAP, TEACHER_CAP, ACC, LANES, WIDTH, PADDED,
        )  # fmt: skip
