"""Students, teachers and batches of the distributed checks, all in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sra import SpanAligner, SpanCollator, SpanDistiller, recipe
from tests import tiny

ALL = recipe("paper", gamma=2.0, outside="weight", layers=((0, 1, 2.0), (-1, -1, 1.0)))
RESPELL = recipe("respell")
NAMES = ["one", "two"]
# A row goes to the first teacher, to the second, or to both.
ROUTED = [
    {**row, "teacher": name}
    for row, name in zip(tiny.ROWS, ["one"] * 3 + ["two"] * 4 + [NAMES], strict=True)
]


def collator(teachers: int = 1, **options: Any) -> SpanCollator:
    aligner = SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    names = NAMES if teachers == 2 else None
    return SpanCollator([aligner] * teachers, max_length=256, teacher_names=names, **options)


def distiller(
    teachers: int = 1, *, tied: bool = True, teacher: Any = None, objective: Any = ALL
) -> SpanDistiller:
    """The same one, projectors included, whatever was drawn before."""
    given = [tiny.teacher_model(torch.float64, seed=seed) for seed in range(1, 1 + teachers)]
    student = tiny.student_model(torch.float64, tied=tied)
    torch.manual_seed(0)
    return SpanDistiller(
        student,
        given if teacher is None else teacher,
        objective,
        vocabulary=[tiny.vocabulary()] * teachers,
        teacher_weights=[0.5, 1.5][:teachers],
    )


def gradients(module: Any) -> dict[str, torch.Tensor]:
    """By name, whole where sharded; names without what DDP and checkpointing put into them."""
    found = {}
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        found[name.removeprefix("module.")] = whole.clone()
    return found


def alone(module: SpanDistiller, batch: Any, counts: torch.Tensor | None = None) -> Any:
    """Loss and gradients of one rank that holds everything."""
    module = copy.deepcopy(module)
    loss = module(**batch, num_items_in_batch=counts).loss
    loss.backward()
    return loss.detach(), gradients(module)


def shares(rows: list[Any], rank: int, world: int) -> list[Any]:
    """This rank's rows: contiguous, and not as many for each."""
    cuts = {2: [0, 3, 8], 4: [0, 1, 4, 6, 8]}[world]
    return rows[cuts[rank] : cuts[rank + 1]]


def total(counts: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(counts)
    return counts


def assert_same(ours: Any, theirs: Any, atol: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=atol, msg=name)
