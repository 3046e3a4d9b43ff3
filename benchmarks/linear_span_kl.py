"""linear_span_kl beside eager torch and the fused linear divergences of other libraries.

Those know one vocabulary only. So they get heads that hold the shared rows alone: the teacher's cut
in advance, the student's inside the run, since its gradient belongs to the whole head. Ours cuts
both in each call. Cut cross-entropy has no soft targets: nothing of it is comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.providers import compiled, differentiated, on_backend, rival
from benchmarks.registry import Absent, Benchmark, Job
from benchmarks.shapes import SHAPES, SHARED, normal, seeded, shared_ids, span_counts
from benchmarks.span_kl import BETA, DTYPES, TEMPERATURE, formula
from sra_kernels import linear_span_kl
from sra_kernels.span_kl.options import Direction


@dataclass(frozen=True)
class Case:
    """`head`: the student's, "trained" or "frozen". `shared` 0: one vocabulary."""

    case: str
    head: str
    dtype: str
    direction: Direction
    spans: int
    student_dim: int
    teacher_dim: int
    student_vocab: int
    teacher_vocab: int
    shared: int


def _case(
    student: str,
    teacher: str,
    spans: int,
    what: str,
    dtype: str = "float32",
    direction: Direction = "forward",
    head: str = "trained",
) -> Case:
    ours, theirs = SHAPES[student], SHAPES[teacher]
    one = ours.vocabulary == theirs.vocabulary
    return Case(
        f"{student} ← {teacher}, {what}",
        head,
        dtype,
        direction,
        spans,
        ours.dim,
        theirs.dim,
        ours.vocabulary,
        theirs.vocabulary,
        0 if one else SHARED[student, teacher],
    )


FOUR = sum(span_counts(4))
CASES = [
    _case("SmolLM2", "Qwen2.5", FOUR, "batch 4"),
    _case("SmolLM2", "Qwen2.5", FOUR, "batch 4", head="frozen"),
    _case("GPT-2", "Qwen1.5", FOUR, "batch 4"),
    _case("TinyLlama", "Mistral", FOUR, "batch 4", head="frozen"),
    _case("SmolLM2", "Gemma-3", FOUR, "batch 4", direction="jsd"),
    _case("SmolLM2", "Qwen2.5", 16, "16 sentences", "bfloat16"),
    _case("SmolLM2", "Qwen2.5", 1, "one span"),
]
GPU = [
    _case("Llama-3.2-1B", "Llama-3.1-8B", 8192, "8,192 rows", "bfloat16"),
    _case("Llama-3.2-1B", "Llama-3.1-8B", 8192, "8,192 rows", "bfloat16", head="frozen"),
    _case("Llama-3.1-8B", "Llama-3.1-8B", 8192, "8,192 rows", "bfloat16"),
    _case("Llama-3.2-1B", "Llama-3.1-8B", 1024, "1,024 rows", "bfloat16"),
    _case("Llama-3.2-1B", "Qwen2.5-7B", sum(span_counts(16)), "batch 16", "bfloat16"),
]
HOW: list[tuple[Direction, str]] = [
    ("forward", "trained"),
    ("reverse", "frozen"),
    ("jsd", "trained"),
]
# Where a CPU multiplies in bfloat16, our logits are rounded to it, as a GPU's are: 0.095 was seen,
# and 0.095 of torch's own products in bfloat16. With float32 products it is a tenth of that.
BFLOAT16 = 0.15 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 6e-2
SMALL = [
    *(_case("small", "large", 9, "small", dtype, *how) for dtype in DTYPES for how in HOW),
    _case("large", "large", 9, "small"),
]


@dataclass
class Inputs:
    """`cut`: the teacher's head, its shared rows alone; without a vocabulary, the whole."""

    case: Case
    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    vocab: tuple[Tensor, Tensor] | None

    def __post_init__(self) -> None:
        self.ids = None if self.vocab is None else self.vocab[0]
        self.compared = self.case.shared or self.case.student_vocab
        self.cut = self.teacher_head if self.vocab is None else self.teacher_head[self.vocab[1]]
        self.trained = self.case.head == "trained"
        self.leaves = [self.student, self.student_head] if self.trained else [self.student]
        self.labels = torch.zeros(self.case.spans, dtype=torch.int64)

    def student_cut(self) -> Tensor:
        return cut(self.student_head, self.ids)


def cut(head: Tensor, ids: Tensor | None) -> Tensor:
    return head if ids is None else head.index_select(0, ids)


def inputs(case: Case) -> Inputs:
    """Logits of some 3 around 0; the teacher's shared ones are the student's with noise."""
    generator = seeded()
    dtype = getattr(torch, case.dtype)
    student = torch.randn(case.spans, case.student_dim, generator=generator)
    teacher = torch.randn(case.spans, case.teacher_dim, generator=generator)
    head = normal(case.student_vocab, case.student_dim, generator)
    head.mul_(3 / case.student_dim**0.5)
    vocab = None
    if case.shared:
        vocab = shared_ids(case.student_vocab, case.teacher_vocab, case.shared, generator)
    # The first columns of the teacher are the student's model, the others its own.
    theirs = normal(case.teacher_vocab, case.teacher_dim, generator)
    theirs.mul_(1 / case.teacher_dim**0.5)
    ids = (slice(None), slice(None)) if vocab is None else vocab
    theirs[ids[1], : case.student_dim] = head[ids[0]]
    teacher[:, : case.student_dim] = student + teacher[:, : case.student_dim] / 3
    return Inputs(
        case,
        student.to(dtype).requires_grad_(),
        head.to(dtype).requires_grad_(case.head == "trained"),
        teacher.to(dtype),
        theirs.to(dtype),
        vocab,
    )


def exact(x: Inputs) -> list[Tensor]:
    """In float64, the formula differentiated by autograd on the logits, then by hand."""
    head, theirs = cut(x.student_head.detach(), x.ids).double(), x.cut.double()
    value, grads = torch.zeros((), dtype=torch.float64), []
    grad_head = torch.zeros_like(head) if x.trained else head[:0]
    for student, teacher in zip(x.student.detach().split(64), x.teacher.split(64), strict=True):
        student = student.double()
        logits = (student @ head.T).requires_grad_()
        loss = formula(x.case.direction, logits, teacher.double() @ theirs.T).sum()
        loss.backward()
        assert logits.grad is not None
        value += loss.detach()
        grads.append(logits.grad @ head)
        if x.trained:
            grad_head.addmm_(logits.grad.T, student)
    if not x.trained:
        return [value[None], torch.cat(grads)]
    whole = torch.zeros(x.student_head.shape, dtype=torch.float64)
    whole[slice(None) if x.ids is None else x.ids] = grad_head
    return [value[None], torch.cat(grads), whole]


def _job(x: Inputs, forward: Callable[[], Tensor], package: str = "") -> Job:
    return differentiated(lambda: forward().view(1), torch.ones(1), x.leaves, package)


def ours(x: Inputs) -> Job:
    return _job(
        x,
        lambda: linear_span_kl(
            x.student,
            x.student_head,
            x.teacher,
            x.teacher_head,
            temperature=TEMPERATURE,
            direction=x.case.direction,
            beta=BETA if x.case.direction == "jsd" else None,
            reduction="sum",
            vocab=x.vocab,
        ),
    )


def in_torch(
    direction: str,
    student: Tensor,
    head: Tensor,
    ids: Tensor | None,
    teacher: Tensor,
    teacher_head: Tensor,
) -> Tensor:
    """On a CPU float32 products whatever the inputs: in bfloat16 the gradients are 35 % off, and
    slower."""
    product = torch.float32 if head.device.type == "cpu" else head.dtype
    with torch.no_grad():
        theirs = teacher.to(product) @ teacher_head.to(product).T
    ours = student.to(product) @ cut(head, ids).to(product).T
    return formula(direction, ours.float(), theirs.float()).sum()


def eager(x: Inputs, function: Callable[..., Tensor] | None = None) -> Job:
    forward = function or partial(in_torch, x.case.direction)
    return _job(x, lambda: forward(x.student, x.student_head, x.ids, x.teacher, x.cut))


def compiled_eager(x: Inputs) -> Job:
    return eager(x, compiled(partial(in_torch, x.case.direction)))


# How the others spell a direction: the beta of GKD, with the ends for the two KLs.
AS_BETA = {"forward": 0.0, "reverse": 1.0, "jsd": BETA}


def liger(x: Inputs) -> Job:
    """Not compiled and in one chunk, which is faster here; it divides by the number of rows."""
    module = rival("liger_kernel.chunked_loss", "liger-kernel")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=AS_BETA[x.case.direction],
        temperature=TEMPERATURE,
        compiled=False,
    )
    return _job(
        x,
        lambda: loss(x.student, x.student_cut(), x.teacher, x.cut, x.labels) * x.case.spans,
        "liger-kernel",
    )


def trl(x: Inputs) -> Job:
    function = rival("trl.kernels.chunked_divergence", "trl").ChunkedDivergenceFunction.apply
    beta = AS_BETA[x.case.direction]
    return _job(
        x,
        lambda: function(
            x.student, x.student_cut(), None, x.teacher, x.cut, None, beta, TEMPERATURE
        )[0].sum(),
        "trl",
    )


def orda(x: Inputs) -> Job:
    """On a CPU it is torch, whole logits; its KL carries the temperature squared."""
    module = rival("orda_kernel", "orda-kernel")
    if x.case.direction == "jsd":
        raise Absent("left out: its skew Jensen-Shannon divergence is another one")
    teacher = module.SeparateTeacher(hidden=x.teacher, weight=x.cut)

    def forward() -> Tensor:
        return module.distillation_loss(
            x.student,
            x.student_cut(),
            x.labels,
            teacher,
            student_ce_weight=0.0,
            kl_weight=TEMPERATURE**-2,
            kl_temperature=TEMPERATURE,
            kl_divergence=x.case.direction,
            reduction="sum",
            backend="torch" if x.student.device.type == "cpu" else "triton",
        ).loss

    return _job(x, forward, "orda-kernel")


def gemms(x: Inputs) -> Job:
    """The products that ours cannot do without, into outputs that exist already: in float32 on a
    CPU, in the inputs' dtype on a GPU."""
    product = torch.float32 if x.student.device.type == "cpu" else x.student.dtype
    student, teacher, theirs_head = (y.detach().to(product) for y in (x.student, x.teacher, x.cut))
    head = x.student_cut().detach().to(product)
    logits, theirs = (student.new_empty(x.case.spans, x.compared) for _ in range(2))
    grad, grad_head = torch.empty_like(student), torch.empty_like(head)

    def run() -> list[Tensor]:
        torch.mm(student, head.T, out=logits)
        torch.mm(teacher, theirs_head.T, out=theirs)
        torch.mm(logits, head, out=grad)
        if x.trained:
            torch.mm(logits.T, student, out=grad_head)
        return []

    return Job(run)


def bytes_moved(x: Inputs) -> int:
    """The shared rows of both heads and the states in, their gradients out."""
    case, size = x.case, x.student.element_size()
    heads = x.compared * (case.student_dim + case.teacher_dim)
    states = case.spans * (2 * case.student_dim + case.teacher_dim)
    grad_head = case.student_vocab * case.student_dim if x.trained else 0
    return (heads + states + grad_head) * size


def flops(x: Inputs) -> int:
    """Two or three products with the student's head (logits, states, head), one with the other."""
    products = (3 if x.trained else 2) * x.case.student_dim + x.case.teacher_dim
    return 2 * x.case.spans * x.compared * products


BENCHMARK = Benchmark(
    name="linear_span_kl",
    cases=CASES,
    small=SMALL,
    gpu=GPU,
    gpu_providers={"ours (CUDA)": on_backend("cuda", ours)},
    inputs=inputs,
    exact=exact,
    tolerance=lambda case: {"float32": 1e-3, "bfloat16": BFLOAT16}[case.dtype],
    providers={
        "ours": ours,
        "eager": eager,
        "torch.compile": compiled_eager,
        "Liger JSD": liger,
        "TRL chunked_divergence": trl,
        "ORDA": orda,
    },
    bounds={"its GEMMs alone": gemms},
    bytes_moved=bytes_moved,
    flops=flops,
    headline=lambda case: case in (*CASES[:1], *GPU),
    headline_only=["torch.compile", "Liger JSD", "TRL chunked_divergence", "ORDA"],
    seconds=50,
)
