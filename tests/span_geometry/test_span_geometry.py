"""span_geometry against float64 and by hand, on every backend; inputs good and bad."""

import math

import pytest
import torch

from sra_kernels import check, library, span_geometry, use_backend
from sra_kernels.span_geometry import cpu, portable
from sra_kernels.span_geometry.reference import span_geometry as reference
from sra_kernels.testing import DTYPES, assert_as_good_as_torch
from tests.span_geometry.cases import COUNTS, case, needs_cpp

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(poison, counts, dtype):
    student, teacher, weights, offsets = case(counts, dtype)
    upstream = torch.randn(len(counts), dtype=torch.float64)

    def run(op, wide):
        x = student.detach().to(wide).requires_grad_()
        w = weights.double() if wide == torch.float64 else weights
        loss = op(x, teacher.to(wide), w, offsets)
        if not counts:
            return loss, torch.zeros_like(x)
        return loss, torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0]

    exact, plain, ours = (
        run(reference, torch.float64),
        run(reference, dtype),
        run(span_geometry, dtype),
    )
    assert ours[0].dtype == weights.dtype
    assert ours[1].dtype == dtype
    for name, a, b, c in zip(("loss", "gradient"), ours, plain, exact, strict=True):
        assert_as_good_as_torch(a, b, c, name)


def test_by_hand():
    # Student: a right angle and 45 degrees; teacher: all three in one direction.
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0], [5.0], [2.0]])
    weights = torch.tensor([1.0, 1.0, 2.0])
    loss = span_geometry(student, teacher, weights, torch.tensor([0, 3]))
    near = (math.sqrt(0.5) - 1) ** 2
    # ordered pairs: 2 (1·1·1 + 1·2·near + 1·2·near) over 2 (1 + 2 + 2)
    assert loss.item() == pytest.approx((1 + 4 * near) / 5)
    loss.sum().backward()
    # d/dS_0 = 2/10 · 2 Σ_j λ_j e_0j (u_j − cos u_0) / |S_0|; only the second axis is left
    pull = 1 * (0 - 1) * 1 + 2 * (math.sqrt(0.5) - 1) * math.sqrt(0.5)
    assert student.grad[0].tolist() == pytest.approx([0.0, 4 / 10 * pull / 2], abs=1e-7)


def test_gradcheck(backend):
    for counts in ([5, 2], [0, 3, 1]):
        student, teacher, weights, offsets = case(counts, ours=3)
        for op in (span_geometry, reference):
            assert torch.autograd.gradcheck(
                lambda x, op=op, rest=(teacher, weights, offsets): op(x, *rest),
                student,
                fast_mode=backend == "interpreter",
            )


def test_gradient_is_orthogonal_to_each_vector():
    student, teacher, weights, offsets = case([6, 5])
    (grad,) = torch.autograd.grad(span_geometry(student, teacher, weights, offsets).sum(), student)
    assert (grad * student).sum(1).abs().max() < 1e-14


def test_equal_shapes_give_zero():
    student, _, weights, offsets = case([6, 5], torch.float32)
    turned = 3 * student.detach() @ torch.linalg.qr(torch.randn(13, 13)).Q
    loss = span_geometry(student, turned, weights, offsets)
    assert loss.abs().max() < 1e-12


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_the_length_of_vectors_and_the_size_of_weights_do_not_matter(size):
    student, teacher, weights, offsets = case([6, 5], torch.float32)
    want = span_geometry(student, teacher, weights, offsets)
    (want_grad,) = torch.autograd.grad(want.sum(), student)
    x = (student.detach() * size).requires_grad_()
    loss = span_geometry(x, teacher * size, weights * size, offsets)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad * size, want_grad, rtol=1e-5, atol=1e-6)


# --- the C++ kernel's own seams ---


def against_float64(student, teacher, weights, offsets):
    def run(op, wide):
        x = student.detach().to(wide).requires_grad_()
        w = weights.double() if wide == torch.float64 else weights
        loss = op(x, teacher.to(wide), w, offsets)
        return loss, torch.autograd.grad(loss.sum(), x)[0]

    exact, plain = (run(reference, dtype) for dtype in (torch.float64, student.dtype))
    ours = run(span_geometry, student.dtype)
    for name, a, b, c in zip(("loss", "gradient"), ours, plain, exact, strict=True):
        assert_as_good_as_torch(a, b, c, name)


def test_one_sample_of_several_bands(poison):
    against_float64(*case([3, 1500, 2], torch.float32, ours=6, theirs=9))
    against_float64(*case([1060], torch.float64, ours=6, theirs=9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_wider_than_one_sum(poison, dtype):
    for widths in ((1024, 1025), (2065, 1)):
        against_float64(*case([2, 11, 50], dtype, *widths))


@pytest.mark.parametrize("near", [1e-2, 1e-4, 1e-6])
def test_a_teacher_that_nearly_agrees(near):
    student, _, weights, offsets = case([20] * 30, torch.float32, ours=96)
    teacher = student.detach() + near * torch.randn(student.shape)
    against_float64(student, teacher, weights, offsets)


def test_a_teacher_that_agrees_gives_exactly_zero():
    student, _, weights, offsets = case([20, 90], torch.float32)
    loss = span_geometry(student, student.detach(), weights, offsets)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), student)[0].any()


def test_a_gpu_may_cut_the_pulls_into_several_launches(backend, monkeypatch):
    if backend not in ("interpreter", "triton"):
        pytest.skip("about the Triton kernels alone")
    from sra_kernels.span_geometry import triton

    student, teacher, weights, offsets = case([150, 2, 100], torch.float32, ours=4)
    runs = []
    for size in (triton.PULL_BYTES, 1):
        monkeypatch.setattr(triton, "PULL_BYTES", size)
        loss = span_geometry(student, teacher, weights, offsets)
        runs.append((loss, torch.autograd.grad(loss.sum(), student)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.cpu_only
@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(backend, dtype):
    before = torch.get_num_threads()

    def with_threads(count, every):
        torch.set_num_threads(count)
        try:
            loss = span_geometry(*every)
            return loss, torch.autograd.grad(loss.sum(), every[0])[0]
        finally:
            torch.set_num_threads(before)

    for counts in ([140], [30, 2, 0, 140, 5, 61], [50] * 9):
        every = case(counts, dtype, ours=300, theirs=203)
        first = with_threads(1, every)
        for count in (2, 7):
            again = with_threads(count, every)
            # torch's own products, in the portable backend, may split a sum by threads
            if backend == "cpu":
                assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("ours", DTYPES, ids=str)
@pytest.mark.parametrize("theirs", DTYPES, ids=str)
def test_each_side_in_its_own_dtype(ours, theirs):
    student, teacher, weights, offsets = case([9, 4], ours)
    teacher = teacher.to(theirs)
    loss = span_geometry(student, teacher, weights, offsets)
    want = reference(student.double(), teacher.double(), weights.double(), offsets)
    assert loss.dtype == weights.dtype
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)


@needs_cpp
def test_the_plan_of_the_kernel_holds_less_than_torch_needs():
    shapes = [(3000, 576), (3000, 896), (3000,), (3,)]
    given = [torch.empty(shape, device="meta") for shape in shapes]
    assert cpu.plan(*given)[1] < portable.plan(*given)[1]
    assert "bands of at most 699 spans" in cpu.plan(*given)[0]


# --- inputs ---


@pytest.mark.parametrize(
    "offsets",
    [[0, 10, 5, 20], [3, 10, 20], [0, 10, 18], [0, 10, 25, 20], [0, -5, 20], [0, 200, 70, 300]],
    ids=str,
)
def test_a_gpu_marks_offsets_that_are_no_partition(backend, monkeypatch, offsets):
    """What is not NaN is right, of a sample or a row: never what memory held before."""
    if backend in ("cpu", "torch"):
        pytest.skip("the backends of a CPU look through the offsets first")
    monkeypatch.setattr(check, "contents", lambda device: False)
    new_empty, held = torch.Tensor.new_empty, 12345.0

    def stale(*args, **options):
        out = new_empty(*args, **options)
        return out.fill_(held) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", stale)
    spans = max(offsets[-1], 20)
    given = torch.randn(spans, 13), torch.randn(spans, 21), torch.rand(spans)
    loss, grad = library.ops.span_geometry_forward(*given, torch.tensor(offsets), True)
    assert loss.isnan().any()
    for b in range(len(loss)):
        if not loss[b].isnan():
            sample = [x[offsets[b] : offsets[b + 1]] for x in given]
            want = reference(*sample, torch.tensor([0, len(sample[0])]))
            torch.testing.assert_close(loss[b], want[0], rtol=1e-4, atol=1e-5)
    assert not (grad == held).any()


def test_any_strides_int32_and_mixed_dtypes():
    student, teacher, weights, offsets = case([5, 4])
    want = span_geometry(student, teacher, weights, offsets)
    turned = student.T.contiguous().T, teacher.T.contiguous().T, torch.stack([weights] * 2, 1)[:, 0]
    torch.testing.assert_close(span_geometry(*turned, offsets.int()), want)
    loss = span_geometry(student.float(), teacher.bfloat16(), weights, offsets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=0.05, atol=0.01)


@pytest.mark.cpu_only
def test_reference_backend_serves():
    every = case([5, 4])
    want = span_geometry(*every)
    with use_backend("reference"):
        torch.testing.assert_close(span_geometry(*every), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": torch.tensor([0, 6])}, ValueError, r"end with 5.*\[0, 6\].*offsets\[b\]"),
        ({"offsets": torch.tensor([1, 5])}, ValueError, "begin with 0"),
        ({"offsets": torch.tensor([0, 4, 3, 5])}, ValueError, "never decrease"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets is empty"),
        ({"offsets": torch.tensor([0.0, 5.0])}, TypeError, "offsets must be an int32 or int64"),
        ({"weights": torch.ones(4)}, ValueError, r"weights has shape \[4\].*\[5\]"),
        ({"weights": torch.tensor([1, 1, 1, 1, torch.nan])}, ValueError, r"weights\[4\] = nan"),
        ({"teacher": torch.randn(4, 2)}, ValueError, "student has 5 rows and teacher 4"),
        ({"student": torch.randn(5)}, ValueError, "student must have 2 dimensions, not 1"),
        ({"teacher": torch.randn(5, 2, device="meta")}, ValueError, "teacher is on meta"),
    ],
)
def test_bad_input(change, error, message):
    given = {
        "student": torch.randn(5, 3), "teacher": torch.randn(5, 2), "weights": torch.ones(5),
        "offsets": torch.tensor([0, 2, 5]),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        span_geometry(**given | change)
