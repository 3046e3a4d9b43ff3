"""span_com against float64, line by line of the gradient contract, on every backend."""

import pytest
import torch
from torch.library import opcheck

from sra_kernels import span_com
from sra_kernels.span_com.reference import span_com as reference
from sra_kernels.testing import (
    DTYPES,
    assert_as_good_as_torch,
    ragged_spans,
    real_lengths,
)


def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


CASES = {
    "ones": ragged_spans([1] * 9),
    "mixed, touching": ragged_spans([1, 3, 2, 16, 1, 4, 5]),
    "gaps and an offset": ragged_spans([2, 1, 7], gap=3, offset=2),
    "overlapping": ragged_spans([5, 5, 5, 9], gap=-3),
    "the same span twice": torch.tensor([[2, 6], [2, 6], [2, 7]]),
    "empty among others": ragged_spans([0, 2, 0, 0, 3, 0]),
    "all empty": ragged_spans([0, 0]),
    "none": ragged_spans([]),
    "one long": ragged_spans([1, 700, 2]),
    "just over a GPU's piece": ragged_spans([65] * 12, gap=1),
    "as in real text": ragged_spans(real_lengths(200, seeded(0))),
}


def inputs(spans, dim=37, extra=3, dtype=torch.float64, weighted=True):
    rows = (int(spans.max()) if len(spans) else 4) + extra
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    weights = torch.rand(rows, dtype=wide, requires_grad=True) if weighted else None
    return hidden, weights


def grads(outputs, inputs, upstream):
    given = [x for x in inputs if x is not None]
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in pairs], given, [g for _, g in pairs], allow_unused=True
    )


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


# --- the gradient contract, in the order of the README ---


def test_1_linear_in_any_upstream_gradient(backend):
    spans = CASES["mixed, touching"]
    hidden, weights = inputs(spans)
    com, mass = span_com(hidden, spans, weights)
    one = torch.randn_like(com)

    def run(g):
        return torch.autograd.grad((com, mass), (hidden, weights), (g, mass * 0), retain_graph=True)

    base = run(one)
    for factor in (3.0, -2.0, 0.0):
        for a, b in zip(run(factor * one), base, strict=True):
            torch.testing.assert_close(a, factor * b)
    rows = torch.randn(len(spans), 1, dtype=com.dtype)
    for odd in (rows.expand_as(com), one.T.contiguous().T, torch.cat([one, one], 1)[:, ::2]):
        for a, b in zip(run(odd), run(odd.contiguous().clone()), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_2_saved_tensors_are_not_mutated_and_a_second_backward_is_right(backend):
    spans = CASES["overlapping"]
    hidden, weights = inputs(spans)
    before = hidden.detach().clone(), weights.detach().clone()
    com, _ = span_com(hidden, spans, weights)
    first = torch.autograd.grad(com.sum(), (hidden, weights), retain_graph=True)
    second = torch.autograd.grad((5 * com).sum(), (hidden, weights))
    for a, b in zip(second, first, strict=True):
        torch.testing.assert_close(a, 5 * b)
    assert torch.equal(hidden, before[0])
    assert torch.equal(weights, before[1])


def test_4_only_what_is_asked_for(backend, monkeypatch):
    spans = CASES["mixed, touching"]
    hidden, weights = inputs(spans)
    wanted = []
    from sra_kernels.span_com import autograd

    real = autograd.ops.span_com_backward

    class Spy:
        span_com_forward = staticmethod(autograd.ops.span_com_forward)

        @staticmethod
        def span_com_backward(*args):
            wanted.append(args[-2:])
            return real(*args)

    monkeypatch.setattr(autograd, "ops", Spy)
    span_com(hidden, spans, weights.detach())[0].sum().backward()
    span_com(hidden.detach(), spans, weights)[0].sum().backward()
    assert wanted == [(True, False), (False, True)]
    assert not span_com(hidden.detach(), spans, weights.detach())[0].requires_grad
    assert not span_com(hidden, spans, weights.detach())[1].requires_grad
    with torch.no_grad():
        assert not span_com(hidden, spans, weights)[0].requires_grad
    with torch.inference_mode():
        span_com(hidden.detach(), spans, weights.detach())


@pytest.mark.gpu
def test_6_no_host_sync():
    spans = CASES["overlapping"].cuda()
    hidden, weights = inputs(CASES["overlapping"], dtype=torch.float32)
    hidden, weights = hidden.detach().cuda().requires_grad_(), weights.detach().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        span_com(hidden, spans, weights)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_7_nothing_to_learn_from(backend):
    spans = CASES["mixed, touching"]
    hidden, weights = inputs(spans)
    empty, _ = span_com(hidden, CASES["none"], weights)
    assert torch.autograd.grad(empty.sum(), hidden)[0].abs().max() == 0
    zero = torch.zeros_like(weights).requires_grad_()
    com, mass = span_com(hidden, spans, zero)
    assert mass.abs().max() == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(com.sum(), (hidden, zero)))


@pytest.mark.cpu_only
def test_8_same_input_same_bits_for_any_number_of_threads(backend):
    spans = ragged_spans([*real_lengths(300, seeded(1)), 900, 1, 5])
    hidden, weights = inputs(spans, dim=640, dtype=torch.float32)
    seen = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        com, mass = span_com(hidden, spans, weights)
        seen.append((com, mass, *torch.autograd.grad(com.sin().sum(), (hidden, weights))))
    torch.set_num_threads(before)
    if backend == "cpu":
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, seen[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[4], strict=True))


def test_9_row_addresses_are_64_bit(backend):
    """A row stride of 2^30 elements puts the third row past 2^31. Only the rows that are touched
    take memory: the rest of the 4 GiB is address space."""
    hidden = torch.empty(2**31 + 4, dtype=torch.bfloat16).as_strided((3, 4), (2**30, 1))
    hidden.copy_(torch.arange(12).reshape(3, 4))
    com, _ = span_com(hidden, torch.tensor([[0, 1], [1, 3]]))
    assert com.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]


def test_10_double_backward_raises(backend):
    spans = CASES["ones"]
    hidden, _ = inputs(spans)
    com, _ = span_com(hidden, spans)
    (first,) = torch.autograd.grad(com.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# --- torch's own checks ---


@pytest.mark.parametrize("name", ["mixed, touching", "overlapping", "all empty", "none"])
def test_opcheck(backend, name):
    spans = CASES[name]
    hidden, weights = (x.detach() for x in inputs(spans, dtype=torch.float32))
    ops = torch.ops.sra_kernels
    for w in (weights, None):
        opcheck(ops.span_com_forward.default, (hidden, spans, w))
        com, mass = ops.span_com_forward(hidden, spans, w)
        args = (torch.randn_like(com), torch.randn_like(mass), spans, w, mass)
        opcheck(ops.span_com_backward.default, (*args, None, len(hidden), True, False))
        opcheck(ops.span_com_backward.default, (*args, hidden, len(hidden), True, True))


def test_compiles_without_a_break_and_for_any_length(backend):
    def loss(hidden, weights, spans):
        com, mass = span_com(hidden, spans, weights)
        return com.float().square().sum() + mass.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([1, 2, 3], [4, 1, 1, 2], [2] * 7):
            spans = ragged_spans(lengths)
            hidden, weights = inputs(spans, dtype=torch.float32)
            got = torch.autograd.grad(compiled(hidden, weights, spans), (hidden, weights))
            want = torch.autograd.grad(loss(hidden, weights, spans), (hidden, weights))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_raw_operator_refuses_to_be_differentiated():
    hidden, _ = inputs(CASES["ones"])
    with pytest.raises(RuntimeError, match=r"Call sra_kernels\.span_com"):
        torch.ops.sra_kernels.span_com_forward(hidden, CASES["ones"], None)


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
