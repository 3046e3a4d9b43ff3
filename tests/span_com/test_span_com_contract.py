"""span_com: the gradient contract line by line, memory, and torch's own checks."""

import pytest
import torch
from torch.library import opcheck

from sra_kernels import span_com
from sra_kernels.testing import (
    ragged_spans,
    real_lengths,
)
from tests.span_com.cases import CASES, inputs, seeded

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
