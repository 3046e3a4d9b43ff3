"""What two models predict at the end of each span, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sra.batch import sequence_rows
from sra.evaluation.likelihood import CHUNK_ELEMENTS
from sra.model import Head, head_of
from sra.states import run_trunk, trunk_inputs
from sra.vocabulary import SharedVocabulary
from sra_kernels import span_kl


@dataclass(frozen=True)
class ComparedRow:
    """The spans of one row, and what both models expect to follow each.

    Attributes:
        ids: the student's tokens of the row.
        labelled: which of them the student is trained on.
        spans: half-open ranges of `ids`.
        divergence: bits, KL(teacher ‖ student) of the next token after each span; what lies outside
            the shared vocabulary counts as one more token.
        student_top, teacher_top: the likeliest shared token of each side, as the student's id.
    """

    ids: list[int]
    labelled: list[bool]
    spans: list[tuple[int, int]]
    divergence: list[float]
    student_top: list[int]
    teacher_top: list[int]

    @property
    def agreements(self) -> int:
        """Spans after which both models expect the same token."""
        return sum(s == t for s, t in zip(self.student_top, self.teacher_top, strict=True))

    @property
    def mean_divergence(self) -> float:
        """Bits a span; nan for a row without spans."""
        return sum(self.divergence) / len(self.spans) if self.spans else math.nan


@torch.no_grad()
def compare_spans(
    student: Any,
    teacher: Any,
    rows: Sequence[Mapping[str, Any]],
    collator: Any,
    vocabulary: SharedVocabulary | None,
    *,
    batch_size: int = 8,
) -> list[ComparedRow]:
    """Both models read each row, and are compared where a span ends on both sides.

    The last token of a span ends at the same character on both sides, so there both models predict
    what follows the same text.

    Args:
        student, teacher: causal language models of transformers, each on its own device; their
            training mode is left as it was. The teacher may be a cache of states.
        rows: of any kind that `collator` takes.
        collator: a `SpanCollator` of both tokenizers, of whose teachers the first is compared.
        vocabulary: their `SharedVocabulary`; None if they have one vocabulary.
        batch_size: rows in a forward pass.

    Returns:
        one `ComparedRow` a row, in order; without spans for a row that `collator` leaves out.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    models = [model for model in (student, teacher) if isinstance(model, nn.Module)]
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        compared = []
        for start in range(0, len(rows), batch_size):
            batch = collator(rows[start : start + batch_size])
            compared += _compare(student, teacher, batch, vocabulary)
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)
    return compared


def span_agreement(
    student: Any,
    teacher: Any,
    rows: Sequence[Mapping[str, Any]],
    collator: Any,
    vocabulary: SharedVocabulary | None,
    *,
    batch_size: int = 8,
) -> float:
    """The share of spans after which both models' likeliest shared token is the same, 0 to 1.

    Arguments as for `compare_spans`.

    Raises:
        ValueError: there is no span in any row.
    """
    compared = compare_spans(student, teacher, rows, collator, vocabulary, batch_size=batch_size)
    return agreement_of(compared)


def agreement_of(compared: Sequence[ComparedRow]) -> float:
    """`span_agreement` of rows that were compared already."""
    spans = sum(len(row.spans) for row in compared)
    if not spans:
        raise ValueError(
            "There is no span in any row, so there is nothing to compare. Look at the rows with "
            "sra align, or choose another pair."
        )
    return sum(row.agreements for row in compared) / spans


def _compare(
    student: Any, teacher: Any, batch: Mapping[str, Any], vocabulary: SharedVocabulary | None
) -> list[ComparedRow]:
    theirs = batch["teachers"][0]
    spans = theirs["student_spans"]
    divergence: list[float] = []
    tops: tuple[list[int], list[int]] = [], []
    if len(spans):
        heads = head_of(student), head_of(teacher)
        divergence, tops = _at_ends(
            _hidden(student, batch, heads[0].weight.device)[spans[:, 1] - 1],
            _hidden(teacher, theirs, heads[1].weight.device)[theirs["teacher_spans"][:, 1] - 1],
            *heads,
            vocabulary,
        )
    ids, labels = batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist()
    compared = []
    layout = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    for rows in sequence_rows(*layout):
        begin, end = int(rows[0]), int(rows[-1]) + 1
        inside = ((spans[:, 0] >= begin) & (spans[:, 0] < end)).nonzero()[:, 0].tolist()
        compared.append(
            ComparedRow(
                ids=ids[begin:end],
                labelled=[label >= 0 for label in labels[begin:end]],
                spans=[(a - begin, b - begin) for a, b in spans[inside].tolist()],
                divergence=[divergence[i] for i in inside],
                student_top=[tops[0][i] for i in inside],
                teacher_top=[tops[1][i] for i in inside],
            )
        )
    return compared


def _hidden(model: Any, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """``[rows, D]``: the post-final-norm states of a batch, flattened."""
    given = {
        name: batch[name].to(device)
        for name in ("input_ids", "attention_mask", "position_ids")
        if name in batch
    }
    if isinstance(model, nn.Module):
        return run_trunk(model, **trunk_inputs(**given)).last_hidden_state.flatten(0, 1)
    return model.states(**given).hidden[-1].flatten(0, 1)


def _at_ends(
    student_states: Tensor,
    teacher_states: Tensor,
    student_head: Head,
    teacher_head: Head,
    vocabulary: SharedVocabulary | None,
) -> tuple[list[float], tuple[list[int], list[int]]]:
    """Bits of divergence, and the likeliest shared token of each side as the student's id."""
    device = student_states.device
    shared = None
    if vocabulary is not None:
        shared = vocabulary.student_ids.to(device), vocabulary.teacher_ids.to(device)
    divergence: list[float] = []
    tops: tuple[list[int], list[int]] = [], []
    width = max(student_head.weight.shape[0], teacher_head.weight.shape[0])
    chunk = max(1, CHUNK_ELEMENTS // width)
    for ours, theirs in zip(student_states.split(chunk), teacher_states.split(chunk), strict=True):
        logits = student_head.logits(ours), teacher_head.logits(theirs).to(device)
        nats = span_kl(
            *logits,
            temperature=1.0,
            direction="forward",
            vocab=shared,
            outside="renormalise" if shared is None else "bucket",
        )
        divergence += (nats / math.log(2)).tolist()
        for side, (top, values) in enumerate(zip(tops, logits, strict=True)):
            if shared is None:
                top += values.argmax(dim=-1).tolist()
            else:
                best = values.index_select(1, shared[side]).argmax(dim=-1)
                top += shared[0][best].tolist()
    return divergence, tops
