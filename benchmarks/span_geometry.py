"""span_geometry beside eager torch, sample by sample and as a padded batch, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.providers import compiled, differentiated, on_backend
from benchmarks.registry import Benchmark, Job
from benchmarks.shapes import SHAPES, seeded, span_counts
from sra_kernels import span_geometry


@dataclass(frozen=True)
class Case:
    """`spans`: of all samples; `longest`: of the one with most."""

    case: str
    dtype: str
    batch: int
    spans: int
    longest: int
    student_dim: int
    teacher_dim: int


def _case(student: str, teacher: str, counts: list[int], what: str, dtype: str = "float32") -> Case:
    return Case(
        f"{student} ← {teacher}, {what}",
        dtype,
        len(counts),
        sum(counts),
        max(counts),
        SHAPES[student].dim,
        SHAPES[teacher].dim,
    )


CASES = [
    _case("SmolLM2", "Qwen2.5", span_counts(4), "batch 4"),
    _case("TinyLlama", "Mistral", span_counts(16), "batch 16"),
    _case("SmolLM2", "Qwen2.5", span_counts(16), "batch 16", "bfloat16"),
    _case("GPT-2", "Qwen1.5", span_counts(16), "batch 16"),
    _case("GPT-2", "Qwen1.5", [1175], "the longest sample"),
    _case("SmolLM2", "Qwen2.5", [3] * 64, "batch 64, sentences"),
    _case("TinyLlama", "Mistral", [2], "one pair"),
]
GPU = [
    _case("TinyLlama", "Mistral", span_counts(16), "batch 16", "bfloat16"),
    _case("TinyLlama", "Mistral", span_counts(16), "batch 16"),
    _case("TinyLlama", "Mistral", [48] * 64, "batch 64, words", "bfloat16"),
    _case("TinyLlama", "Mistral", [1024], "one sample", "bfloat16"),
]
SMALL = [
    _case("small", "large", counts, "small", dtype)
    for counts in (span_counts(4), [5, 5, 5], [2])
    for dtype in ("float32", "bfloat16")
]


def counts(case: Case) -> list[int]:
    if case.batch * case.longest == case.spans:
        return [case.longest] * case.batch
    return span_counts(case.batch)


@dataclass
class Inputs:
    student: Tensor
    teacher: Tensor
    weights: Tensor
    offsets: Tensor
    upstream: Tensor

    def __post_init__(self) -> None:
        # Where each span lies in a padded batch [B, longest].
        counts = self.offsets.diff()
        self.padded = (len(counts), int(counts.max()))
        sample = torch.repeat_interleave(counts)
        self.place = (sample, torch.arange(len(sample)) - self.offsets[sample])
        self.bounds = list(pairwise(self.offsets.tolist()))


def inputs(case: Case) -> Inputs:
    generator = seeded()
    dtype = getattr(torch, case.dtype)
    student = torch.randn(case.spans, case.student_dim, generator=generator)
    teacher = torch.randn(case.spans, case.teacher_dim, generator=generator)
    # Hidden states lie in a narrow cone: cosines around 0.5.
    student += torch.randn(case.student_dim, generator=generator)
    teacher += torch.randn(case.teacher_dim, generator=generator)
    return Inputs(
        student.to(dtype).requires_grad_(),
        teacher.to(dtype),
        torch.rand(case.spans, generator=generator) + 0.05,
        torch.tensor([0, *counts(case)]).cumsum(0),
        torch.rand(case.batch, generator=generator) + 0.5,
    )


def ours(x: Inputs) -> Job:
    return _job(x, lambda: span_geometry(x.student, x.teacher, x.weights, x.offsets))


def _job(x: Inputs, forward: Callable[[], Tensor]) -> Job:
    return differentiated(forward, x.upstream, [x.student])


def loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """[.., n, D] twice and [.., n] to [..]; zero weights are padding."""
    ours, theirs = (torch.nn.functional.normalize(c, dim=-1) for c in (student, teacher))
    difference = ours @ ours.mT - (theirs @ theirs.mT).detach()
    pairs = weights[..., :, None] * weights[..., None, :]
    pairs = pairs - torch.diag_embed(pairs.diagonal(dim1=-2, dim2=-1))
    return (pairs * difference.square()).sum((-2, -1)) / pairs.sum((-2, -1))


def per_sample(x: Inputs, wide: torch.dtype, student: Tensor) -> Tensor:
    return torch.stack(
        [
            loss(student[b:e].to(wide), x.teacher[b:e].to(wide), x.weights[b:e].to(wide))
            for b, e in x.bounds
        ]
    )


def padded(x: Inputs, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    batch = [
        y.new_zeros(*x.padded, *y.shape[1:]).index_put(x.place, y)
        for y in (student.float(), teacher.float(), weights)
    ]
    return loss(*batch)


def eager(x: Inputs) -> Job:
    return _job(x, lambda: per_sample(x, torch.float32, x.student))


def eager_padded(x: Inputs, wrap: Callable[[Callable], Callable] = lambda f: f) -> Job:
    forward = wrap(lambda *tensors: padded(x, *tensors))
    return _job(x, lambda: forward(x.student, x.teacher, x.weights))


def exact(x: Inputs) -> list[Tensor]:
    student = x.student.detach().double().requires_grad_()
    value = per_sample(x, torch.float64, student)
    value.backward(x.upstream.double())
    assert student.grad is not None
    return [value.detach(), student.grad]


def bytes_moved(x: Inputs) -> int:
    """Both models' centres in, the student's gradient out."""
    return (2 * x.student.numel() + x.teacher.numel()) * x.student.element_size()


def flops(x: Inputs) -> int:
    """Both models' cosines, each pair once, and the gradient of each ordered pair."""
    pairs = sum((e - b) * (e - b - 1) // 2 for b, e in x.bounds)
    return 2 * pairs * (3 * x.student.shape[1] + x.teacher.shape[1])


BENCHMARK = Benchmark(
    name="span_geometry",
    cases=CASES,
    small=SMALL,
    gpu=GPU,
    gpu_providers={"ours (CUDA)": on_backend("cuda", ours)},
    inputs=inputs,
    exact=exact,
    tolerance=lambda case: {"float32": 1e-4, "bfloat16": 2e-2}[case.dtype],
    providers={
        "ours": ours,
        "ours (torch backend)": on_backend("torch", ours),
        "eager, sample by sample": eager,
        "eager, padded": eager_padded,
        "torch.compile(padded)": lambda x: eager_padded(x, compiled),
    },
    bytes_moved=bytes_moved,
    flops=flops,
    headline=lambda case: case in (*CASES[:2], *GPU),
    headline_only=["ours (torch backend)", "torch.compile(padded)"],
    seconds=20,
)
