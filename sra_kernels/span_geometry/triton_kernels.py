"""The kernels of triton.py: lengths, whole samples in registers, tiles of larger samples.

Cosines are products of rows brought near 1 by a power of two, times both inverse lengths: the
products of 16-bit inputs stay exact in tf32, and no square leaves the range. Compiled without
contraction to fused multiply-adds, so that two equal sides give equal cosines and an error of 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

SEARCH = tl.constexpr(256)  # offsets looked at together
WIDTH = tl.constexpr(128)  # a row of weighed errors is a multiple of this long
WEIGHTS = tl.constexpr(1024)  # weights of a large sample summed together


@triton.jit
def towards_one(largest):
    """The power of two that brings `largest` near 1, from its exponent."""
    if largest.dtype == tl.float64:
        exponent = largest.to(tl.int64, bitcast=True) >> 52
        power = tl.maximum(2046 - exponent, 1) << 52
    else:
        exponent = largest.to(tl.int32, bitcast=True) >> 23
        power = tl.maximum(254 - exponent, 1) << 23
    return power.to(largest.dtype, bitcast=True)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x), and 0 for 0. In float32 the plain operators are approximations."""
    safe = tl.where(x == 0, 1, x)
    if x.dtype == tl.float64:
        inverse = 1 / tl.sqrt(safe)
    else:
        inverse = tl.div_rn(tl.full(x.shape, 1, x.dtype), tl.sqrt_rn(safe))
    return tl.where(x == 0, 0, inverse)


@triton.jit
def scaled(x, stride, dim, rows, scale, columns):
    """A piece of some rows, in the type of `scale`; a row of scale 0 is not read."""
    mask = (scale != 0)[:, None] & (columns < dim)[None, :]
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=mask, other=0.0).to(scale.dtype) * scale[:, None]


@triton.jit
def measure(x, stride, dim, rows, weighs, inside, lengths, spans, BD: tl.constexpr):
    largest = tl.zeros_like(weighs)
    for start in range(0, dim, BD):
        part = scaled(x, stride, dim, rows, weighs, start + tl.arange(0, BD))
        largest = tl.maximum(largest, tl.max(tl.abs(part), 1))
    scale = towards_one(largest) * weighs
    square = tl.zeros_like(weighs)
    for start in range(0, dim, BD):
        part = scaled(x, stride, dim, rows, scale, start + tl.arange(0, BD))
        square += tl.sum(part * part, 1)
    tl.store(lengths + rows, tl.where(square == 0, 0, scale), mask=inside)
    tl.store(lengths + spans + rows, inverse_root(square), mask=inside)


@triton.jit(do_not_specialize=["spans"])
def lengths_kernel(
    student, teacher, weights,
    lengths,  # [4, spans]: scale and inverse length of the scaled row, student's and teacher's
    spans, student_dim, teacher_dim, student_stride, teacher_stride,
    ACC: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BS + tl.arange(0, BS)
    inside = rows < spans
    # A weight of 0 stays 0, anything else is 1: what has no weight may hold anything.
    weighs = (tl.load(weights + rows, mask=inside, other=0.0) != 0).to(ACC)
    if tl.program_id(1) == 0:
        measure(student, student_stride, student_dim, rows, weighs, inside, lengths, spans, BD)
    else:
        theirs = lengths + 2 * spans
        measure(teacher, teacher_stride, teacher_dim, rows, weighs, inside, theirs, spans, BD)


@triton.jit
def load_weights(weights, rows, inside):
    """NaN for what is no weight, so that the loss of its sample shows it."""
    w = tl.load(weights + rows, mask=inside, other=0.0)
    return tl.where((w >= 0) & (w < float("inf")), w, float("nan"))


@triton.jit
def add_weights(w, largest, rest, squares, peaks):
    """Adds ratios below 1 to `rest`, their squares to `squares`, counts those equal to 1."""
    peak = (w == largest) & (w > 0)
    ratio = tl.where(peak, 0, w / tl.where(largest > 0, largest, 1))
    peaks += tl.sum(peak.to(tl.int32), 0)
    return rest + tl.sum(ratio, 0), squares + tl.sum(ratio * ratio, 0), peaks


@triton.jit
def pair_share(rest, squares, peaks, ACC: tl.constexpr, TINY: tl.constexpr):
    """1 / (sum of w_i w_j over i != j), or 0 where no pair has weight.

    One weight of 1 is set apart: 2 rest + (rest^2 - squares) then loses no digits, because the
    difference is small only beside the first term.
    """
    more = tl.maximum(peaks - 1, 0).to(ACC)
    rest += more
    squares += more
    total = 2 * rest + (rest * rest - squares)
    nothing = total < TINY
    return tl.where(nothing, 0, 1 / tl.where(nothing, 1, total))


@triton.jit
def gram(
    x, stride, dim, rows, scale, columns, column_scale,
    SAME: tl.constexpr, PRECISION: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = scale.dtype
    product = tl.zeros((rows.shape[0], columns.shape[0]), ACC)
    for start in range(0, dim, BD):
        d = start + tl.arange(0, BD)
        left = scaled(x, stride, dim, rows, scale, d)
        right = left if SAME else scaled(x, stride, dim, columns, column_scale, d)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION, out_dtype=ACC)
    return product


@triton.jit
def cosines(
    x, stride, dim, lengths, spans, rows, columns, end,
    SAME: tl.constexpr, PRECISION: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    scale = tl.load(lengths + rows, mask=rows < end, other=0.0)
    column_scale = tl.load(lengths + columns, mask=columns < end, other=0.0)
    product = gram(x, stride, dim, rows, scale, columns, column_scale, SAME, PRECISION, BD)
    inverse = tl.load(lengths + spans + rows, mask=rows < end, other=0.0)
    column_inverse = tl.load(lengths + spans + columns, mask=columns < end, other=0.0)
    return product * inverse[:, None] * column_inverse[None, :]


@triton.jit
def whole_sample(
    student, teacher, weights, lengths, loss, grad, sample, begin, end, spans,
    student_dim, teacher_dim, student_stride, teacher_stride,
    NEED_GRAD: tl.constexpr, ACC: tl.constexpr, TINY: tl.constexpr, STUDENT: tl.constexpr,
    TEACHER: tl.constexpr, PULL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, BN)
    rows = begin + index
    inside = rows < end
    w = load_weights(weights, rows, inside)
    largest = tl.max(w, 0)
    rest, squares, peaks = add_weights(w, largest, 0.0, 0.0, 0)
    share = pair_share(rest, squares, peaks, ACC, TINY)
    w = w / tl.where(largest > 0, largest, 1)

    cosine = cosines(
        student, student_stride, student_dim, lengths, spans, rows, rows, end, True, STUDENT, BD
    )
    theirs = cosines(
        teacher, teacher_stride, teacher_dim, lengths + 2 * spans, spans, rows, rows, end,
        True, TEACHER, BD,
    )  # fmt: skip
    diagonal = index[:, None] == index[None, :]
    error = tl.where(diagonal, 0, cosine - theirs)
    pull = error * w[None, :]
    tl.store(loss + sample, tl.sum(tl.sum(pull * error, 1) * w, 0) * share)
    if NEED_GRAD:
        # Along the sphere: sum_j pull_ij (u_j - cos_ij u_i), the second part on the diagonal.
        radial = tl.sum(pull * cosine, 1)
        scale = tl.load(lengths + rows, mask=inside, other=0.0)
        inverse = tl.load(lengths + spans + rows, mask=inside, other=0.0)
        pull = tl.where(diagonal, -radial[:, None], pull) * inverse[None, :]
        factor = 4 * w * inverse * scale
        for start in range(0, student_dim, BD):
            d = start + tl.arange(0, BD)
            x = scaled(student, student_stride, student_dim, rows, scale, d)
            along = tl.dot(pull, x, input_precision=PULL, out_dtype=ACC)
            along = tl.where(share == 0, 0, along * factor[:, None] * share)
            at = grad + rows.to(tl.int64)[:, None] * student_dim + d[None, :]
            mask = inside[:, None] & (d < student_dim)[None, :]
            tl.store(at, along.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def unordered(offsets, samples):
    """Whether any offset is below the one before it: then tile_of finds the wrong samples."""
    found = tl.zeros((), tl.int32)
    for start in range(0, samples, SEARCH):
        b = start + tl.arange(0, SEARCH)
        begin = tl.load(offsets + b, mask=b < samples, other=0)
        end = tl.load(offsets + b + 1, mask=b < samples, other=0)
        found += tl.sum((end < begin).to(tl.int32), 0)
    return found > 0


@triton.jit
def give_nan(grad, dim, first, last):
    """To all rows from `first` to `last`."""
    end = last.to(tl.int64) * dim
    for start in range(first.to(tl.int64) * dim, end, WEIGHTS):
        at = start + tl.arange(0, WEIGHTS)
        tl.store(grad + at, float("nan"), mask=at < end)


@triton.jit(do_not_specialize=["spans", "samples"])
def samples_kernel(
    student, teacher, weights, offsets, lengths,
    stats,  # [2, samples]: largest weight and share of the samples left to the tiles
    loss, grad, spans, samples, student_dim, teacher_dim, student_stride, teacher_stride,
    NEED_GRAD: tl.constexpr, ACC: tl.constexpr, TINY: tl.constexpr, STUDENT: tl.constexpr,
    TEACHER: tl.constexpr, PULL: tl.constexpr, LIMIT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a sample: all of a small one, the sums over weights of a larger one."""
    sample = tl.program_id(0)
    begin, end = tl.load(offsets + sample), tl.load(offsets + sample + 1)
    bad = (begin < 0) | (end < begin) | (end > spans)
    bad |= ((sample == 0) & (begin != 0)) | ((sample == samples - 1) & (end != spans))
    if bad:  # no partition: what would stay unwritten is marked too
        tl.store(loss + sample, float("nan"))
        tl.store(stats + samples + sample, float("nan"))
        if NEED_GRAD:
            first = tl.where(sample == 0, 0, tl.maximum(begin, 0))
            last = tl.where(sample == samples - 1, spans, tl.minimum(end, spans))
            give_nan(grad, student_dim, first, last)
        return
    begin, end = begin.to(tl.int32), end.to(tl.int32)
    if end - begin <= LIMIT:
        whole_sample(
            student, teacher, weights, lengths, loss, grad, sample, begin, end, spans,
            student_dim, teacher_dim, student_stride, teacher_stride,
            NEED_GRAD, ACC, TINY, STUDENT, TEACHER, PULL, LIMIT, BD,
        )  # fmt: skip
    else:
        largest = tl.zeros((), ACC)
        for start in range(begin, end, WEIGHTS):
            rows = start + tl.arange(0, WEIGHTS)
            largest = tl.maximum(largest, tl.max(load_weights(weights, rows, rows < end), 0))
        rest, squares, peaks = tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), tl.int32)
        for start in range(begin, end, WEIGHTS):
            rows = start + tl.arange(0, WEIGHTS)
            w = load_weights(weights, rows, rows < end)
            rest, squares, peaks = add_weights(w, largest, rest, squares, peaks)
        share = pair_share(rest, squares, peaks, ACC, TINY)
        if unordered(offsets, samples):  # some of its tiles will not be found
            share = tl.full((), float("nan"), ACC)
            if NEED_GRAD:
                give_nan(grad, student_dim, begin, end)
        tl.store(stats + sample, tl.where(largest > 0, largest, 1))
        tl.store(stats + samples + sample, share)


@triton.jit
def tile_of(offsets, slot, spans, samples, LIMIT: tl.constexpr, ROWS: tl.constexpr):
    """The sample that owns a slot, its bounds and the first row of the slot's tile; good or not.

    Sample b owns the slots from offsets[b] // ROWS + b on: as many as it has tiles, at least, and
    known without counting the tiles of the samples before.
    """
    before = tl.zeros((), tl.int32)
    for start in range(0, samples, SEARCH):
        b = start + tl.arange(0, SEARCH)
        first = tl.load(offsets + b, mask=b < samples, other=0) // ROWS + b
        before += tl.sum(((b < samples) & (first <= slot)).to(tl.int32), 0)
    sample = tl.maximum(before - 1, 0)
    begin, end = tl.load(offsets + sample), tl.load(offsets + sample + 1)
    row = begin + (slot - begin // ROWS - sample) * ROWS
    good = (before > 0) & (begin >= 0) & (end <= spans) & (end - begin > LIMIT)
    good = good & (row >= begin) & (row < end)
    return sample, begin.to(tl.int32), end.to(tl.int32), row.to(tl.int32), good


@triton.jit(do_not_specialize=["spans", "samples", "slots", "first_slot", "pieces"])
def pull_kernel(
    student, teacher, weights, offsets, lengths, stats,
    squares,  # [splits, slots]
    radial,  # [splits, ROWS rows a slot of this launch]
    pull,  # [ROWS rows a slot of this launch, WIDTH pieces]
    spans, samples, slots, first_slot, pieces, student_dim, teacher_dim, student_stride,
    teacher_stride,
    NEED_GRAD: tl.constexpr, ACC: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of rows against every splits-th tile of columns of its sample."""
    place, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = first_slot + place
    sample, begin, end, row, good = tile_of(offsets, slot, spans, samples, LIMIT, ROWS)
    if not good:
        return
    largest = tl.load(stats + sample)
    rows = row + tl.arange(0, ROWS)
    square, along = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    for start in range(split * BN, end - begin, splits * BN):
        columns = begin + start + tl.arange(0, BN)
        cosine = cosines(
            student, student_stride, student_dim, lengths, spans, rows, columns, end,
            False, STUDENT, BD,
        )  # fmt: skip
        theirs = cosines(
            teacher, teacher_stride, teacher_dim, lengths + 2 * spans, spans, rows, columns, end,
            False, TEACHER, BD,
        )  # fmt: skip
        error = tl.where(rows[:, None] == columns[None, :], 0, cosine - theirs)
        w = tl.load(weights + columns, mask=columns < end, other=0.0) / largest
        part = error * w[None, :]
        square += tl.sum(part * error, 1)
        if NEED_GRAD:
            along += tl.sum(part * cosine, 1)
            line = place.to(tl.int64) * ROWS + tl.arange(0, ROWS)
            at = line[:, None] * (pieces * WIDTH) + (start + tl.arange(0, BN))[None, :]
            inverse = tl.load(lengths + spans + columns, mask=columns < end, other=0.0)
            tl.store(pull + at, part * inverse[None, :])
    w = tl.load(weights + rows, mask=rows < end, other=0.0) / largest
    tl.store(squares + split.to(tl.int64) * slots + slot, tl.sum(square * w, 0))
    if NEED_GRAD:
        line = (split * tl.num_programs(0) + place) * ROWS + tl.arange(0, ROWS)
        tl.store(radial + line, along)


@triton.jit(do_not_specialize=["spans", "samples", "first_slot", "pieces"])
def gradient_kernel(
    student, weights, offsets, lengths, stats, radial, pull, grad, spans, samples, first_slot,
    pieces, student_dim, student_stride,
    ACC: tl.constexpr, PULL: tl.constexpr, LIMIT: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of rows, BD of their columns."""
    place = tl.program_id(0)
    sample, begin, end, row, good = tile_of(
        offsets, first_slot + place, spans, samples, LIMIT, ROWS
    )
    if not good:
        return
    largest, share = tl.load(stats + sample), tl.load(stats + samples + sample)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    line = place * ROWS + tl.arange(0, ROWS)
    toward = tl.zeros((ROWS, BD), ACC)
    for start in range(0, end - begin, BN):
        columns = begin + start + tl.arange(0, BN)
        scale = tl.load(lengths + columns, mask=columns < end, other=0.0)
        at = line.to(tl.int64)[:, None] * (pieces * WIDTH) + (start + tl.arange(0, BN))[None, :]
        x = scaled(student, student_stride, student_dim, columns, scale, d)
        toward = tl.dot(tl.load(pull + at), x, toward, input_precision=PULL, out_dtype=ACC)
    rows = row + tl.arange(0, ROWS)
    inside = rows < end
    w = tl.load(weights + rows, mask=inside, other=0.0) / largest
    scale = tl.load(lengths + rows, mask=inside, other=0.0)
    inverse = tl.load(lengths + spans + rows, mask=inside, other=0.0)
    along = tl.zeros((ROWS,), ACC)
    for split in range(SPLITS):
        along += tl.load(radial + split * tl.num_programs(0) * ROWS + line)
    x = scaled(student, student_stride, student_dim, rows, scale, d)
    toward -= (along * inverse)[:, None] * x
    toward = tl.where(share == 0, 0, toward * (4 * w * inverse * scale)[:, None] * share)
    at = grad + rows.to(tl.int64)[:, None] * student_dim + d[None, :]
    mask = inside[:, None] & (d < student_dim)[None, :]
    tl.store(at, toward.to(grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["spans", "samples", "slots"])
def loss_kernel(
    offsets, stats, squares, loss, spans, samples, slots,
    ACC: tl.constexpr, LIMIT: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program a sample: the sum over its tiles."""
    sample = tl.program_id(0)
    begin, end = tl.load(offsets + sample), tl.load(offsets + sample + 1)
    if (begin < 0) | (end > spans) | (end - begin <= LIMIT):
        return
    first = begin // ROWS + sample
    tiles = (end - begin + ROWS - 1) // ROWS
    total = tl.zeros((SEARCH,), ACC)
    for start in range(0, tiles, SEARCH):
        slot = start + tl.arange(0, SEARCH)
        for split in range(SPLITS):
            at = squares + split * slots.to(tl.int64) + first + slot
            total += tl.load(at, mask=slot < tiles, other=0.0)
    tl.store(loss + sample, tl.sum(total, 0) * tl.load(stats + samples + sample))
