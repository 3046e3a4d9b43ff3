"""The whole SRA loss after the two forwards: what a step pays for distillation.

From the hidden states, last-layer queries and keys of both models to the loss of the paper's recipe
(cosine, geometry and logit term) and its gradients: of the student's states, of its head and of the
projector. Cross-entropy and the two forwards are left out. All providers return the same value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import sra_loss_rivals as rivals
from benchmarks.providers import differentiated, on_backend
from benchmarks.registry import Benchmark, Job
from benchmarks.shapes import SHAPES, SHARED, Shape, normal, seeded, shared_ids, span_counts
from sra.model import Head
from sra.objective import LayerPair, combine, recipe, span_losses
from sra_kernels import attention_mass
from sra_kernels.testing import real_lengths

PAPER = recipe("paper")
PROMPT = 64  # tokens before each response


@dataclass(frozen=True)
class Case:
    """`shared`: entries of the shared vocabulary; `spans`: of all samples together."""

    case: str
    student: str
    teacher: str
    batch: int
    dtype: str
    shared: int
    spans: int


def _case(student: str, teacher: str, batch: int, dtype: str = "float32") -> Case:
    return Case(
        f"{student} ← {teacher}, batch {batch}",
        student,
        teacher,
        batch,
        dtype,
        SHARED[student, teacher],
        sum(span_counts(batch)),
    )


CASES = [
    _case("SmolLM2", "Qwen2.5", 4),
    _case("GPT-2", "Qwen1.5", 4),
    _case("SmolLM2", "Qwen2.5", 16),
    _case("SmolLM2", "Qwen2.5", 4, "bfloat16"),
]
GPU = [
    _case("Llama-3.2-1B", "Qwen2.5-7B", 16, "bfloat16"),
    _case("SmolLM2", "Qwen2.5", 16, "bfloat16"),
    _case("SmolLM2", "Qwen2.5", 16),
]
SMALL = [_case("small", "large", 3, dtype) for dtype in ("float32", "bfloat16")]


@dataclass
class Side:
    """One model after its forward, right-padded, and its rows of the shared vocabulary.

    hidden ``[B, T, D]`` after the final norm; query ``[B, H, T, d]``, key ``[B, Hkv, T, d]`` of the
    last layer; head ``[V, D]``; ids ``[K]``; spans: token ranges of each sample.
    """

    hidden: Tensor
    query: Tensor
    key: Tensor
    lengths: Tensor
    head: Tensor
    ids: Tensor
    spans: list[Tensor]

    def __post_init__(self) -> None:
        self.visible = torch.arange(self.hidden.shape[1]) < self.lengths[:, None]
        self.last = self.lengths - 1
        self.scale = self.query.shape[-1] ** -0.5
        # Of the flattened rows.
        self.flat_spans = torch.cat(
            [spans + i * self.hidden.shape[1] for i, spans in enumerate(self.spans)]
        )


@dataclass
class Inputs:
    """`offsets` [B + 1]: the spans of each sample."""

    student: Side
    teacher: Side
    projector: Tensor
    offsets: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.student.hidden, self.student.head, self.projector


def inputs(case: Case) -> Inputs:
    generator = seeded()
    dtype = getattr(torch, case.dtype)
    counts = span_counts(case.batch)
    shapes = SHAPES[case.student], SHAPES[case.teacher]
    ids = shared_ids(shapes[0].vocabulary, shapes[1].vocabulary, case.shared, generator)

    def side(shape: Shape, ids: Tensor) -> Side:
        spans = []
        for count in counts:
            ends = torch.tensor(real_lengths(count, generator)).cumsum(0) + PROMPT
            spans.append(torch.stack([F.pad(ends[:-1], (1, 0), value=PROMPT), ends], dim=1))
        lengths = torch.stack([s[-1, 1] + 1 for s in spans])  # the end-of-sequence token
        tokens = int(lengths.max())
        query, key = (
            torch.randn(case.batch, heads, tokens, shape.head_dim, generator=generator)
            for heads in (shape.heads, shape.kv_heads)
        )
        head = normal(shape.vocabulary, shape.dim, generator).mul_(2 * shape.dim**-0.5)
        return Side(
            torch.randn(case.batch, tokens, shape.dim, generator=generator).to(dtype),
            query.to(dtype),
            key.to(dtype),
            lengths,
            head.to(dtype),
            ids,
            spans,
        )

    student, teacher = (side(*pair) for pair in zip(shapes, ids, strict=True))
    into, out_of = shapes[1].dim, shapes[0].dim
    projector = torch.randn(into, out_of, generator=generator).mul_(out_of**-0.5)
    x = Inputs(student, teacher, projector.to(dtype), torch.tensor([0, *counts]).cumsum(0))
    for leaf in x.leaves:
        leaf.requires_grad_()
    return x


def ours(x: Inputs) -> Job:
    student, teacher = x.student, x.teacher
    counts = torch.tensor([1, len(student.spans), len(student.flat_spans), 1])

    def loss() -> Tensor:
        masses = [
            attention_mass(
                side.query,
                side.key,
                query_index=side.last,
                scale=side.scale,
                key_mask=side.visible,
            )
            for side in (student, teacher)
        ]
        hidden = student.hidden.flatten(0, 1), teacher.hidden.flatten(0, 1)
        mass = masses[0].flatten(), masses[1].flatten()
        terms = span_losses(
            PAPER,
            student_hidden=hidden[0],
            teacher_hidden=hidden[1],
            student_mass=mass[0],
            teacher_mass=mass[1],
            student_spans=student.flat_spans,
            teacher_spans=teacher.flat_spans,
            offsets=x.offsets,
            student_head=Head(student.head),
            teacher_head=Head(teacher.head),
            vocabulary=(student.ids, teacher.ids),
            pairs=[LayerPair(*hidden, *mass, x.projector)],
        )
        return combine(PAPER, terms.logit.new_zeros(()), terms, counts)[0]

    return differentiated(loss, leaves=x.leaves)


def exact(x: Inputs) -> list[Tensor]:
    """In float64, sample by sample, each span's mean as one row of a matrix of weights."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in x.leaves]
    hidden, head, projector = leaves
    pairs = [*_centres(x, hidden)]
    value = hidden.new_zeros(())
    for own, other, mass in pairs:
        salience = mass**PAPER.power / (mass**PAPER.power).sum()
        cosine = (salience * (1 - F.cosine_similarity(own @ projector.T, other))).sum()
        alike = [F.normalize(c) @ F.normalize(c).T for c in (own, other)]
        weight = salience[:, None] * salience * (1 - torch.eye(len(salience)))
        geometry = (weight * (alike[0] - alike[1]) ** 2).sum() / weight.sum()
        value = value + PAPER.cosine * cosine + PAPER.gamma * geometry
    q = torch.cat([own for own, _, _ in pairs]) @ head[x.student.ids].T
    p = torch.cat([other for _, other, _ in pairs]) @ x.teacher.head[x.teacher.ids].double().T
    q, p = ((logits / PAPER.temperature).log_softmax(-1) for logits in (q, p))
    value = value + PAPER.logit * (p.exp() * (p - q)).sum()
    value = (1 - PAPER.alpha) * value / len(hidden)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _centres(x: Inputs, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each sample: the student's and the teacher's centres of mass, the teacher's masses."""
    for i in range(len(hidden)):
        found = []
        for side, states in ((x.student, hidden[i]), (x.teacher, x.teacher.hidden[i].double())):
            query = side.query[i, :, side.last[i]].double()
            key = side.key[i].double().repeat_interleave(len(query) // side.key.shape[1], 0)
            scores = (key @ query[:, :, None])[..., 0] * side.scale
            weights = scores.masked_fill(~side.visible[i], -torch.inf).softmax(-1).mean(0)
            token = torch.arange(len(states))
            inside = (token >= side.spans[i][:, :1]) & (token < side.spans[i][:, 1:])
            held = inside * weights
            mass = held.sum(1)
            found.append((held / mass[:, None] @ states, mass))
        (own, _), (other, mass) = found
        yield own, other, mass


def flops(x: Inputs) -> int:
    """The products of the logit term on the shared rows (the teacher's logits; the student's and
    their two gradients) and of the projector; what else there is comes to less than 1 %."""
    spans, shared = len(x.student.flat_spans), len(x.student.ids)
    into, out_of = x.projector.shape
    return 2 * spans * (shared * (into + 3 * out_of) + 3 * into * out_of)


BENCHMARK = Benchmark(
    name="sra_loss",
    cases=CASES,
    small=SMALL,
    gpu=GPU,
    gpu_providers={"ours (CUDA)": on_backend("cuda", ours)},
    inputs=inputs,
    exact=exact,
    tolerance=lambda case: {"float32": 2e-5, "bfloat16": 5e-2}[case.dtype],
    providers={
        "ours": ours,
        "authors' recipe": rivals.authors,
        "eager": rivals.eager,
        "torch.compile": rivals.compiled_eager,
    },
    headline=lambda case: case in (CASES[0], *GPU),
    headline_only=["authors' recipe", "torch.compile"],
    flops=flops,
    seconds=40,
)
