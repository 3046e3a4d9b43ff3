"""What every method that SRA is compared with has in common: what it sees, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sra.objective import SpanLosses
from sra.side import Side, embedding_of, rows_of, side_of
from sra.vocabulary import SharedVocabulary


class Pair(NamedTuple):
    """A batch as student and teacher see it.

    offsets: ``[B + 1]``, the spans of each sequence.
    vocabulary: what `Baseline.vocabulary` made of the two tokenizers; None if they are one.
    """

    student: Side
    teacher: Side
    offsets: Tensor
    vocabulary: Any | None


__all__ = ["Answers", "Baseline", "Pair", "Side", "answers", "embedding_of", "lined_up", "side_of"]


@dataclass(frozen=True)
class Baseline:
    """loss = alpha * CE + (1 - alpha) * L, with one L for each method.

    It stands where an `sra.Objective` does: `SpanDistiller(student, teacher, baseline("uld"))`.
    Frozen, hashable and without state; its parameters, if it has any, are the distiller's.
    """

    alpha: float = 0.5

    name: ClassVar[str] = ""
    # What the sum over the step is divided by.
    normaliser: ClassVar[Literal["tokens", "sequences", "spans"]] = "tokens"
    # Of an `Objective`: only `logit` is here, and it is this method's whole loss.
    cosine: ClassVar[float] = 0.0
    gamma: ClassVar[float] = 0.0
    likelihood: ClassVar[float] = 0.0
    logit: ClassVar[float] = 1.0
    compares_centres: ClassVar[bool] = False
    shares_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha = {self.alpha}: it is the share of cross-entropy, 0 to 1.")

    @property
    def needs_teacher(self) -> bool:
        return self.alpha < 1

    def side(self, index: Literal[0, 1]) -> list[int]:
        """Layers to read: the last."""
        return [-1]

    # What the method needs to know of the two vocabularies; called as `SharedVocabulary` is.
    vocabulary: ClassVar[Any] = SharedVocabulary

    def projections(
        self, student: Any, teacher: Any, vocabulary: Any | None = None
    ) -> list[nn.Linear]:
        """Maps between the models' spaces that the method trains, for one teacher; no biases."""
        return []

    def losses(
        self,
        student: Side,
        teacher: Side,
        offsets: Tensor,
        vocabulary: Any | None,
        projections: Sequence[Tensor],
    ) -> SpanLosses:
        """`loss`, in the place of the logit term; 0 where no sequence has a span."""
        zero = student.hidden.new_zeros((), dtype=torch.float32)
        if len(student.spans):
            loss = self.loss(Pair(student, teacher, offsets, vocabulary), projections)
        else:  # of every parameter, which ranks wait for
            loss = torch.stack([zero, *(p.sum().float() for p in projections)]).sum() * 0
        return SpanLosses(zero, zero, loss, None, zero)

    def loss(self, pair: Pair, projections: Sequence[Tensor]) -> Tensor:
        """The sum over the batch, with gradient to the student and the projections.

        Args:
            projections: the weights of `projections`, in their order.
        """
        raise NotImplementedError


class Answers(NamedTuple):
    """The tokens inside spans that something predicts, sequence by sequence.

    rows: ``[A]``; the states that predict them are those of ``rows - 1``.
    sequence: ``[A]``, to which each belongs.
    position: ``[A]``, their number in its sequence, from 0.
    """

    rows: Tensor
    sequence: Tensor
    position: Tensor


def answers(side: Side, offsets: Tensor) -> Answers:
    """What a side says in each sequence. The end of a turn is in no span, and so not among them."""
    device = side.spans.device
    offsets = offsets.to(device)
    owner, _ = rows_of(torch.stack([offsets[:-1], offsets[1:]], dim=1))
    span, rows = rows_of(side.spans)
    keep = ~side.first[rows]
    rows, sequence = rows[keep], owner[span][keep]
    counts = torch.bincount(sequence, minlength=len(offsets) - 1)
    position = torch.arange(len(rows), device=device) - (counts.cumsum(0) - counts)[sequence]
    return Answers(rows, sequence, position)


def lined_up(pair: Pair) -> tuple[Tensor, Tensor]:
    """Rows of both sides whose tokens have the same number in the answer of one sequence."""
    ours, theirs = (answers(side, pair.offsets) for side in (pair.student, pair.teacher))
    sequences = len(pair.offsets) - 1
    counts = [torch.bincount(a.sequence, minlength=sequences) for a in (ours, theirs)]
    shared = torch.minimum(*counts)
    return (
        ours.rows[ours.position < shared[ours.sequence]],
        theirs.rows[theirs.position < shared[theirs.sequence]],
    )
