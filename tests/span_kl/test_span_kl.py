"""span_kl against float64 and by hand, on every backend; inputs good and bad."""

import math

import pytest
import torch

from sra_kernels import span_kl, use_backend
from sra_kernels.testing import DTYPES, assert_as_good_as_torch
from tests.span_kl.cases import EVERY, OBJECTIVES, OUTSIDE, VS, VT, K, S, case, eager

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize(("outside", "direction"), EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
def test_matches_float64(poison, outside, direction, dtype, size):
    student, teacher, options = case(outside, dtype, size=size)
    options |= {"temperature": 1.7, **OBJECTIVES[direction]}
    upstream = torch.randn(S, dtype=torch.float64)

    def run(op, wide, **more):
        x = student.detach().to(wide).requires_grad_()
        kl, mass = op(x, teacher.to(wide), **options, **more)
        (grad,) = torch.autograd.grad(kl, x, upstream.to(kl.dtype))
        return kl, mass, grad

    exact, plain = run(eager, torch.float64), run(eager, dtype)
    ours = run(span_kl, dtype, return_shared_mass=True)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[2].dtype == dtype
    for name, a, b, c in zip(("kl", "mass", "gradient"), ours, plain, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-14)
        else:
            assert_as_good_as_torch(a, b, c, name)


@pytest.mark.parametrize(("entries", "shared"), [(1, None), (7, 1), (123, 50), (4097, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_width(poison, entries, shared, dtype):
    student = torch.randn(3, entries).to(dtype).requires_grad_()
    teacher = torch.randn(3, entries).to(dtype)
    vocab = None if shared is None else (torch.randperm(entries)[:shared],) * 2
    options = {"temperature": 1.0, "direction": "forward", "vocab": vocab}
    for outside in ("renormalise", "weight", "bucket"):
        kl, mass = span_kl(student, teacher, **options, outside=outside, return_shared_mass=True)
        (grad,) = torch.autograd.grad(kl.sum(), student)
        x = student.detach().double().requires_grad_()
        exact, exact_mass = eager(x, teacher.double(), **options, outside=outside)
        y = student.detach().float().requires_grad_()
        plain, plain_mass = eager(y, teacher, **options, outside=outside)
        (plain_grad,) = torch.autograd.grad(plain.sum(), y)
        assert_as_good_as_torch(kl, plain, exact)
        assert_as_good_as_torch(mass, plain_mass, exact_mass)
        assert_as_good_as_torch(grad, plain_grad, torch.autograd.grad(exact.sum(), x)[0])


def test_by_hand():
    log = math.log
    student = torch.tensor([[0.0, log(3.0), 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[log(3.0), 0.0, log(4.0)]], dtype=torch.float64)
    ids = torch.tensor([0, 1])
    common = {"temperature": 1.0, "vocab": (ids, ids), "return_shared_mass": True}

    kl, mass = span_kl(student, teacher, direction="forward", **common)  # (3/4, 1/4) to (1/4, 3/4)
    (grad,) = torch.autograd.grad(kl.sum(), student)
    torch.testing.assert_close(kl, torch.tensor([0.5 * log(3.0)], dtype=torch.float64))
    torch.testing.assert_close(mass, torch.tensor([0.5], dtype=torch.float64))
    assert grad[0].tolist() == pytest.approx([-0.5, 0.5, 0.0])

    kl, _ = span_kl(student, teacher, direction="forward", outside="weight", **common)
    assert kl.item() == pytest.approx(0.25 * log(3.0))

    # The whole heads are (1/5, 3/5, 1/5) and (3/8, 1/8, 4/8); the third entry is the bucket.
    kl, _ = span_kl(student, teacher, direction="forward", outside="bucket", **common)
    (grad,) = torch.autograd.grad(kl.sum(), student)
    want = 3 / 8 * log(15 / 8) + 1 / 8 * log(5 / 24) + 1 / 2 * log(5 / 2)
    assert kl.item() == pytest.approx(want)
    assert grad[0].tolist() == pytest.approx([1 / 5 - 3 / 8, 3 / 5 - 1 / 8, 1 / 5 - 1 / 2])

    kl, _ = span_kl(student, teacher, direction="reverse", **common)
    (grad,) = torch.autograd.grad(kl.sum(), student)
    assert kl.item() == pytest.approx(0.5 * log(3.0))
    # p (log p/q - KL): 1/4 (-log 3 - log 3 / 2)
    assert grad[0].tolist() == pytest.approx([-0.375 * log(3.0), 0.375 * log(3.0), 0.0])

    kl, _ = span_kl(student, teacher, direction="jsd", beta=0.5, **common)  # the mixture is uniform
    assert kl.item() == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5))

    # Temperature 2 halves the logits: odds 3 become sqrt 3.
    kl, _ = span_kl(student, teacher, direction="forward", **common | {"temperature": 2.0})
    p = 3**0.5 / (1 + 3**0.5)
    assert kl.item() == pytest.approx((2 * p - 1) * 0.5 * log(3.0))


@pytest.mark.parametrize(("outside", "direction"), EVERY)
def test_gradcheck(backend, outside, direction):
    student, teacher, options = case(outside, spans=2)
    options |= {"temperature": 0.8, **OBJECTIVES[direction]}
    fast = backend == "interpreter"
    assert torch.autograd.gradcheck(
        lambda x: span_kl(x, teacher, **options), student, fast_mode=fast
    )
    assert torch.autograd.gradcheck(lambda x: eager(x, teacher, **options)[0], student)


# --- numerics ---


@pytest.mark.parametrize(
    ("distance", "bound"), [(1e-1, 1e-6), (1e-2, 5e-6), (1e-3, 5e-5)], ids=["4e-3", "5e-5", "4e-7"]
)
@pytest.mark.parametrize("direction", OBJECTIVES)
def test_small_divergences_stay_accurate(direction, distance, bound):
    """Where teacher and student agree, the plain formula loses all its digits in float32."""
    teacher = 2 * torch.randn(8, 32_000)
    student = teacher + distance * torch.randn_like(teacher)
    options = {"temperature": 1.0, **OBJECTIVES[direction]}
    exact, _ = eager(student.double(), teacher.double(), **options)
    kl = span_kl(student, teacher, **options)
    assert ((kl - exact).abs() / exact).max() < bound
    plain, _ = eager(student, teacher, **options)
    assert ((kl - exact).abs() / exact).max() < ((plain - exact).abs() / exact).max()


@pytest.mark.parametrize(("outside", "direction"), EVERY)
def test_equal_sides_give_zero(outside, direction):
    if outside == "one vocabulary":
        student = torch.randn(S, VS, requires_grad=True)
        options = {}
    else:
        student = torch.randn(S, VT, requires_grad=True)
        ids = torch.randperm(VT)[:K]
        options = {"vocab": (ids, ids), "outside": outside}
    kl = span_kl(student, student.detach(), temperature=1.0, **OBJECTIVES[direction], **options)
    (grad,) = torch.autograd.grad(kl.sum(), student)
    assert kl.abs().max() == 0
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize(("outside", "direction"), EVERY)
def test_rows_of_the_gradient_sum_to_zero(outside, direction):
    student, teacher, options = case(outside, torch.float32)
    kl = span_kl(student, teacher, temperature=1.0, **OBJECTIVES[direction], **options)
    assert (kl >= 0).all()
    (grad,) = torch.autograd.grad(kl.sum(), student)
    assert grad.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize(("outside", "direction"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits(outside, direction, dtype, shift):
    student, teacher, options = case(outside, dtype, size=8)
    student = (student.detach() + shift).requires_grad_()
    teacher = teacher - shift
    options |= {"temperature": 1.0, **OBJECTIVES[direction]}

    def run(op, x, t):
        kl = op(x, t, **options)
        kl = kl[0] if isinstance(kl, tuple) else kl
        return kl, torch.autograd.grad(kl.sum(), x)[0]

    exact = run(eager, student.detach().double().requires_grad_(), teacher.double())
    for a, b in zip(run(span_kl, student, teacher), exact, strict=True):
        tolerance = 2e-6 if a.dtype == torch.float32 else 4e-3
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("direction", ["forward", "jsd"])
def test_teacher_entries_of_probability_zero(outside, direction):
    student, teacher, options = case(outside)
    teacher[torch.rand_like(teacher) < 0.4] = -torch.inf
    options |= {"temperature": 1.3, **OBJECTIVES[direction]}
    kl, mass = span_kl(student, teacher, **options, return_shared_mass=True)
    (grad,) = torch.autograd.grad(kl.sum(), student)
    # A very small number in place of -inf is the same to 1e-12.
    want, want_mass = eager(student, teacher.nan_to_num(neginf=-1e3), **options)
    torch.testing.assert_close(kl, want)
    torch.testing.assert_close(mass, want_mass)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), student)[0])


def test_student_entries_of_probability_zero():
    student = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    options = {"temperature": 1.0}
    kl = span_kl(student, teacher, direction="forward", **options)
    assert kl.tolist() == [torch.inf, 0.0]
    (grad,) = torch.autograd.grad(kl.sum(), student)
    assert grad.tolist() == [[0.5, -0.5], [0.0, 0.0]]
    kl = span_kl(student, teacher, direction="reverse", **options)
    assert kl.tolist() == pytest.approx([math.log(2.0), 0.0])
    assert torch.autograd.grad(kl.sum(), student)[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    kl = span_kl(student, teacher, direction="jsd", beta=0.5, **options)
    want = 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2.0)) + 0.5 * math.log(1 / 0.75)
    assert kl.tolist() == pytest.approx([want, 0.0])
    assert torch.autograd.grad(kl.sum(), student)[0].abs().max() == 0


def test_teacher_mass_entirely_outside_or_inside_the_vocabulary():
    student = torch.randn(2, 3, requires_grad=True)
    teacher = torch.tensor([[-torch.inf, -torch.inf, 1.0], [0.0, 1.0, -torch.inf]])
    ids = torch.tensor([0, 1])
    for outside in ("renormalise", "weight"):
        kl, mass = span_kl(
            student, teacher, temperature=1.0, direction="forward", vocab=(ids, ids),
            outside=outside, return_shared_mass=True,
        )  # fmt: skip
        assert mass.tolist() == [0.0, 1.0]
        assert kl[0] == 0
        assert kl[1] > 0
        (grad,) = torch.autograd.grad(kl.sum(), student)
        assert grad[0].abs().max() == 0
        assert grad.isfinite().all()
    kl = span_kl(
        student, teacher, temperature=1.0, direction="forward", vocab=(ids, ids), outside="bucket"
    )
    log_p = student.detach().log_softmax(1)
    torch.testing.assert_close(kl[0], -log_p[0, 2])
    assert kl.isfinite().all()


def test_nan_is_not_hidden():
    student = torch.randn(2, 4, requires_grad=True)
    teacher = torch.randn(2, 4)
    teacher[1, 2] = torch.nan
    for options in OBJECTIVES.values():
        kl = span_kl(student, teacher, temperature=1.0, **options)
        (grad,) = torch.autograd.grad(kl.sum(), student)
        assert kl.isnan().tolist() == [False, True]
        assert grad.isnan().any(1).tolist() == [False, True]


def test_bucket_is_a_coarsening():
    """Merging classes can only lower a divergence; with every entry shared it changes nothing."""
    teacher, student = torch.randn(S, 30), torch.randn(S, 30)
    options = {"temperature": 1.0, "direction": "forward"}
    whole = span_kl(student, teacher, **options)
    ids = torch.randperm(30)
    for shared in (1, 10, 29):
        kept = ids[:shared]
        coarse = span_kl(student, teacher, vocab=(kept, kept), outside="bucket", **options)
        assert (coarse <= whole + 1e-6).all()
        assert (coarse >= 0).all()
    same = span_kl(student, teacher, vocab=(ids, ids), outside="bucket", **options)
    torch.testing.assert_close(same, whole)


def test_half_precision_gradients_survive_the_loss_scale():
    """Probabilities below float16's range, times a loss scale that lifts them into it."""
    student = torch.randn(2, 30_000).half().requires_grad_()
    teacher = torch.randn(2, 30_000).half()
    kl = span_kl(student, teacher, temperature=1.0, direction="forward")
    (grad,) = torch.autograd.grad(1e-3 * kl.sum(), student, retain_graph=True)
    assert (grad == 0).float().mean() > 0.5
    (grad,) = torch.autograd.grad(2.0**10 * kl.sum(), student)
    x = student.detach().double().requires_grad_()
    exact, _ = eager(x, teacher.double(), temperature=1.0, direction="forward")
    (want,) = torch.autograd.grad(2.0**10 * exact.sum(), x)
    torch.testing.assert_close(grad.double(), want, rtol=2e-3, atol=1e-6)


# --- inputs ---


@pytest.mark.parametrize("outside", OUTSIDE)
def test_any_strides_and_mixed_dtypes(outside):
    student, teacher, options = case(outside)
    options |= {"temperature": 1.0, "direction": "forward"}
    want = span_kl(student, teacher, **options)
    for a, b in ((student.T.contiguous().T, teacher), (student, teacher.T.contiguous().T)):
        torch.testing.assert_close(span_kl(a, b, **options), want)
    kl = span_kl(student.float(), teacher.bfloat16(), **options)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), want, rtol=0.05, atol=0.05)


@pytest.mark.cpu_only
def test_reference_backend_serves_and_differentiates():
    student, teacher, options = case("bucket")
    options |= {"temperature": 1.0, "direction": "forward"}
    kl = span_kl(student, teacher, **options)
    with use_backend("reference"):
        torch.testing.assert_close(span_kl(student, teacher, **options), kl)


A, B = torch.tensor([0, 1]), torch.tensor([2, 0])


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, not 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a positive"),
        ({"direction": "kl"}, ValueError, "direction must be 'forward'"),
        ({"direction": "jsd"}, ValueError, "needs beta between 0 and 1"),
        ({"direction": "jsd", "beta": 1.0}, ValueError, "needs beta between 0 and 1"),
        ({"beta": 0.5}, ValueError, "leave it out"),
        ({"outside": "ignore"}, ValueError, "outside must be"),
        ({"vocab": None}, ValueError, "student has 4 vocabulary entries and the teacher 3"),
        ({"vocab": (A, B[:1])}, ValueError, r"vocab\[1\] has shape \[1\]; it must be \[2\]"),
        ({"vocab": (A.float(), B)}, TypeError, r"vocab\[0\] must be an int32 or int64"),
        ({"vocab": (A[:0], B[:0])}, ValueError, "share no entry"),
        ({"vocab": (A, B + 1)}, ValueError, r"teacher_ids.*\[0, 3\).*Found 3"),
        ({"vocab": (A - 1, B)}, ValueError, r"student_ids.*\[0, 4\).*Found -1"),
        ({"vocab": (A * 0, B)}, ValueError, "student_ids of vocab name an entry twice.*Found 0"),
    ],
)
def test_bad_options(options, error, message):
    given = {"temperature": 1.0, "direction": "forward", "vocab": (A, B), **options}
    with pytest.raises(error, match=message):
        span_kl(torch.randn(5, 4), torch.randn(5, 3), **given)


def test_bad_tensors():
    options = {"temperature": 1.0, "direction": "forward"}
    with pytest.raises(ValueError, match="student_logits has 2 rows and teacher_logits 3"):
        span_kl(torch.randn(2, 4), torch.randn(3, 4), **options)
    with pytest.raises(TypeError, match=r"student_logits is torch\.int64"):
        span_kl(torch.zeros(2, 4, dtype=torch.int64), torch.randn(2, 4), **options)
    with pytest.raises(ValueError, match="2 dimensions, not 1"):
        span_kl(torch.randn(2, 4), torch.randn(4), **options)
    with pytest.raises(ValueError, match="teacher_logits is on meta"):
        span_kl(torch.randn(2, 4), torch.randn(2, 4, device="meta"), **options)
    every = torch.arange(4)
    with pytest.raises(ValueError, match="infinite here: vocab holds every entry of the student"):
        span_kl(
            torch.randn(2, 4), torch.randn(2, 6), **options, vocab=(every, every), outside="bucket"
        )
