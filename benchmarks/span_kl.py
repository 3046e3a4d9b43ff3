"""span_kl beside eager torch and torch.compile.

No library that runs on a CPU has a divergence over a shared part of two vocabularies, so the rivals
are the same formulas in torch, as one would write them: the shared entries first, then float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import compiled, differentiated, on_backend
from benchmarks.registry import Benchmark, Job
from benchmarks.shapes import SHAPES, SHARED, normal, seeded, shared_ids, span_counts
from sra_kernels import span_kl, use_backend
from sra_kernels.span_kl.options import Direction, Outside

FORWARD, BOTH = "forward", "forward+backward"
TEMPERATURE, BETA = 2.0, 0.5
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """`shared` 0: one vocabulary, compared whole."""

    case: str
    mode: str
    dtype: str
    direction: Direction
    outside: Outside
    spans: int
    student_vocab: int
    teacher_vocab: int
    shared: int


def _case(
    student: str,
    teacher: str,
    spans: int,
    what: str,
    dtype: str,
    direction: Direction = "forward",
    outside: Outside = "renormalise",
    mode: str = BOTH,
) -> Case:
    one = student == teacher
    return Case(
        f"{student}, one vocabulary, {what}" if one else f"{student} ← {teacher}, {what}",
        mode,
        dtype,
        direction,
        outside,
        spans,
        SHAPES[student].vocabulary,
        SHAPES[teacher].vocabulary,
        0 if one else SHARED[student, teacher],
    )


FOUR = sum(span_counts(4))
CASES = [
    _case("GPT-2", "Qwen1.5", FOUR, "batch 4", "float32"),
    _case("GPT-2", "Qwen1.5", FOUR, "batch 4", "bfloat16"),
    _case("TinyLlama", "Mistral", FOUR, "batch 4", "float32", "reverse"),
    _case("TinyLlama", "Mistral", FOUR, "batch 4", "float32", mode=FORWARD),
    _case("SmolLM2", "Qwen2.5", FOUR, "batch 4", "bfloat16", outside="bucket"),
    _case("SmolLM2", "Gemma-3", 64, "64 sentences", "float32"),
    _case("TinyLlama", "TinyLlama", FOUR, "batch 4", "float32", "jsd"),
    _case("Gemma-3", "Gemma-3", 1, "one span", "float32"),
]
# 8,192 tokens of a batch, and the spans of one sample.
GPU = [
    _case("Llama-3.2-1B", "Llama-3.2-1B", 8192, "8,192 rows", "bfloat16"),
    _case("Llama-3.2-1B", "Llama-3.2-1B", 80, "80 rows", "bfloat16"),
    _case("Llama-3.2-1B", "Llama-3.2-1B", 2048, "2,048 rows", "float32", "jsd"),
    _case("SmolLM2", "Qwen2.5", sum(span_counts(16)), "batch 16", "bfloat16"),
    _case("SmolLM2", "Qwen2.5", sum(span_counts(16)), "batch 16", "bfloat16", outside="bucket"),
]
HOW: list[tuple[Direction, Outside, str]] = [
    ("forward", "renormalise", BOTH),
    ("reverse", "bucket", BOTH),
    ("jsd", "renormalise", FORWARD),
]
SMALL = [
    *(_case("small", "large", 7, "small", dtype, *how) for dtype in DTYPES for how in HOW),
    _case("large", "large", 5, "small", "float32"),
]


@dataclass
class Inputs:
    case: Case
    student: Tensor
    teacher: Tensor
    vocab: tuple[Tensor, Tensor] | None
    upstream: Tensor

    def __post_init__(self) -> None:
        self.leaves = [self.student] if self.student.requires_grad else []
        # Each side's entries outside the vocabulary.
        self.others = []
        for ids, logits in zip(self.vocab or (), (self.student, self.teacher), strict=False):
            outside = torch.ones(logits.shape[1], dtype=torch.bool)
            outside[ids] = False
            self.others.append(outside.nonzero().squeeze(1))


def inputs(case: Case) -> Inputs:
    """Peaked logits; the teacher's shared ones are the student's with noise."""
    generator = seeded()
    dtype = getattr(torch, case.dtype)
    student = normal(case.spans, case.student_vocab, generator).mul_(3)
    teacher = normal(case.spans, case.teacher_vocab, generator).mul_(3)
    vocab = None
    if case.shared:
        vocab = shared_ids(case.student_vocab, case.teacher_vocab, case.shared, generator)
        teacher[:, vocab[1]] = student[:, vocab[0]] + teacher[:, vocab[1]] / 3
    else:
        teacher = student + teacher / 3
    return Inputs(
        case,
        student.to(dtype).requires_grad_(case.mode == BOTH),
        teacher.to(dtype),
        vocab,
        0.5 + torch.rand(case.spans, generator=generator),
    )


def exact(x: Inputs) -> list[Tensor]:
    """The library's eager reference in float64, some rows at a time."""
    values, grads = [], []
    for student, teacher, up in zip(
        x.student.detach().split(16), x.teacher.split(16), x.upstream.split(16), strict=True
    ):
        leaf = student.double().requires_grad_(bool(x.leaves))
        with use_backend("reference"):
            kl = _call(x.case, leaf, teacher.double(), x.vocab)
        values.append(kl.detach())
        if x.leaves:
            kl.backward(up.double())
            assert leaf.grad is not None
            grads.append(leaf.grad)
    return [torch.cat(part) for part in (values, grads) if part]


def _call(
    case: Case, student: Tensor, teacher: Tensor, vocab: tuple[Tensor, Tensor] | None
) -> Tensor:
    return span_kl(
        student,
        teacher,
        temperature=TEMPERATURE,
        direction=case.direction,
        beta=BETA if case.direction == "jsd" else None,
        vocab=vocab,
        outside=case.outside,
    )


def ours(x: Inputs) -> Job:
    return differentiated(
        lambda: _call(x.case, x.student, x.teacher, x.vocab), x.upstream, x.leaves
    )


def formula(direction: str, student: Tensor, teacher: Tensor) -> Tensor:
    log_s, log_t = (F.log_softmax(z / TEMPERATURE, 1) for z in (student, teacher))
    if direction == "jsd":
        log_m = torch.logaddexp(log_t + math.log(BETA), log_s + math.log(1 - BETA))
        return BETA * _kl(log_t, log_m) + (1 - BETA) * _kl(log_s, log_m)
    return _kl(log_t, log_s) if direction == "forward" else _kl(log_s, log_t)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def entries(x: Inputs, logits: Tensor, side: int, wide: torch.dtype) -> Tensor:
    """The columns that are compared, in the precision to compare them in."""
    if x.vocab is None:
        return logits.to(wide)
    shared = logits.index_select(1, x.vocab[side]).to(wide)  # 5 times as fast as logits[:, ids]
    if x.case.outside == "renormalise":
        return shared
    others = logits.index_select(1, x.others[side]).to(wide)
    rest = (others / TEMPERATURE).logsumexp(1, keepdim=True)
    return torch.cat([shared, rest * TEMPERATURE], 1)


def in_torch(x: Inputs, wide: torch.dtype, student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        theirs = entries(x, teacher, 1, wide)
    return formula(x.case.direction, entries(x, student, 0, wide), theirs)


def eager(x: Inputs) -> Job:
    forward = partial(in_torch, x, torch.float32)
    return differentiated(lambda: forward(x.student, x.teacher), x.upstream, x.leaves)


def compiled_eager(x: Inputs) -> Job:
    forward: Callable[..., Tensor] = compiled(partial(in_torch, x, torch.float32))
    return differentiated(lambda: forward(x.student, x.teacher), x.upstream, x.leaves)


def bytes_moved(x: Inputs) -> int:
    """Both rows in, the gradient out, one value a span. Entries that are not compared count, since
    nearly every cache line holds one that is."""
    case, size = x.case, x.student.element_size()
    grad = case.student_vocab if x.leaves else 0
    entries = case.student_vocab + case.teacher_vocab + grad
    return case.spans * (entries * size + 4 * (2 if x.leaves else 1))


BENCHMARK = Benchmark(
    name="span_kl",
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
        "eager": eager,
        "torch.compile": compiled_eager,
    },
    bytes_moved=bytes_moved,
    headline=lambda case: case in (*CASES[:2], *GPU),
    headline_only=["ours (torch backend)", "torch.compile"],
    seconds=40,
)
