"""The kernels of triton.py: two for one query row, three for all rows.

Scores are in powers of two: exp2 of one is exp of the scaled and capped product. Query heads that
read the same key head are packed: entry e of the packed rows is head e % GROUP of row e // GROUP.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Good to a few roundings: from a series near 0, where the exponentials cancel."""
    small = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    y = (1 - small) / (1 + small)
    y = tl.where(x < 0, -y, y)
    if x.dtype != tl.float64:
        square = x * x
        series = square * -5.7049004389e-3 + 2.0639013322e-2
        series = series * square - 5.3739693588e-2
        series = series * square + 1.3331441956e-1
        series = series * square - 3.3333281934e-1
        y = tl.where(tl.abs(x) < 0.625, x + x * square * series, y)
    return y


@triton.jit
def load_columns(rows, inside, first, dim, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] from pointers to rows, columns from `first` on; zeros where there is nothing.

    `inside` comes from no mask in memory: bytes behind an operand of `tl.dot` widen its layout, and
    in float64 that does not compile.
    """
    column = first + tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < dim)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def scores(
    x, x_rows, x_inside, y, y_rows, y_inside, dim, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[x_rows, y_rows], where x and y hold the first BLOCK_D columns, the only ones kept."""
    s = tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=ACC)
    if DIM > BLOCK_D:
        for first in range(BLOCK_D, DIM, BLOCK_D):
            x_more = load_columns(x_rows, x_inside, first, dim, BLOCK_D)
            y_more = load_columns(y_rows, y_inside, first, dim, BLOCK_D)
            s = tl.dot(x_more, tl.trans(y_more), s, input_precision=PRECISION, out_dtype=ACC)
    if SOFTCAP is None:
        s *= SCALE * LOG2E
    else:
        s = tanh(s * (SCALE / SOFTCAP)) * (SOFTCAP * LOG2E)
    return s


@triton.jit
def is_real(key_mask, at, inside):
    """Whether the keys `at` are there and count."""
    if key_mask is not None:
        inside = tl.load(key_mask + at, mask=inside, other=0).to(tl.int1)
    return inside


@triton.jit
def is_visible(key, own, window):
    """Whether a row whose own key is `own` sees `key`."""
    visible = key <= own
    if window is not None:
        visible = visible & (key > own - window)
    return visible


@triton.jit
def finite_shift(top):
    """What to subtract from scores whose largest is `top`; with no score, -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0, top)


@triton.jit(do_not_specialize=["queries", "keys", "window", "run_tiles"])
def row_scores_kernel(
    query, key, query_index, key_mask, score, top_of_run, sum_of_run,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    queries, keys, dim, padded, window, run_tiles,
    GROUP: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    RUNS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """A run of keys against a group's query heads: scores, and each head's largest and sum."""
    run, kv_head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = tl.load(query_index + sample)
    good = (index >= 0) & (index < queries)
    index = tl.where(good, index, 0)
    own = index.to(tl.int32) + keys - queries

    in_group = tl.arange(0, BLOCK_GROUP)
    head = (kv_head * GROUP + in_group).to(tl.int64)
    inside = in_group < GROUP
    at = query + sample * query_batch + head * query_head + index * query_row
    there = inside & good
    q = load_columns(at, there, 0, dim, BLOCK_D)
    sample_head = sample * (tl.num_programs(1) * GROUP) + head

    top = tl.full([BLOCK_GROUP], float("-inf"), ACC)
    total = tl.zeros([BLOCK_GROUP], ACC)
    key += sample * key_batch + kv_head.to(tl.int64) * key_head
    for tile in range(run * run_tiles, (run + 1) * run_tiles):
        column = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        reached = (column < keys) & is_visible(column, own, window)
        k_at = key + column.to(tl.int64) * key_row
        k = load_columns(k_at, reached, 0, dim, BLOCK_D)
        s = scores(
            k, k_at, reached, q, at, there, dim, SCALE, SOFTCAP, ACC, PRECISION, DIM, BLOCK_D
        )
        visible = is_real(key_mask, sample * keys + column, reached)
        s = tl.where(visible[:, None], s, float("-inf"))
        to = score + sample_head[None, :] * padded + column[:, None]
        tl.store(to, s, mask=inside[None, :] & (column < padded)[:, None])
        higher = tl.maximum(top, tl.max(s, 0))
        shift = finite_shift(higher)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[None, :]), 0)
        top = higher
    tl.store(top_of_run + sample_head * RUNS + run, top, mask=inside)
    tl.store(sum_of_run + sample_head * RUNS + run, total, mask=inside)


@triton.jit(do_not_specialize=["queries", "keys", "runs"])
def row_mass_kernel(
    score, top_of_run, sum_of_run, query_index, mass, queries, keys, padded, runs,
    HEADS: tl.constexpr, ACC: tl.constexpr, RUNS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The softmax of each head over all runs, summed over the heads, of a block of keys."""
    sample = tl.program_id(1).to(tl.int64)
    index = tl.load(query_index + sample)
    head, run = tl.arange(0, BLOCK_HEADS), tl.arange(0, RUNS)
    sample_head = sample * HEADS + head
    known = (head < HEADS)[:, None] & (run < runs)[None, :]
    at = sample_head[:, None] * RUNS + run[None, :]
    tops = tl.load(top_of_run + at, mask=known, other=float("-inf"))
    sums = tl.load(sum_of_run + at, mask=known, other=0)
    shift = finite_shift(tl.max(tops, 1))
    total = tl.sum(sums * tl.exp2(tops - shift[:, None]), 1)
    giving = tl.sum((total != 0).to(tl.int32), 0)
    whole = total * giving.to(ACC)
    share = tl.where(total == 0, 0, 1 / tl.where(whole == 0, 1, whole))

    column = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    at = score + sample_head[:, None] * padded + column[None, :]
    there = (head < HEADS)[:, None] & (column < padded)[None, :]
    s = tl.load(at, mask=there, other=float("-inf"))
    m = tl.sum(tl.exp2(s - shift[:, None]) * share[:, None], 0)
    m = tl.where((index >= 0) & (index < queries), m, float("nan"))
    tl.store(mass + sample * keys + column, m, mask=column < keys)


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def statistics_kernel(
    query, key, key_mask, top_of_row, inverse_of_row,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    queries, keys, dim, window,
    GROUP: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Each packed row's largest score and 1 / sum; (inf, 0) where it gives nothing."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the rows that see most come first
    kv_head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    behind = keys - queries  # the position of row 0
    entry = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row, head = entry // GROUP, kv_head * GROUP + entry % GROUP
    own = row + behind
    used = is_real(key_mask, sample * keys + own, row < queries)
    at = query + sample * query_batch + head * query_head + row.to(tl.int64) * query_row
    q = load_columns(at, row < queries, 0, dim, BLOCK_D)

    any_used = tl.max(used.to(tl.int32), 0) > 0
    first_own = tile * BLOCK_ROWS // GROUP + behind
    last_own = tl.minimum((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP + behind, keys - 1)
    start, clear = 0, 0  # the first key that a row sees, and from where all rows do
    if window is not None:
        start = tl.maximum(0, first_own - window + 1)
        clear = tl.maximum(0, last_own - window + 1)

    top = tl.full([BLOCK_ROWS], float("-inf"), ACC)
    total = tl.zeros([BLOCK_ROWS], ACC)
    key += sample * key_batch + kv_head * key_head
    # The window's edge, then keys that all rows see, then the diagonal.
    for part in tl.static_range(3):
        if part == 0:
            tiles = tl.cdiv(clear - start, BLOCK_KEYS)
        elif part == 1:
            tiles = tl.maximum(first_own + 1 - start, 0) // BLOCK_KEYS
        else:
            tiles = tl.cdiv(tl.maximum(last_own + 1 - start, 0), BLOCK_KEYS)
        stop = start + tl.where(any_used, tiles, 0) * BLOCK_KEYS
        if part > 0 or window is not None:
            for first in range(start, stop, BLOCK_KEYS):
                column = first + tl.arange(0, BLOCK_KEYS)
                inside = column < keys
                k_at = key + column.to(tl.int64) * key_row
                k = load_columns(k_at, inside, 0, dim, BLOCK_D)
                s = scores(
                    q, at, row < queries, k, k_at, inside,
                    dim, SCALE, SOFTCAP, ACC, PRECISION, DIM, BLOCK_D,
                )  # fmt: skip
                if part != 1:
                    visible = is_visible(column[None, :], own[:, None], window)
                    s = tl.where(visible, s, float("-inf"))
                if key_mask is not None:
                    real = is_real(key_mask, sample * keys + column, inside)
                    s = tl.where(real[None, :], s, float("-inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                shift = finite_shift(higher)
                total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
                top = higher
        start = stop

    used &= total != 0
    to = (sample * tl.num_programs(1) + kv_head) * queries * GROUP + entry
    tl.store(top_of_row + to, tl.where(used, top, float("inf")), mask=row < queries)
    inverse = tl.where(used, 1 / tl.where(used, total, 1), 0)
    tl.store(inverse_of_row + to, inverse, mask=row < queries)


@triton.jit(do_not_specialize=["queries", "keys", "window", "splits"])
def mass_kernel(
    query, key, key_mask, top_of_row, inverse_of_row, part_mass, part_total,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    queries, keys, dim, window, splits,
    GROUP: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """What a tile of keys receives from one of `splits` shares of the rows that see it.

    Without `inverse_of_row`, `top_of_row` is the log-sum-exp as given: natural, head by head.
    """
    tile, part_index = tl.program_id(0), tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    kv_head, split = (part_index // splits).to(tl.int64), part_index % splits
    behind = keys - queries
    first_key = tile * BLOCK_KEYS
    last_key = tl.minimum(first_key + BLOCK_KEYS, keys) - 1
    column = first_key + tl.arange(0, BLOCK_KEYS)
    real = is_real(key_mask, sample * keys + column, column < keys)
    at = key + sample * key_batch + kv_head * key_head + column.to(tl.int64) * key_row
    # Scores of masked keys need no mask of their own: the mass of a key is its alone, and gets one.
    k = load_columns(at, column < keys, 0, dim, BLOCK_D)

    # Rows from `start` see a key, from `clear` on all keys, before `edge` still all, before `end`
    # still one.
    start, clear = tl.maximum(first_key - behind, 0), tl.maximum(last_key - behind, 0)
    edge, end = queries, queries
    if window is not None:
        edge = tl.minimum(queries, tl.maximum(first_key + window - behind, 0))
        end = tl.minimum(queries, tl.maximum(last_key + window - behind, 0))
    start, clear, edge, end = start * GROUP, clear * GROUP, edge * GROUP, end * GROUP
    share = tl.cdiv(tl.cdiv(end - start, splits), BLOCK_ROWS) * BLOCK_ROWS
    start += split * share
    end = tl.minimum(end, start + share)
    end = tl.where(tl.max(real.to(tl.int32), 0) > 0, end, start)

    mass = tl.zeros([BLOCK_KEYS], ACC)
    query += sample * query_batch + kv_head * GROUP * query_head
    stat = (sample * (tl.num_programs(1) // splits) + kv_head) * queries * GROUP
    # The diagonal, then rows that see all keys, then the window's edge.
    for part in tl.static_range(3):
        if part == 0:
            tiles = tl.cdiv(tl.maximum(tl.minimum(clear, end) - start, 0), BLOCK_ROWS)
        elif part == 1 and window is not None:
            tiles = tl.maximum(tl.minimum(edge, end) - start, 0) // BLOCK_ROWS
        else:
            tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK_ROWS)
        stop = start + tiles * BLOCK_ROWS
        if part < 2 or window is not None:
            for first in range(start, stop, BLOCK_ROWS):
                entry = first + tl.arange(0, BLOCK_ROWS)
                row, head = entry // GROUP, entry % GROUP
                inside = row < queries
                q_at = query + head.to(tl.int64) * query_head + row.to(tl.int64) * query_row
                q = load_columns(q_at, inside, 0, dim, BLOCK_D)
                if inverse_of_row is None:
                    lse = top_of_row + stat + head.to(tl.int64) * queries + row
                    top = tl.load(lse, mask=inside, other=float("-inf"))
                    giving = is_real(key_mask, sample * keys + row + behind, inside)
                    giving &= top != float("-inf")
                    top = tl.where(giving, top * LOG2E, float("inf"))
                else:
                    top = tl.load(top_of_row + stat + entry, mask=inside, other=float("inf"))
                # A row that gives nothing may hold NaN.
                counts = (top != float("inf"))[None, :]
                if part != 1:
                    own = (row + behind)[None, :]
                    counts = counts & is_visible(column[:, None], own, window)
                s = scores(
                    k, at, column < keys, q, q_at, inside,
                    dim, SCALE, SOFTCAP, ACC, PRECISION, DIM, BLOCK_D,
                )  # fmt: skip
                p = tl.exp2(tl.where(counts, s, float("-inf")) - top[None, :])
                if inverse_of_row is not None:
                    inverse = tl.load(inverse_of_row + stat + entry, mask=inside, other=0)
                    p *= inverse[None, :]
                mass += tl.sum(p, 1)
        start = stop

    mass = tl.where(real, mass, 0)
    slot = sample * tl.num_programs(1) + part_index
    tl.store(part_mass + slot * keys + column, mass, mask=column < keys)
    tl.store(part_total + slot * tl.num_programs(0) + tile, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["keys", "parts", "totals"])
def normalise_kernel(
    part_mass, part_total, mass, keys, parts, totals,
    ACC: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The parts of a sample's mass, added in order and divided by the sum of all."""
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    sums = tl.zeros([BLOCK_KEYS], ACC)
    for first in range(0, totals, BLOCK_KEYS):
        at = first + tl.arange(0, BLOCK_KEYS)
        sums += tl.load(part_total + sample * totals + at, mask=at < totals, other=0)
    total = tl.sum(sums, 0)

    m = tl.zeros([BLOCK_KEYS], ACC)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        at = part_mass + (sample * parts + part)[:, None] * keys + column[None, :]
        known = (part < parts)[:, None] & (column < keys)[None, :]
        m += tl.sum(tl.load(at, mask=known, other=0), 0)
    m /= tl.where(total == 0, 1, total)
    tl.store(mass + sample * keys + column, m, mask=column < keys)
