"""span_geometry: the gradient contract line by line, memory, and torch's own checks."""

import pytest
import torch
from torch.library import opcheck

from sra_kernels import explain, span_geometry, use_backend
from sra_kernels.span_geometry import portable
from sra_kernels.span_geometry.reference import span_geometry as reference
from sra_kernels.testing import AllocatedMemory
from tests.span_geometry.cases import COUNTS, case

pytestmark = pytest.mark.usefixtures("backend")


# --- the gradient contract, in the order of the README ---


def test_1_linear_in_any_upstream_gradient():
    student, teacher, weights, offsets = case(COUNTS["several"])
    loss = span_geometry(student, teacher, weights, offsets)

    def run(g):
        return torch.autograd.grad(loss, student, g, retain_graph=True)[0]

    base = run(torch.ones_like(loss))
    factors = torch.tensor([3.0, -2.0, 0.0, 0.5], dtype=loss.dtype)
    rows = factors.repeat_interleave(offsets.diff())[:, None]
    torch.testing.assert_close(run(factors), rows * base)
    torch.testing.assert_close(run(torch.stack([factors, factors], 1)[:, 1]), rows * base)
    torch.testing.assert_close(run(torch.tensor(-2.0, dtype=loss.dtype).expand(4)), -2 * base)


def test_2_saved_tensors_are_not_mutated_and_a_second_backward_is_right():
    every = case(COUNTS["several"])
    before = [x.detach().clone() for x in every]
    loss = span_geometry(*every)
    (first,) = torch.autograd.grad(loss.sum(), every[0], retain_graph=True)
    (second,) = torch.autograd.grad(5 * loss.sum(), every[0])
    torch.testing.assert_close(second, 5 * first)
    assert all(torch.equal(x, y) for x, y in zip(every, before, strict=True))


def test_4_only_what_is_asked_for():
    student, *rest = case(COUNTS["several"])
    forward = torch.ops.sra_kernels.span_geometry_forward
    assert forward(student.detach(), *rest, False)[1].shape == (0,)
    assert not span_geometry(student.detach(), *rest).requires_grad
    with torch.no_grad():
        assert not span_geometry(student, *rest).requires_grad
    with torch.inference_mode():
        span_geometry(student.detach(), *rest)


@pytest.mark.parametrize("which", ["teacher", "weights"])
def test_5_a_constant_that_requires_grad_is_an_error(which):
    student, teacher, weights, offsets = case([3])
    {"teacher": teacher, "weights": weights}[which].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{which} requires grad.*{which}\.detach"):
        span_geometry(student, teacher, weights, offsets)


@pytest.mark.gpu
def test_6_no_host_sync():
    student, *rest = case(COUNTS["several"], torch.float32)
    want = span_geometry(student, *rest)
    student, rest = student.detach().cuda().requires_grad_(), [x.cuda() for x in rest]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with use_backend("auto"):
            loss = span_geometry(student, *rest)
        loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), want)


@pytest.mark.parametrize("name", ["no spans", "only singles", "no samples"])
def test_7_nothing_to_learn_from(name):
    student, teacher, weights, offsets = case(COUNTS[name])
    loss = span_geometry(student, teacher, weights, offsets)
    assert loss.tolist() == [0.0] * len(COUNTS[name])
    assert not torch.autograd.grad(loss.sum(), student)[0].any()


def test_7_weights_of_zero():
    student, teacher, weights, offsets = case([4, 3, 3])
    weights[:4] = 0  # a sample without weight
    weights[5:7] = 0  # a sample with all weight on one span
    loss = span_geometry(student, teacher, weights, offsets)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss[:2].tolist() == [0, 0]
    assert loss[2] > 0
    assert not grad[:7].any()
    assert grad.isfinite().all()


def test_7_a_zero_vector_has_cosine_zero_and_no_gradient():
    student, teacher, weights, offsets = case([4])
    with torch.no_grad():
        student[1] = 0
        teacher[2] = 0
    loss = span_geometry(student, teacher, weights, offsets)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    want = reference(student, teacher, weights, offsets)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), student)[0])
    assert not grad[1].any()


def test_7_a_span_of_weight_zero_may_hold_nan():
    student, teacher, weights, offsets = case([4, 3])
    weights[2] = 0
    want = span_geometry(student, teacher, weights, offsets)
    with torch.no_grad():
        student[2] = torch.nan
        teacher[2] = torch.inf
    loss = span_geometry(student, teacher, weights, offsets)
    torch.testing.assert_close(loss, want)
    assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


def test_8_same_bits_again_and_the_same_numbers_for_any_chunk(monkeypatch):
    student, teacher, weights, offsets = case([30, 2, 0, 40], torch.float32)

    def once():
        loss = span_geometry(student, teacher, weights, offsets)
        return loss, torch.autograd.grad(loss.sum(), student)[0]

    first = once()
    assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))
    for rows in (1, 7, 71, 72):
        monkeypatch.setattr(portable, "CPU_ROWS", rows)
        for a, b in zip(once(), first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_10_double_backward_raises():
    student, teacher, weights, offsets = case([4])
    loss = span_geometry(student, teacher, weights, offsets)
    (first,) = torch.autograd.grad(loss.square().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_memory_stays_under_the_plan():
    student, *rest = case([1500, 1500], torch.float32)
    with use_backend("torch"), AllocatedMemory() as memory:
        span_geometry(student, *rest).sum().backward()
        plan = explain(span_geometry, student, *rest)
    assert 0.4 * plan.peak_bytes < memory.peak <= plan.peak_bytes
    assert memory.largest <= 4 * portable.CPU_ROWS * 1500 * 2


# --- torch's own checks ---


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_opcheck(counts):
    student, *rest = case(counts, torch.float32)
    for need_grad in (True, False):
        op = torch.ops.sra_kernels.span_geometry_forward.default
        opcheck(op, (student.detach(), *rest, need_grad))


def test_compiles_without_a_break_and_for_any_number_of_spans():
    def loss(student, teacher, weights, offsets):
        return span_geometry(student, teacher, weights, offsets).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ([3, 4], [2, 2, 5], [7, 1, 1, 3]):
            args = case(counts, torch.float32)
            (got,) = torch.autograd.grad(compiled(*args), args[0])
            (want,) = torch.autograd.grad(loss(*args), args[0])
            torch.testing.assert_close(got, want)


def test_a_raw_operator_refuses_to_be_differentiated():
    with pytest.raises(RuntimeError, match=r"Call sra_kernels\.span_geometry"):
        torch.ops.sra_kernels.span_geometry_forward(*case([3]), True)
