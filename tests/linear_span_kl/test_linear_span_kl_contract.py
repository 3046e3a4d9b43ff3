"""linear_span_kl: the gradient contract line by line, memory, and torch's own checks."""

import math

import pytest
import torch
from torch.library import opcheck

from sra_kernels import explain, linear_span_kl, use_backend
from sra_kernels.testing import AllocatedMemory
from tests.linear_span_kl.cases import (
    EVERY,
    OUTSIDE,
    S,
    case,
    cut,
    grads,
    run,
)

pytestmark = pytest.mark.usefixtures("backend")


# --- the gradient contract, in the order of the README ---


@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_1_linear_in_any_upstream_gradient(outside, reduction):
    ours, theirs, options = case(outside, bias=True, weights=True)
    loss = run(ours, theirs, options, reduction=reduction)
    base = grads(loss, ours, torch.ones_like(loss))
    for factor in (3.0, -2.0, 0.0):
        for a, b in zip(grads(loss, ours, torch.full_like(loss, factor)), base, strict=True):
            torch.testing.assert_close(a, factor * b)
    if reduction == "sum":
        return
    one_by_one = [grads(loss, ours, row) for row in torch.eye(S, dtype=loss.dtype)]
    factors = torch.tensor([1.0, -3.0, 0.0, 0.5, 2.0, -1.0], dtype=loss.dtype)
    strided = torch.stack([factors, factors], 1)[:, 1]
    for upstream in (factors, strided):
        for i, got in enumerate(grads(loss, ours, upstream)):
            want = sum(f * g[i] for f, g in zip(factors, one_by_one, strict=True))
            torch.testing.assert_close(got, want)
    expanded = grads(loss, ours, torch.ones((), dtype=loss.dtype).expand(S))
    for a, b in zip(expanded, base, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_2_saved_tensors_are_not_mutated_and_a_second_backward_is_right(outside, reduction):
    ours, theirs, options = case(outside, bias=True, weights=True)
    every = [*ours, *theirs, options["span_weights"]]
    before = [x.detach().clone() for x in every]
    loss = run(ours, theirs, options, reduction=reduction).sum()
    first, second = grads(loss, ours), grads(5 * loss, ours)
    for a, b in zip(second, first, strict=True):
        torch.testing.assert_close(a, 5 * b)
    assert all(torch.equal(x, y) for x, y in zip(every, before, strict=True))


def test_3_the_gradient_of_the_head_accumulates_in_float32(monkeypatch):
    """64 chunks of one repeated bfloat16 state: a bfloat16 sum would stop growing."""
    cut(monkeypatch, rows=1, chunk_bytes=1)
    student = torch.ones(640, 8, dtype=torch.bfloat16, requires_grad=True)
    head = torch.zeros(3, 8, dtype=torch.bfloat16, requires_grad=True)
    teacher, teacher_head = torch.ones(640, 1).bfloat16(), torch.tensor([[2.0], [0.0], [0.0]])
    loss = linear_span_kl(
        student, head, teacher, teacher_head.bfloat16(), temperature=1.0, direction="forward",
        reduction="sum",
    )  # fmt: skip
    loss.backward()
    p = math.exp(2) / (math.exp(2) + 2)
    torch.testing.assert_close(head.grad[0], torch.full((8,), 640 * (1 / 3 - p)).bfloat16())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_4_only_what_is_asked_for(reduction):
    ours, theirs, options = case("renormalise", torch.float32, bias=True)
    every = grads(run(ours, theirs, options, reduction=reduction).sum(), ours)
    for mask in range(1, 8):
        leaves = [x.detach().requires_grad_(bool(mask >> i & 1)) for i, x in enumerate(ours)]
        run(leaves, theirs, options, reduction=reduction).sum().backward()
        for i, (leaf, want) in enumerate(zip(leaves, every, strict=True)):
            if mask >> i & 1:
                torch.testing.assert_close(leaf.grad, want)
            else:
                assert leaf.grad is None
    assert not run([x.detach() for x in ours], theirs, options, reduction=reduction).requires_grad
    with torch.no_grad():
        assert not run(ours, theirs, options, reduction=reduction).requires_grad
    with torch.inference_mode():
        run([x.detach() for x in ours], theirs, options, reduction=reduction)


@pytest.mark.cpu_only
def test_4_products_and_buffers_that_are_not_needed_are_not_made():
    ours, theirs, options = case("renormalise", torch.float32, spans=300)

    def products(student, head):
        leaves = [ours[0].detach().requires_grad_(student), ours[1].detach().requires_grad_(head)]
        with (
            torch.profiler.profile() as profile,
            torch.set_grad_enabled(student or head),
        ):
            run([*leaves, None], theirs, options, reduction="sum")
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_"))

    assert products(False, False) == 2
    assert products(True, False) == products(False, True) == 3
    assert products(True, True) == 4


def test_5_a_constant_that_requires_grad_is_an_error():
    ours, theirs, options = case("renormalise", bias=True, weights=True)
    for i, name in enumerate(("teacher", "teacher_head")):
        bad = [x.clone().requires_grad_(i == j) for j, x in enumerate(theirs)]
        with pytest.raises(ValueError, match=rf"^{name} requires grad.*{name}\.detach"):
            run(ours, bad, options, reduction="sum")
        with torch.no_grad():
            run(ours, bad, options, reduction="sum")
    for name in ("teacher_bias", "span_weights"):
        bad = options | {name: options[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=rf"^{name} requires grad.*{name}\.detach"):
            run(ours, theirs, bad, reduction="sum")


@pytest.mark.gpu
@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_6_no_host_sync(outside, reduction):
    ours, theirs, options = case(outside, torch.float32, weights=True)
    want = run(ours, theirs, options, reduction=reduction)
    options["span_weights"] = options["span_weights"].cuda()
    if "vocab" in options:
        options["vocab"] = tuple(ids.cuda() for ids in options["vocab"])
    ours = [x if x is None else x.detach().cuda().requires_grad_() for x in ours]
    theirs = [x.cuda() for x in theirs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = run(ours, theirs, options, reduction=reduction)
        loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), want)


@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_7_nothing_to_learn_from(outside, reduction):
    ours, theirs, options = case(outside, spans=0, bias=True, weights=True)
    loss = run(ours, theirs, options, reduction=reduction)
    assert loss.shape == (() if reduction == "sum" else (0,))
    for grad, x in zip(grads(loss.sum(), ours), ours, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()
    ours, theirs, options = case(outside, bias=True)
    options["span_weights"] = torch.zeros(S)
    loss = run(ours, theirs, options, reduction=reduction)
    assert not loss.any()
    assert not any(g.any() for g in grads(loss.sum(), ours))


@pytest.mark.parametrize(("outside", "reduction"), EVERY)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_7_a_span_of_weight_zero_may_hold_nan(outside, reduction, side):
    ours, theirs, options = case(outside, torch.float32, bias=True, weights=True)
    assert options["span_weights"][1] == 0
    want = run(ours, theirs, options, reduction=reduction)
    want_grads = grads(want.sum(), ours)
    with torch.no_grad():
        (ours[0] if side == "student" else theirs[0])[1] = torch.nan
    loss = run(ours, theirs, options, reduction=reduction)
    torch.testing.assert_close(loss, want)
    for a, b in zip(grads(loss.sum(), ours), want_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_8_same_bits_for_the_same_chunks_and_the_same_numbers_for_any(
    outside, reduction, monkeypatch
):
    ours, theirs, options = case(outside, torch.float32, spans=50, bias=True, weights=True)

    def once():
        loss = run(ours, theirs, options, reduction=reduction)
        return loss, *grads(loss.sum(), ours)

    first = once()
    assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))
    cut(monkeypatch, chunk_bytes=1)
    for rows in (1, 7, 49, 50):
        cut(monkeypatch, rows=rows)
        for a, b in zip(once(), first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_9_row_addresses_are_64_bit():
    """Rows of the teacher's head 2^31 elements apart, in virtual memory."""
    near = torch.randn(2, 16).bfloat16()
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 16), (2**31, 1))
    far.copy_(near)
    student, head = torch.randn(3, 8).bfloat16(), torch.randn(2, 8).bfloat16()
    teacher = torch.randn(3, 16).bfloat16()
    options = {"temperature": 1.0, "direction": "forward", "reduction": "none"}
    a = linear_span_kl(student, head, teacher, far, **options)
    assert torch.equal(a, linear_span_kl(student, head, teacher, near, **options))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_10_double_backward_raises(reduction):
    ours, theirs, options = case("renormalise")
    loss = run(ours, theirs, options, reduction=reduction)
    (first,) = torch.autograd.grad(loss.square().sum(), ours[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# --- memory ---


@pytest.mark.cpu_only
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)], ids=str)
def test_memory_stays_under_the_plan_and_no_logits_are_whole(outside, dtype, learns, monkeypatch):
    cut(monkeypatch, chunk_bytes=4 << 20)
    spans, ours, theirs, shared, width = 1500, 3000, 4000, 2000, 64
    student = torch.randn(spans, width).to(dtype).requires_grad_(learns[0])
    head = torch.randn(ours, width).div(4).to(dtype).requires_grad_(learns[1])
    teacher = torch.randn(spans, 40).to(dtype)
    theirs = ours if outside == "one vocabulary" else theirs
    teacher_head = torch.randn(theirs, 40).to(dtype)
    options = {"temperature": 1.0, "direction": "forward"}
    if outside != "one vocabulary":
        options |= {"vocab": (torch.arange(shared),) * 2, "outside": outside}
    for reduction in ("sum", "none"):
        args, kwargs = (student, head, teacher, teacher_head), options | {"reduction": reduction}
        with AllocatedMemory() as memory:
            linear_span_kl(*args, **kwargs).sum().backward()
        with use_backend("torch"):
            plan = explain(linear_span_kl, *args, **kwargs)
        assert 0.6 * plan.peak_bytes < memory.peak <= plan.peak_bytes
        whole = spans * shared * (2 if dtype == torch.bfloat16 else 4)
        assert memory.largest < whole / 2
        assert "chunks of" in str(plan)


@pytest.mark.cpu_only
def test_the_plan_reads_shapes_only():
    meta = {"device": "meta", "dtype": torch.bfloat16}
    plan = explain(
        linear_span_kl, torch.empty(8192, 2048, **meta), torch.empty(128_256, 2048, **meta),
        torch.empty(8192, 4096, **meta), torch.empty(128_256, 4096, **meta),
        temperature=1.0, direction="forward", reduction="sum",
    )  # fmt: skip
    assert plan.peak_bytes < 2**28  # against 2 GiB for one logit matrix


# --- torch's own checks ---


def raw(ours, theirs, options):
    o = {"outside": "renormalise", "vocab": (None, None)} | options
    scales = (0.5, 3.0, None, None)
    tensors = (*ours, *theirs, o.get("teacher_bias"), *o["vocab"], o.get("span_weights"))
    detached = [None if x is None else x.detach() for x in tensors]
    return *detached, *scales, o["temperature"], o["direction"], None, o["outside"]


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("spans", [0, S])
def test_opcheck(outside, spans):
    for full in (True, False):
        args = raw(*case(outside, torch.float32, spans, bias=full, weights=full))
        ops = torch.ops.sra_kernels
        opcheck(ops.linear_span_kl_forward.default, (*args, True, True, True, full))
        opcheck(ops.linear_span_kl_forward.default, (*args, False, False, False, False))
        grad = torch.randn(spans)
        opcheck(ops.linear_span_kl_backward.default, (grad, *args, True, True, full))
        opcheck(ops.linear_span_kl_backward.default, (grad, *args, False, True, False))


@pytest.mark.parametrize(("outside", "reduction"), EVERY)
def test_compiles_without_a_break_and_for_any_number_of_spans(outside, reduction):
    torch._dynamo.reset()
    ours, theirs, options = case(outside, torch.float32, 12, bias=True)
    weights = torch.rand(12)

    def loss(student, head, bias, teacher, weights):
        kl, mass = linear_span_kl(
            student, head, teacher, theirs[1], student_bias=bias, span_weights=weights,
            reduction=reduction, return_shared_mass=True, **options,
        )  # fmt: skip
        return (kl * mass).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for spans in (3, 12, 5):
            leaves = [ours[0].detach()[:spans].requires_grad_(), *ours[1:]]
            args = (*leaves, theirs[0][:spans], weights[:spans])
            got = torch.autograd.grad(compiled(*args), leaves)
            want = torch.autograd.grad(loss(*args), leaves)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)


def test_a_raw_operator_refuses_to_be_differentiated():
    ours, theirs, options = case("renormalise")
    args = list(raw(ours, theirs, options))
    args[1] = ours[1]
    with pytest.raises(RuntimeError, match=r"Call sra_kernels\.linear_span_kl"):
        torch.ops.sra_kernels.linear_span_kl_forward(*args, False, True, True, False)
