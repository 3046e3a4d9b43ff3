"""span_kl: the gradient contract line by line, memory, and torch's own checks."""

import pytest
import torch
from torch.library import opcheck

from sra_kernels import explain, span_kl, use_backend
from sra_kernels.span_kl import portable
from sra_kernels.testing import AllocatedMemory
from tests.span_kl.cases import EVERY, OBJECTIVES, OUTSIDE, VS, VT, S, case, eager

pytestmark = pytest.mark.usefixtures("backend")


# --- the gradient contract, in the order of the README ---


@pytest.mark.parametrize("outside", OUTSIDE)
def test_1_linear_in_any_upstream_gradient(outside):
    student, teacher, options = case(outside)
    kl = span_kl(student, teacher, temperature=1.0, direction="forward", **options)

    def run(g):
        return torch.autograd.grad(kl, student, g, retain_graph=True)[0]

    base = run(torch.ones_like(kl))
    factors = torch.tensor([3.0, -2.0, 0.0, 1.0, 0.5, -1.0], dtype=kl.dtype)
    torch.testing.assert_close(run(factors), factors[:, None] * base)
    torch.testing.assert_close(run(torch.tensor(2.0, dtype=kl.dtype).expand(S)), 2 * base)
    strided = torch.stack([factors, factors], 1)[:, 0]
    torch.testing.assert_close(run(strided), factors[:, None] * base)


def test_2_saved_tensors_are_not_mutated_and_a_second_backward_is_right():
    student, teacher, options = case("bucket")
    before = student.detach().clone(), teacher.clone()
    kl = span_kl(student, teacher, temperature=1.0, direction="forward", **options)
    (first,) = torch.autograd.grad(kl.sum(), student, retain_graph=True)
    (second,) = torch.autograd.grad(5 * kl.sum(), student)
    torch.testing.assert_close(second, 5 * first)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_4_only_what_is_asked_for():
    student, teacher, options = case("renormalise")
    options |= {"temperature": 1.0, "direction": "forward"}
    flat = [*options["vocab"], 1.0, "forward", None, "renormalise"]
    op = torch.ops.sra_kernels.span_kl_forward
    shapes = [x.shape for x in op(student.detach(), teacher, *flat, False, False)]
    assert shapes == [(S,), (0,), (0,)]
    with torch.no_grad():
        assert not span_kl(student, teacher, **options).requires_grad
    with torch.inference_mode():
        span_kl(student.detach(), teacher, **options)
    assert not span_kl(student.detach(), teacher, **options).requires_grad
    assert not span_kl(student, teacher, **options, return_shared_mass=True)[1].requires_grad


def test_5_a_teacher_that_requires_grad_is_an_error():
    student, teacher, options = case("renormalise")
    with pytest.raises(ValueError, match=r"teacher_logits requires grad.*detach"):
        span_kl(student, teacher.requires_grad_(), temperature=1.0, direction="forward", **options)
    with torch.no_grad():
        span_kl(student, teacher, temperature=1.0, direction="forward", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("outside", OUTSIDE)
def test_6_no_host_sync(outside):
    student, teacher, options = case(outside, torch.float32)
    want = span_kl(student, teacher, temperature=1.0, direction="forward", **options)
    student, teacher = student.detach().cuda().requires_grad_(), teacher.cuda()
    if "vocab" in options:
        options["vocab"] = tuple(ids.cuda() for ids in options["vocab"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        kl = span_kl(student, teacher, temperature=1.0, direction="forward", **options)
        kl.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(kl.cpu(), want)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_7_nothing_to_learn_from(outside):
    student, teacher, options = case(outside, spans=0)
    kl, mass = span_kl(
        student, teacher, temperature=1.0, direction="forward", **options, return_shared_mass=True
    )
    assert kl.shape == mass.shape == (0,)
    assert torch.autograd.grad(kl.sum(), student)[0].shape == (0, VS)
    student, teacher, options = case(outside)
    teacher[2] = -torch.inf
    kl = span_kl(student, teacher, temperature=1.0, direction="forward", **options)
    (grad,) = torch.autograd.grad(kl.sum(), student)
    assert kl[2] == 0
    assert grad[2].abs().max() == 0
    assert grad.isfinite().all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("outside", OUTSIDE)
def test_8_same_input_same_bits_for_any_block(outside, monkeypatch):
    student, teacher, options = case(outside, torch.float32)
    seen = []
    for size in (2**20, 2**20, 1, 4 * VT * 4):
        monkeypatch.setitem(portable.BLOCK_BYTES, "cpu", size)
        kl = span_kl(student, teacher, temperature=1.0, direction="forward", **options)
        seen.append((kl, torch.autograd.grad(kl.sum(), student)[0]))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, seen[0], strict=True))


def test_9_row_addresses_are_64_bit():
    """Teacher rows 2^31 elements apart, in virtual memory: only the rows' own pages are touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 16), (2**31, 1))
    near = torch.randn(2, 16).bfloat16()
    far.copy_(near)
    student = torch.randn(2, 16).bfloat16()
    options = {"temperature": 1.0, "direction": "forward"}
    assert torch.equal(span_kl(student, far, **options), span_kl(student, near, **options))


def test_10_double_backward_raises():
    student, teacher, options = case("renormalise")
    kl = span_kl(student, teacher, temperature=1.0, direction="forward", **options)
    (first,) = torch.autograd.grad(kl.square().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.cpu_only
def test_memory_of_the_torch_backend_is_the_gradient_and_one_block():
    student, teacher = torch.randn(400, 5000), torch.randn(400, 5000)
    options = {"temperature": 1.0, "direction": "jsd", "beta": 0.5}
    with use_backend("torch"):
        with AllocatedMemory() as memory:
            span_kl(student, teacher, **options)
        assert memory.largest == 4 * portable.block_rows(5000, student.device) * 5000
        assert memory.peak < explain(span_kl, student, teacher, **options).peak_bytes
        student.requires_grad_()
        with AllocatedMemory() as memory:
            span_kl(student, teacher, **options).sum().backward()
        predicted = explain(span_kl, student, teacher, **options).peak_bytes
    assert 0.6 * predicted < memory.peak <= predicted


@pytest.mark.cpu_only
@pytest.mark.parametrize("direction", OBJECTIVES)
def test_the_backend_may_change_between_forward_and_backward(direction):
    for first, then in (("auto", "torch"), ("torch", "auto")):
        student, teacher, options = case("weight")
        options |= {"temperature": 1.5, **OBJECTIVES[direction]}
        with use_backend(first):
            kl = span_kl(student, teacher, **options)
        with use_backend(then):
            (got,) = torch.autograd.grad(kl.sum(), student)
        want = torch.autograd.grad(eager(student, teacher, **options)[0].sum(), student)[0]
        torch.testing.assert_close(got, want)


# --- torch's own checks ---


@pytest.mark.parametrize(("outside", "direction"), EVERY)
@pytest.mark.parametrize("spans", [0, S])
def test_opcheck(outside, direction, spans):
    student, teacher, options = case(outside, torch.float32, spans)
    ids = options.get("vocab", (None, None))
    beta = OBJECTIVES[direction].get("beta")
    op = torch.ops.sra_kernels.span_kl_forward.default
    args = (*ids, 1.5, direction, beta, options.get("outside", "renormalise"))
    for needs in ((True, True), (False, False)):
        opcheck(op, (student.detach(), teacher, *args, *needs))
    _, _, stats = op(student.detach(), teacher, *args, False, True)
    backward = torch.ops.sra_kernels.span_kl_backward.default
    opcheck(backward, (torch.randn(spans), stats, student.detach(), teacher, *args))


@pytest.mark.parametrize("outside", OUTSIDE)
def test_compiles_without_a_break_and_for_any_number_of_spans(outside):
    torch._dynamo.reset()
    student, teacher, options = case(outside, torch.float32, 12)
    options |= {"temperature": 2.0, "direction": "forward"}

    def loss(student, teacher):
        kl, mass = span_kl(student, teacher, **options, return_shared_mass=True)
        return (kl * mass).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for spans in (3, 12, 5):
            x, t = student.detach()[:spans].requires_grad_(), teacher[:spans]
            (got,) = torch.autograd.grad(compiled(x, t), x)
            (want,) = torch.autograd.grad(loss(x, t), x)
            torch.testing.assert_close(got, want)


def test_compiles_with_one_tensor_of_ids_for_both_sides():
    student, teacher, ids = (
        torch.randn(3, 9, requires_grad=True),
        torch.randn(3, 9),
        torch.arange(5),
    )

    def loss(student):
        options = {"temperature": 1.0, "direction": "reverse", "vocab": (ids, ids)}
        return span_kl(student, teacher, **options).sum()

    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(student), student)
    torch.testing.assert_close(got, torch.autograd.grad(loss(student), student)[0])


def test_a_raw_operator_refuses_to_be_differentiated():
    student, teacher, _ = case("one vocabulary")
    args = (None, None, 1.0, "forward", None, "renormalise", False, True)
    with pytest.raises(RuntimeError, match=r"Call sra_kernels\.span_kl"):
        torch.ops.sra_kernels.span_kl_forward(student, teacher, *args)
