"""linear_span_kl against float64 and by hand, on every backend; inputs good and bad."""

import math

import pytest
import torch

from sra_kernels import linear_span_kl, span_kl, use_backend
from sra_kernels.linear_span_kl import chunks
from sra_kernels.testing import DTYPES, assert_as_good_as_torch
from tests.linear_span_kl.cases import (
    EVERY,
    OBJECTIVES,
    OUTSIDE,
    TRANSFORMS,
    S,
    case,
    cast,
    cut,
    eager,
    grads,
    run,
)

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize(("outside", "reduction"), EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("full", [True, False], ids=["bias and weights", "neither"])
def test_matches_float64(poison, outside, reduction, dtype, transform, full):
    ours, theirs, options = case(outside, dtype, bias=full, weights=full)
    options |= TRANSFORMS[transform]
    upstream = torch.randn(()) if reduction == "sum" else torch.randn(S)

    def all_of(loss, mass, leaves):
        return loss, mass, *grads(loss, leaves, upstream.to(loss.dtype))

    def plain(dtype):
        x, t = cast(ours, theirs, dtype)
        return all_of(*eager(x, t, options, reduction, dtype), x)

    exact, torchs = plain(torch.float64), plain(dtype)
    loss, mass = run(ours, theirs, options, reduction=reduction, return_shared_mass=True)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    got = all_of(loss, mass, ours)
    names = ("loss", "mass", "student", "head", "bias")
    for name, a, b, c in zip(names, got, torchs, exact, strict=False):
        assert a.dtype == (loss.dtype if name in ("loss", "mass") else dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-13)
        else:  # the logits of a low precision are rounded to it, and so is the bound
            assert_as_good_as_torch(a.to(dtype), b, c, name)


@pytest.mark.cpu_only
@pytest.mark.parametrize("native", [True, False], ids=["products in bfloat16", "in float32"])
@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_either_dtype_of_the_products(poison, outside, reduction, native, monkeypatch):
    """What a processor with bfloat16 arithmetic runs, and what one without runs, part by part."""
    product = torch.bfloat16 if native else torch.float32
    monkeypatch.setattr(chunks, "product_dtype", lambda head: product)
    cut(monkeypatch, piece_bytes=1)
    ours, theirs, options = case(outside, torch.bfloat16, bias=True, weights=True)
    loss = run(ours, theirs, options, reduction=reduction)
    got = loss, *grads(loss.sum(), ours)

    def plain(dtype):
        x, t = cast(ours, theirs, dtype)
        loss, _ = eager(x, t, options, reduction, dtype)
        return loss, *grads(loss.sum(), x)

    for a, b, c in zip(got, plain(torch.bfloat16), plain(torch.float64), strict=True):
        assert_as_good_as_torch(a.bfloat16(), b, c)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("outside", "reduction"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("under", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(poison, outside, reduction, dtype, under, monkeypatch):
    cut(monkeypatch, chunk_bytes=1, rows=2, piece_bytes=1)
    ours, theirs, options = case(outside, dtype, bias=True, weights=True)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", under, enabled=enabled):
            loss = run(ours, theirs, options, reduction=reduction)
            results.append([loss, *grads(loss.sum(), ours)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("direction", OBJECTIVES)
@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_rows_of_logits_may_have_room_behind_them(
    poison, outside, reduction, direction, monkeypatch
):
    """As on a GPU, where each begins at a multiple of 64 entries: NaN, in this test."""
    ours, theirs, options = case(outside, torch.float32, bias=True, weights=True)
    options |= {**OBJECTIVES[direction], **TRANSFORMS["Gemma"]}
    runs = []
    for align in (1, 16):
        cut(monkeypatch, chunk_bytes=1, rows=4, align=align)
        loss, mass = run(ours, theirs, options, reduction=reduction, return_shared_mass=True)
        plain = run(ours, theirs, options, reduction=reduction)
        runs.append((loss, mass, plain, *grads(loss.sum(), ours), *grads(plain.sum(), ours)))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_pieces_of_a_head_begin_where_accesses_are_wide(monkeypatch):
    head = torch.empty(1000, 8, dtype=torch.float16)  # multiplied in float32
    side = chunks.Side(torch.empty(3, 8), head, None, None, None, None)
    cut(monkeypatch, piece_bytes=150 * 8 * 4, align=64)
    assert {piece.start % 64 for piece in side.pieces()} == {0}
    assert side.pieces()[0] == slice(0, 128)
    room = side.buffer(3)
    assert room.shape == (3, 1000)
    assert room.stride() == (1024, 1)


@pytest.mark.parametrize("direction", OBJECTIVES)
@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_equals_span_kl_on_the_logits(outside, reduction, direction):
    ours, theirs, options = case(outside)
    options |= OBJECTIVES[direction]
    loss, mass = run(ours, theirs, options, reduction=reduction, return_shared_mass=True)
    student = ours[0] @ ours[1].T
    want, want_mass = span_kl(student, theirs[0] @ theirs[1].T, **options, return_shared_mass=True)
    want = want.sum() if reduction == "sum" else want
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(mass, want_mass)
    up = torch.randn_like(want)
    for a, b in zip(grads(loss, ours, up), grads(want, ours, up), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("entries", "width", "shared"), [(1, 1, None), (7, 3, 1), (507, 1, 123)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_odd_sizes(poison, entries, width, shared, dtype):
    x, w = torch.randn(5, width, dtype=dtype), torch.randn(entries, width, dtype=dtype)
    ours = [x.requires_grad_(), w.requires_grad_(), None]
    theirs = [torch.randn(5, 4, dtype=dtype), torch.randn(entries, 4, dtype=dtype)]
    vocab = (None, None) if shared is None else (torch.randperm(entries)[:shared],) * 2
    for outside in ("renormalise", "weight", "bucket"):
        options = {"temperature": 1.0, "direction": "forward", "outside": outside, "vocab": vocab}
        want, _ = eager(ours, theirs, options, "sum", dtype)
        loss = run(ours, theirs, options | {"vocab": vocab if shared else None}, reduction="sum")
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(grads(loss, ours), grads(want, ours), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_by_hand():
    log3 = math.log(3.0)
    student = torch.tensor([[1.0], [2.0]], requires_grad=True)
    head = torch.tensor([[0.0], [log3], [9.0]], requires_grad=True)  # logits (0, log 3), (0, log 9)
    teacher, teacher_head = torch.tensor([[1.0], [0.0]]), torch.tensor([[9.0], [log3], [0.0]])
    vocab = torch.tensor([0, 1]), torch.tensor([1, 2])  # teacher logits (log 3, 0), (0, 0)
    loss = linear_span_kl(
        student, head, teacher, teacher_head, temperature=1.0, direction="forward", vocab=vocab,
        span_weights=torch.tensor([1.0, 2.0]), reduction="sum",
    )  # fmt: skip
    first = 0.5 * log3  # (3/4, 1/4) to (1/4, 3/4)
    second = 0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9)  # (1/2, 1/2) to (1/10, 9/10)
    assert loss.item() == pytest.approx(first + 2 * second, rel=1e-6)
    loss.backward()
    # dz is (-1/2, 1/2) for the first span, and 2 (-0.4, 0.4) for the second
    assert student.grad.flatten().tolist() == pytest.approx([0.5 * log3, 0.8 * log3])
    assert head.grad.flatten().tolist() == pytest.approx([-0.5 - 1.6, 0.5 + 1.6, 0.0])


def test_scale_comes_before_softcap_and_temperature_last():
    student = torch.tensor([[2.0]])
    head = torch.tensor([[0.0], [1.0], [3.0]])
    loss = linear_span_kl(
        student, head, torch.zeros(1, 1), head, temperature=1.5, direction="reverse",
        reduction="sum", student_scale=0.5, student_softcap=2.0,
        student_bias=torch.tensor([0.0, 1.0, 0.0]),
    )  # fmt: skip
    logits = [2 * math.tanh(0.5 * (2 * w + b) / 2) / 1.5 for w, b in ((0, 0), (1, 1), (3, 0))]
    total = sum(map(math.exp, logits))
    p = [math.exp(z) / total for z in logits]
    assert loss.item() == pytest.approx(sum(q * math.log(3 * q) for q in p), rel=1e-5)


@pytest.mark.parametrize(("outside", "reduction"), EVERY)
@pytest.mark.parametrize("direction", OBJECTIVES)
def test_gradcheck(outside, reduction, direction):
    ours, theirs, options = case(outside, spans=3, bias=True, weights=True)
    options |= {**OBJECTIVES[direction], **TRANSFORMS["both"]}

    def op(*leaves):
        return run(leaves, theirs, options, reduction=reduction)

    assert torch.autograd.gradcheck(op, ours, fast_mode=True)


@pytest.mark.cpu_only
@pytest.mark.parametrize("outside", OUTSIDE)
def test_gradcheck_of_the_reference(outside):
    ours, theirs, options = case(outside, spans=3, bias=True, weights=True)

    def op(*leaves):
        return eager(leaves, theirs, options, "none", torch.float64)[0]

    assert torch.autograd.gradcheck(op, ours, fast_mode=True)


# --- inputs ---


@pytest.mark.parametrize("outside", OUTSIDE)
def test_any_strides_and_another_dtype_of_the_teacher(outside):
    ours, theirs, options = case(outside)
    want = run(ours, theirs, options, reduction="none")
    turned = [ours[0].T.contiguous().T, ours[1].T.contiguous().T, None]
    got = run(turned, [x.T.contiguous().T for x in theirs], options, reduction="none")
    torch.testing.assert_close(got, want)
    kl = run(
        [ours[0].float(), ours[1].float(), None], [x.bfloat16() for x in theirs], options,
        reduction="none",
    )  # fmt: skip
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), want, rtol=0.1, atol=0.1)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_reference_backend_serves_and_differentiates(outside, reduction):
    ours, theirs, options = case(outside, bias=True, weights=True)
    loss = run(ours, theirs, options, reduction=reduction)
    with use_backend("reference"):
        want = run(ours, theirs, options, reduction=reduction)
    torch.testing.assert_close(loss, want)
    for a, b in zip(grads(loss.sum(), ours), grads(want.sum(), ours), strict=True):
        torch.testing.assert_close(a, b)


A, B = torch.tensor([0, 1]), torch.tensor([2, 0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "mean"}, ValueError, "reduction must be 'sum' or 'none', not 'mean'"),
        ({"temperature": -1.0}, ValueError, "temperature must be a positive number"),
        ({"vocab": None}, ValueError, "student has 4 vocabulary entries and the teacher 5"),
        ({"vocab": (A, B + 5)}, ValueError, r"teacher_ids.*\[0, 5\).*Found 7"),
        ({"span_weights": torch.ones(3)}, ValueError, r"span_weights has shape \[3\].*span: \[2\]"),
        ({"span_weights": torch.tensor([1, torch.nan])}, ValueError, r"span_weights\[1\] = nan"),
        ({"span_weights": torch.tensor([-1.0, 1])}, ValueError, r"span_weights\[0\] = -1"),
        ({"student_bias": torch.ones(3)}, ValueError, r"student_bias has shape \[3\].*\[4\]"),
        ({"student_bias": torch.ones(4).half()}, TypeError, "student_bias is torch.float16 but"),
        ({"student_softcap": 0.0}, ValueError, "student_softcap must be positive"),
        ({"teacher_scale": torch.ones(())}, TypeError, "teacher_scale and .* Python numbers"),
        ({"student": torch.randn(3, 6)}, ValueError, "student has 3 rows and teacher 2"),
        ({"student": torch.randn(2, 5)}, ValueError, r"student_head has shape \[4, 6\].*\[2, 5\]"),
        ({"student": torch.randn(2, 6).half()}, TypeError, r"student_head\.to\(student\.dtype\)"),
        ({"teacher": torch.randn(2, 7, device="meta")}, ValueError, "teacher_head is on cpu"),
    ],
)
def test_bad_input(options, error, message):
    given = {
        "student": torch.randn(2, 6), "student_head": torch.randn(4, 6),
        "teacher": torch.randn(2, 7), "teacher_head": torch.randn(5, 7),
        "temperature": 1.0, "direction": "forward", "vocab": (A, B), "reduction": "sum",
    }  # fmt: skip
    with pytest.raises(error, match=message):
        linear_span_kl(**given | options)
