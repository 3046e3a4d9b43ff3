"""The sweeps of span_kl's Triton kernel over a row pair's entries.

A tile is [LANES, WIDTH], and each lane keeps its own sums: lanes meet once, at the end of a sweep.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sra_kernels.span_kl.divergence_terms import FORWARD, NOTHING, log_ratio, tanh, term_and_slope

RENORMALISE, WEIGHT, BUCKET = [tl.constexpr(i) for i in range(3)]

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the top of nothing; finite, so that -inf - it is


@triton.jit
def exactly(pair, ACC: tl.constexpr):
    """A number that came as two float32, which is as Triton passes floats."""
    return tl.full([], pair[0], ACC) + tl.full([], pair[1], ACC)


@triton.jit
def finished(z, finish, CAP: tl.constexpr):
    """softcap(scale z) / temperature"""
    if CAP:
        u = finish[0] * tanh(finish[1] * z)
    else:
        u = finish[0] * z
    return u


@triton.jit
def _columns(LANES: tl.constexpr, WIDTH: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _until(end, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Where memory may be touched until: whole accesses, of rows that have room for the last."""
    if PADDED:
        end = (end + (WIDTH - 1)) // WIDTH * WIDTH
    return end


@triton.jit
def _load(
    student, teacher, partner, column, live, there, student_finish, teacher_finish,
    STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The student's finished logits, the teacher's that go with them, and where there is one. What
    is `there` to be read but not `live` may be anything; in the table it is no partner."""
    if partner is None:
        inside = live
        t = tl.load(teacher + column, mask=there, other=0.0).to(ACC)
    else:
        pair = tl.load(partner + column, mask=there, other=-1)
        inside = pair >= 0
        t = tl.load(teacher + pair, mask=inside, other=0.0).to(ACC)
    s = tl.load(student + column, mask=there, other=0.0).to(ACC)
    s = finished(s, student_finish, STUDENT_CAP)
    return s, finished(t, teacher_finish, TEACHER_CAP), inside


@triton.jit
def absorb(top, total, x):
    """One more tile in each row's largest number and its sum of exp(x - largest)."""
    higher = tl.maximum(top, tl.max(x, 1))
    total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
    return higher, total


@triton.jit
def relative(top, total, to):
    """A sum of exponentials below `to` instead of its own top."""
    return tl.where(total == 0, 0.0, total * tl.exp(top - to))


@triton.jit
def together(tops, totals):
    top = tl.max(tops, 0)
    return top, tl.sum(relative(tops, totals, top), 0)


@triton.jit
def at_largest(tops, values, INDEX: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, INDEX) == tl.argmax(tops, 0), values, 0.0), 0)


@triton.jit
def statistics(
    student, teacher, partner, shared, begin, end, rest_begin, rest_end,
    student_finish, teacher_finish,
    OUTSIDE: tl.constexpr, REST: tl.constexpr, SLOPES: tl.constexpr, STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """(top, sum) of the student's and the teacher's compared entries, the teacher's logit that goes
    with the student's top, (top, sum) of the student's and the teacher's other entries."""
    s_top = tl.full([LANES], LOWEST, ACC)
    t_top, s_rest_top, t_rest_top = s_top, s_top, s_top
    s_sum = tl.zeros([LANES], ACC)
    t_sum, mate, s_rest, t_rest = s_sum, s_sum, s_sum, s_sum
    for start in range(begin, end, LANES * WIDTH):
        column = start + _columns(LANES, WIDTH)
        live = column < end
        there = column < _until(end, PADDED, WIDTH)
        s, t, inside = _load(
            student, teacher, partner, column, live, there, student_finish, teacher_finish,
            STUDENT_CAP, TEACHER_CAP, ACC,
        )  # fmt: skip
        if OUTSIDE == BUCKET:
            other = tl.where(live & (inside == 0), s, float("-inf"))
            s_rest_top, s_rest = absorb(s_rest_top, s_rest, other)
        s = tl.where(inside, s, float("-inf"))
        t = tl.where(inside, t, float("-inf"))
        if SLOPES:
            here = tl.max(s, 1)
            with_it = tl.max(tl.where(s == here[:, None], t, LOWEST), 1)
            mate = tl.where(here > s_top, with_it, mate)
        s_top, s_sum = absorb(s_top, s_sum, s)
        t_top, t_sum = absorb(t_top, t_sum, t)
    if REST:
        for start in range(rest_begin, rest_end, LANES * WIDTH):
            column = start + _columns(LANES, WIDTH)
            other = column < rest_end
            other &= tl.load(shared + column, mask=other, other=1) == 0
            t = tl.load(teacher + column, mask=other, other=0.0).to(ACC)
            t = finished(t, teacher_finish, TEACHER_CAP)
            t_rest_top, t_rest = absorb(t_rest_top, t_rest, tl.where(other, t, float("-inf")))
    mate = at_largest(s_top, mate, LANES)
    s_top, s_sum = together(s_top, s_sum)
    t_top, t_sum = together(t_top, t_sum)
    s_rest_top, s_rest = together(s_rest_top, s_rest)
    t_rest_top, t_rest = together(t_rest_top, t_rest)
    return s_top, s_sum, t_top, t_sum, mate, s_rest_top, s_rest, t_rest_top, t_rest


@triton.jit
def sweep(
    student, teacher, partner, grad, begin, end, alive, student_finish, teacher_finish, beta,
    s_top, s_sum, t_top, t_sum, centre, mean, s_rest_top, rest_gradient, factor,
    GRAD: tl.constexpr, DIRECTION: tl.constexpr, OUTSIDE: tl.constexpr, STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Σ of the terms and Σ p_s (slope - centre) over the compared entries; with GRAD, writes the
    gradient of all entries."""
    value = tl.zeros([LANES], ACC)
    slopes = tl.zeros([LANES], ACC)
    s_share, t_share = 1.0 / s_sum, 1.0 / t_sum
    log_sums = tl.log(s_sum) - tl.log(t_sum)
    read_end = tl.where(alive, end, begin)
    blocks = tl.cdiv(end - begin, LANES * WIDTH)
    for block in range(blocks):
        if GRAD and DIRECTION != FORWARD:
            start = begin + block * (LANES * WIDTH)
        else:
            start = begin + (blocks - 1 - block) * (LANES * WIDTH)
        column = start + _columns(LANES, WIDTH)
        within = column < _until(end, PADDED, WIDTH)
        live = column < read_end
        there = column < _until(read_end, PADDED, WIDTH)
        u, t, inside = _load(
            student, teacher, partner, column, live, there, student_finish, teacher_finish,
            STUDENT_CAP, TEACHER_CAP, ACC,
        )  # fmt: skip
        s = tl.where(inside, u, NOTHING) - s_top
        t = tl.where(inside, t, NOTHING) - t_top
        p_s, p_t = tl.exp(s) * s_share, tl.exp(t) * t_share
        r = log_ratio(s, t, DIRECTION) - log_sums
        term, slope = term_and_slope(p_s, p_t, r, beta, DIRECTION)
        value += tl.sum(tl.where(inside, term, 0.0), 1)
        if DIRECTION != FORWARD:
            from_centre = slope - centre
            slopes += tl.sum(tl.where(inside, p_s * from_centre, 0.0), 1)
            slope = p_s * (from_centre - mean)
        if GRAD:
            if OUTSIDE == BUCKET:
                slope = tl.where(inside, slope, tl.exp(u - s_rest_top) * rest_gradient)
                g = tl.where(live, slope, 0.0)
            else:
                g = tl.where(inside, slope, 0.0)
            if STUDENT_CAP:
                y = u / student_finish[0]
                g = g * (1.0 - y * y)
            tl.store(grad + column, (g * factor).to(grad.dtype.element_ty), mask=within)
    return tl.sum(value, 0), tl.sum(slopes, 0)
