"""span_com against float64 and by hand, on every backend; inputs good and bad."""

import pytest
import torch

from sra_kernels import span_com
from sra_kernels.span_com.reference import span_com as reference
from sra_kernels.testing import (
    DTYPES,
    assert_as_good_as_torch,
)
from tests.span_com.cases import CASES, grads, inputs


@pytest.mark.parametrize("spans", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_matches_float64(backend, poison, spans, dtype, weighted):
    hidden, weights = inputs(spans, dtype=dtype, weighted=weighted)
    upstream = (
        torch.randn(len(spans), 37).to(dtype),
        torch.randn(len(spans)).to(torch.float64 if dtype == torch.float64 else torch.float32),
    )

    def run(op, wide):
        h = hidden.detach().to(wide).requires_grad_()
        w = weights
        if w is not None:
            w = w.detach()
            w = (w.double() if wide == torch.float64 else w).requires_grad_()
        out = op(h, spans, w)
        up = upstream[0].to(out[0].dtype), upstream[1].to(out[1].dtype)
        got = grads(out, (h, w), up) if out[0].requires_grad else ()
        return [x for x in (*out, *got) if x is not None]

    exact, plain, ours = (
        run(reference, torch.float64),
        run(reference, dtype),
        run(span_com, dtype),
    )
    assert len(ours) == len(exact)
    for name, a, b, c in zip(
        ("com", "mass", "hidden", "weights"), ours, plain, exact, strict=False
    ):
        assert_as_good_as_torch(a, b, c, name)


@pytest.mark.parametrize("dim", [1, 7, 64, 513, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_width(backend, poison, dim, dtype):
    spans = CASES["mixed, touching"]
    hidden, weights = inputs(spans, dim=dim, dtype=dtype)
    com, _ = span_com(hidden, spans, weights)
    exact, _ = reference(hidden.double(), spans, weights.double())
    plain, _ = reference(hidden, spans, weights)
    assert_as_good_as_torch(com, plain, exact)


def test_by_hand(backend):
    hidden = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], requires_grad=True)
    weights = torch.tensor([1.0, 3.0, 0.0, 0.0], requires_grad=True)
    com, mass = span_com(hidden, torch.tensor([[0, 2], [2, 4]]), weights)
    assert com.tolist() == [[2.5, 3.0], [6.0, 7.0]]  # the second span has no mass: its plain mean
    assert mass.tolist() == [4.0, 0.0]
    com.sum().backward()
    assert hidden.grad.tolist() == [[0.25, 0.25], [0.75, 0.75], [0.5, 0.5], [0.5, 0.5]]
    # dw_0 = ((1 - 2.5) + (0 - 3)) / 4, dw_1 = ((3 - 2.5) + (4 - 3)) / 4
    assert weights.grad.tolist() == [-1.125, 0.375, 0.0, 0.0]


def test_gradcheck(backend):
    for name in ("mixed, touching", "overlapping", "empty among others", "none"):
        hidden, weights = inputs(CASES[name], dim=3)
        assert torch.autograd.gradcheck(
            lambda h, w, s=CASES[name]: span_com(h, s, w),
            (hidden, weights),
            fast_mode=backend == "interpreter",  # 700 calls otherwise
        )


def test_gradcheck_of_the_reference():
    hidden, weights = inputs(CASES["overlapping"], dim=3)
    assert torch.autograd.gradcheck(
        lambda h, w: reference(h, CASES["overlapping"], w), (hidden, weights)
    )


# --- inputs ---


def test_rows_at_any_stride(backend):
    spans = CASES["mixed, touching"]
    wide = torch.randn(40, 2 * 37, dtype=torch.float64)
    for hidden in (wide[:, :37], wide[:, ::2], wide.T.contiguous().T[:, :37], wide[::1, 37:]):
        a, _ = span_com(hidden, spans)
        b, _ = span_com(hidden.contiguous(), spans)
        assert torch.equal(a, b)


def test_int32_spans(backend):
    spans = CASES["overlapping"]
    hidden, weights = inputs(spans)
    assert torch.equal(
        span_com(hidden, spans.int(), weights)[0], span_com(hidden, spans, weights)[0]
    )


def test_nan_outside_the_spans_does_not_leak(backend):
    spans = torch.tensor([[1, 3], [4, 6]])
    hidden = torch.randn(8, 5)
    hidden[[0, 3, 6, 7]] = torch.nan
    hidden.requires_grad_()
    com, _ = span_com(hidden, spans)
    com.sum().backward()
    assert com.isfinite().all()
    assert hidden.grad[[0, 3, 6, 7]].abs().max() == 0


@pytest.mark.parametrize(
    ("spans", "weights", "error", "message"),
    [
        ([[3, 2]], None, ValueError, r"spans\[0\] = \[3, 2\].*half-open"),
        ([[0, 1], [0, 9]], None, ValueError, r"spans\[1\] = \[0, 9\] after \[0, 1\].*within 0..5"),
        ([[2, 3], [1, 4]], None, ValueError, r"spans\[1\].*never decrease"),
        ([[-1, 2]], None, ValueError, r"spans\[0\]"),
        ([[0, 2]], [1, 1, float("nan"), 1, 1], ValueError, r"weights\[2\] = nan"),
        ([[0, 2]], [1, 1, 1, -1, 1], ValueError, r"weights\[3\] = -1"),
        ([[0, 2]], [1, 1], ValueError, r"weights has shape \[2\].*\[5\]"),
        ([0, 2], None, ValueError, r"spans has shape \[2\]; it must be \[any, 2\]"),
        ([[0.0, 2.0]], None, TypeError, "int32 or int64"),
    ],
)
def test_bad_input(backend, spans, weights, error, message):
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    with pytest.raises(error, match=message):
        span_com(torch.randn(5, 3), torch.tensor(spans), weights)


def test_bad_hidden():
    spans = torch.tensor([[0, 1]])
    with pytest.raises(TypeError, match=r"hidden is torch.int64.*hidden.float\(\)"):
        span_com(torch.zeros(2, 2, dtype=torch.int64), spans)
    with pytest.raises(ValueError, match="2 dimensions, not 3"):
        span_com(torch.zeros(2, 2, 2), spans)
    with pytest.raises(ValueError, match="spans is on meta but hidden is on cpu"):
        span_com(torch.zeros(2, 2), spans.to("meta"))
