"""attention_mass against float64 and by hand, on every backend; inputs good and bad."""

import math

import pytest
import torch

from sra_kernels import attention_mass, use_backend
from sra_kernels.testing import DTYPES, assert_as_good_as_torch
from tests.attention_mass.cases import DIM, HEADS, LENGTHS, OPTIONS, B, case, eager


@pytest.mark.parametrize(("queries", "keys"), LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [True, False], ids=["one row", "all rows"])
@pytest.mark.parametrize("mask", ["none", "padding", "random"])
@pytest.mark.parametrize("more", OPTIONS.values(), ids=OPTIONS)
def test_matches_float64(backend, poison, queries, keys, dtype, rows, mask, more):
    query, key, options = case(queries, keys, dtype, rows=rows, mask=mask)
    options |= more
    mass = attention_mass(query, key, **options)
    exact = eager(query.double(), key.double(), **options)
    plain = eager(query, key, **options)
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good_as_torch(mass, plain, exact)
    total = mass.sum(1)
    assert ((total - 1).abs() < 1e-6).logical_or(total == 0).all()
    torch.testing.assert_close(total == 0, exact.sum(1) == 0)
    if "key_mask" in options:
        assert not mass[~options["key_mask"]].any()


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("rows", [True, False])
def test_grouped_heads_equal_repeated_keys(backend, kv_heads, rows):
    query, key, options = case(5, 9, kv_heads=kv_heads, rows=rows)
    repeated = key.repeat_interleave(HEADS // kv_heads, 1)
    torch.testing.assert_close(
        attention_mass(query, key, **options), attention_mass(query, repeated, **options)
    )


def test_by_hand(backend):
    log = math.log
    query = torch.tensor([[[[1.0], [1.0]], [[0.0], [2.0]]]])  # two heads, two rows, one key head
    key = torch.tensor([[[[0.0], [log(3.0)]]]])
    # The last row sees both keys: head 0 gives (1/4, 3/4), head 1 (1/10, 9/10).
    mass = attention_mass(query, key, query_index=torch.tensor([1]), scale=1.0)
    assert mass[0].tolist() == pytest.approx([0.175, 0.825])
    # Row 0 sees only key 0, in both heads.
    mass = attention_mass(query, key, scale=1.0)
    assert mass[0].tolist() == pytest.approx([(0.35 + 2) / 4, 1.65 / 4])
    # Halving the scale takes the root of the odds; a window of one leaves the row's own key.
    mass = attention_mass(query, key, query_index=torch.tensor([1]), scale=0.5)
    root = 3**0.5
    assert mass[0, 1].item() == pytest.approx((root / (1 + root) + 3 / 4) / 2)
    mass = attention_mass(query, key, query_index=torch.tensor([1]), scale=1.0, window=1)
    assert mass[0].tolist() == [0.0, 1.0]
    capped = attention_mass(query, key, query_index=torch.tensor([1]), scale=1.0, softcap=0.5)
    a, b = (math.exp(0.5 * math.tanh(2 * s * log(3.0))) for s in (1, 2))
    assert capped[0, 1].item() == pytest.approx((a / (1 + a) + b / (1 + b)) / 2)


def test_equals_the_attention_matrix_of_sdpa(backend):
    """Values that are an identity matrix make attention return its own weights."""
    query, key, options = case(9, 9, torch.float32, kv_heads=HEADS)
    eye = torch.eye(9).expand(B, HEADS, 9, 9)
    weights = torch.nn.functional.scaled_dot_product_attention(
        query, key, eye, is_causal=True, scale=options["scale"]
    )
    mass = attention_mass(query, key, **options)
    torch.testing.assert_close(mass, weights.sum((1, 2)) / (HEADS * 9))
    last = attention_mass(query, key, query_index=torch.full((B,), 8), **options)
    torch.testing.assert_close(last, weights[:, :, 8].sum(1) / HEADS)


@pytest.mark.parametrize("rows", [True, False])
def test_padding_on_either_side_changes_nothing(backend, rows):
    """Positions only set what is visible, so a padded batch equals its single samples."""
    query, key, options = case(6, 6)
    index = torch.tensor([5, 5, 5, 5]) if rows else None
    want = attention_mass(query, key, **options, query_index=index)
    pad = torch.full((B, HEADS, 3, DIM), 7.0, dtype=query.dtype)
    real = torch.ones(B, 6, dtype=torch.bool)
    none = torch.zeros(B, 3, dtype=torch.bool)
    right = attention_mass(
        torch.cat([query, pad], 2), torch.cat([key, pad[:, :2]], 2), **options,
        key_mask=torch.cat([real, none], 1), query_index=index,
    )  # fmt: skip
    left = attention_mass(
        torch.cat([pad, query], 2), torch.cat([pad[:, :2], key], 2), **options,
        key_mask=torch.cat([none, real], 1), query_index=None if index is None else index + 3,
    )  # fmt: skip
    torch.testing.assert_close(right[:, :6], want)
    torch.testing.assert_close(left[:, 3:], want)


@pytest.mark.parametrize("rows", [True, False])
def test_masked_keys_may_hold_nan(backend, rows):
    query, key, options = case(6, 6, rows=rows, mask="padding")
    want = attention_mass(query, key, **options)
    masked = ~options["key_mask"]
    key = key.masked_fill(masked[:, None, :, None], torch.nan)
    if not rows:
        query = query.masked_fill(masked[:, None, :, None], torch.nan)
    torch.testing.assert_close(attention_mass(query, key, **options), want)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_scores(backend, size):
    query, key, options = case(5, 5, torch.float32)
    query = query * size
    exact = eager(query.double(), key.double(), **options)
    torch.testing.assert_close(
        attention_mass(query, key, **options).double(), exact, rtol=0.05, atol=1e-6
    )


def log_sum_exp(query, key, scale, key_mask=None, softcap=None, window=None):
    """As FlashAttention returns it, and NaN for rows whose own position is masked."""
    keys, behind = key.shape[2], key.shape[2] - query.shape[2]
    repeated = key.repeat_interleave(HEADS // key.shape[1], 1)
    scores = scale * query @ repeated.transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    row, column = torch.arange(behind, keys)[:, None], torch.arange(keys)
    seen = (column <= row) & (column > row - (window or keys))
    real = torch.ones(B, keys, dtype=torch.bool) if key_mask is None else key_mask
    scores = scores.masked_fill(~(seen & real[:, None, None]), -torch.inf)
    return scores.logsumexp(3).masked_fill(~real[:, None, behind:], torch.nan)


@pytest.mark.parametrize(("queries", "keys"), [*LENGTHS.values(), (130, 210)])
@pytest.mark.parametrize("mask", ["none", "padding", "random"])
@pytest.mark.parametrize("more", OPTIONS.values(), ids=OPTIONS)
def test_a_given_log_sum_exp_equals_the_computed_one(backend, poison, queries, keys, mask, more):
    query, key, options = case(queries, keys, mask=mask)
    options |= more
    lse = log_sum_exp(query, key, **options)
    want = attention_mass(query, key, **options)
    natural, binary = {"lse": lse, "lse_base": "e"}, {"lse": lse / math.log(2), "lse_base": "2"}
    for given in (natural, binary):
        torch.testing.assert_close(attention_mass(query, key, **options, **given), want)
    with use_backend("reference"):
        torch.testing.assert_close(attention_mass(query, key, **options, **natural), want)


def test_a_row_of_no_log_sum_exp_gives_nothing(backend):
    query, key, options = case(5, 5)
    lse = log_sum_exp(query, key, **options)
    lse[:, :, 1:] = -torch.inf
    want = torch.zeros(B, 5, dtype=query.dtype)
    want[:, 0] = 1  # row 0 sees key 0
    given = {"lse": lse, "lse_base": "e"}
    torch.testing.assert_close(attention_mass(query, key, **options, **given), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [True, False], ids=["one row", "all rows"])
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("more", OPTIONS.values(), ids=OPTIONS)
def test_several_runs_of_keys_and_tiles_of_rows(backend, poison, dtype, rows, kv_heads, more):
    """Groups of 6, 3 and 2 heads; a head size that no register divides; masks with gaps."""
    keys = 1100 if rows else 210
    query, key, options = case(70, keys, dtype, kv_heads, rows, mask="random")
    query, key = query[:2].repeat(1, 1, 1, 2)[..., :13], key[:2].repeat(1, 1, 1, 2)[..., :13]
    options = {n: x[:2] if torch.is_tensor(x) else x for n, x in options.items()} | more
    options["key_mask"][:, 150:190] = False
    exact = eager(query.double(), key.double(), **options)
    ours = attention_mass(query, key, **options)
    assert_as_good_as_torch(ours, eager(query, key, **options), exact)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("window", [None, 40])
def test_8_same_bits_for_any_number_of_threads(backend, rows, window):
    keys = 1100 if rows else 210
    query, key, options = case(keys, keys, torch.float32, rows=rows, mask="random")
    first = attention_mass(query, key, **options, window=window)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7, 2):
            torch.set_num_threads(threads)
            again = attention_mass(query, key, **options, window=window)
            if backend == "cpu":
                assert torch.equal(again, first)
            torch.testing.assert_close(again, first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [True, False])
def test_keys_that_hold_infinities(backend, rows):
    """A score of -inf takes its key out; the others share as if it were not there."""
    query, key, options = case(6, 6, torch.float32)
    query = query.abs()
    key[:, :, 2] = 0
    key[:, :, 2, 0] = -torch.inf
    if rows:
        options["query_index"] = torch.tensor([5, 5, 4, 3])
    else:
        query, key = query[:, :, 3:], key  # the row at key 2 sees others too
    hidden = torch.ones(B, 6, dtype=torch.bool)
    hidden[:, 2] = False
    want = attention_mass(query, key, **options, key_mask=hidden)
    torch.testing.assert_close(attention_mass(query, key, **options), want)


# --- inputs ---


def test_any_strides(backend):
    """As models hold them: [B, T, heads, d] seen as [B, heads, T, d]."""
    query, key, options = case(5, 5, rows=True)
    want = attention_mass(query, key, **options)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(attention_mass(query, key, **options), want)
    options["query_index"] = options["query_index"].int()
    torch.testing.assert_close(attention_mass(query, key, **options), want)


def test_9_rows_of_keys_far_apart(backend):
    """Key rows 2^30 elements apart, in virtual memory: the third lies past 2^31."""
    query, near = torch.randn(1, 2, 3, DIM).bfloat16(), torch.randn(1, 1, 3, DIM).bfloat16()
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = far.as_strided((1, 1, 3, DIM), (0, 0, 2**30, 1))
    far.copy_(near)
    assert torch.equal(
        attention_mass(query, far, scale=1.0), attention_mass(query, near, scale=1.0)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_index": torch.tensor([0, 3])}, ValueError, r"query_index\[1\] = 3.*0..2"),
        ({"query_index": torch.tensor([-1, 0])}, ValueError, r"query_index\[0\] = -1"),
        ({"query_index": torch.tensor([0])}, ValueError, r"query_index has shape \[1\].*\[2\]"),
        ({"query_index": torch.tensor([0.0, 1.0])}, TypeError, "int32 or int64"),
        ({"key": torch.randn(2, 3, 5, 8)}, ValueError, "query has 4 heads and key 3"),
        ({"key": torch.randn(2, 2, 5, 9)}, ValueError, "batch and head sizes must agree"),
        ({"key": torch.randn(1, 2, 5, 8)}, ValueError, "batch and head sizes must agree"),
        ({"key": torch.randn(2, 2, 2, 8)}, ValueError, "query has 3 rows and key only 2"),
        ({"key": torch.randn(2, 2, 5, 8).half()}, TypeError, r"key is torch\.float16 but query"),
        ({"key": torch.randn(2, 5, 8)}, ValueError, "key must have 4 dimensions, not 3"),
        ({"key_mask": torch.ones(2, 5)}, TypeError, r"key_mask is torch\.float32.*\.bool\(\)"),
        ({"key_mask": torch.ones(2, 4).bool()}, TypeError, r"it must be torch.bool \[2, 5\]"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive, not 0.0"),
        (
            {"query_index": torch.tensor([0, 1]), "lse": torch.zeros(2, 4, 3)},
            ValueError,
            "all rows",
        ),
        (
            {"lse": torch.zeros(2, 2, 3)},
            TypeError,
            r"lse is torch.float32 \[2, 2, 3\].*\[2, 4, 3\]",
        ),
        ({"lse": torch.zeros(2, 4, 3).double()}, TypeError, r"it must be torch\.float32"),
        ({"lse": torch.zeros(2, 4, 3)}, ValueError, "which logarithm lse is, 'e' or '2', not None"),
        ({"lse_base": "2"}, ValueError, "lse_base belongs to lse"),
        ({"window": 0}, ValueError, "window must be at least 1, not 0"),
    ],
)
def test_bad_input(change, error, message):
    given = {"query": torch.randn(2, 4, 3, 8), "key": torch.randn(2, 2, 5, 8), "scale": 1.0}
    with pytest.raises(error, match=message):
        attention_mass(**given | change)
