"""DSKDv2: distillation in both models' spaces on exactly aligned tokens (arXiv 2504.11426)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra.baselines.baseline import Baseline, Pair
from sra.baselines.dskd import ROWS, head_kl, student_space
from sra.model import Head, head_of, linear_map
from sra.vocabulary import SharedVocabulary

FIT_ROWS = 8192  # of the heads, multiplied at once in float64


@dataclass(frozen=True)
class DSKDv2(Baseline):
    """Where both models predict the same token after the same text, in either space.

    For the states h^S, h^T that predict an aligned token, and y the teacher's most likely token:

        student space: u = P_ts h^T, through the student's head, which is a constant: CE(u, y), and
            KL(u || h^S) where u's most likely token is y; in the KL u is a constant. A y that is
            not in the student's vocabulary is left out.
        teacher space: w = P_st h^S, through the teacher's head: KL(h^T || w)

    L is the sum of the three over aligned tokens, each of which is a span, divided by the number of
    spans. P_ts and P_st begin where, on the shared rows of the heads W, the logits of states that
    are mapped are nearest to those that they had: P_ts = pinv(W_S) W_T, P_st = pinv(W_T) W_S.

    A token is aligned if it is a span of one token on both sides and the two tokens are the same
    entry of the shared vocabulary. Spans open and close at the bytes where tokens end on both
    sides, so the text before such a token is equal without a look at it. Public code joins the
    tokens' spellings, without word-start marks, and goes on by the length of what it has joined: a
    token that differs in white space alone counts as equal, and behind a character that the
    tokenizers spell differently (`Ã©`, `é`) none is aligned any more. It also

    - divides each term by its own count of tokens in a batch, so that all of them weigh more than
      here, and can lift the condition on y in a batch that agrees often enough: the loss depends
      on what else is in the batch;
    - leaves tokens with an unknown y out of the teacher's space too, where y has no part;
    - computes P_st anew at each step, from the first columns of the student's head beside the
      overlapping ones of the teacher's, which are the same tokens with one tokenizer only. Here it
      is trained, like P_ts;
    - has the end of a turn among the aligned tokens. It is in no span.

    In a short run, a `projector_learning_rate` of 5e-4 leads the maps away from where they begin
    before they fit better; 5e-5 was better in docs/evidence.md.
    """

    temperature: float = 2.0
    name: ClassVar[str] = "dskd-eta"
    normaliser: ClassVar[Literal["tokens", "sequences", "spans"]] = "spans"

    def projections(
        self, student: Any, teacher: Any, vocabulary: SharedVocabulary | None = None
    ) -> list[nn.Linear]:
        """P_ts, P_st.

        Args:
            vocabulary: of both; None if the heads' rows are the same tokens.
        """
        with torch.no_grad():
            heads = head_of(student), head_of(teacher)
            ids = (
                (vocabulary.student_ids, vocabulary.teacher_ids)
                if vocabulary is not None
                else (torch.arange(len(heads[0].weight)),) * 2
            )
            maps = _fits(*heads, *ids)
            layers = [linear_map(student, *fit.shape[::-1]) for fit in maps]
            for layer, fit in zip(layers, maps, strict=True):
                layer.weight.copy_(fit)
        return layers

    def loss(self, pair: Pair, projections: Sequence[Tensor]) -> Tensor:
        student, teacher = pair.student, pair.teacher
        rows, others = aligned(pair)
        own, other = student.hidden[rows - 1], teacher.hidden[others - 1]
        to_student, to_teacher = (p.to(own.dtype) for p in projections)
        said = torch.cat([teacher.head.logits(part).argmax(dim=-1) for part in other.split(ROWS)])
        if pair.vocabulary is not None:
            ids = pair.vocabulary.teacher_ids, pair.vocabulary.student_ids
            said = _table(teacher.head, *ids)[said]
        return student_space(
            own, student.head, F.linear(other.to(own.dtype), to_student), said, self.temperature
        ) + head_kl(F.linear(own, to_teacher), teacher.head, other, teacher.head, self.temperature)


def aligned(pair: Pair) -> tuple[Tensor, Tensor]:
    """Rows of both sides that are one token after one text, and that something predicts."""
    student, teacher = pair.student, pair.teacher
    single = torch.stack([side.spans.diff(dim=1)[:, 0] == 1 for side in (student, teacher)]).all(0)
    rows, others = student.spans[single, 0], teacher.spans[single, 0]
    same = student.ids[rows]
    if pair.vocabulary is not None:
        ids = pair.vocabulary.student_ids, pair.vocabulary.teacher_ids
        same = _table(student.head, *ids)[same]
    keep = (same == teacher.ids[others]) & ~student.first[rows] & ~teacher.first[others]
    return rows[keep], others[keep]


def _table(head: Head, ids: Tensor, partners: Tensor) -> Tensor:
    """``[V]``, the partner of each token of a head, -100 for none."""
    device = head.weight.device
    table = torch.full((len(head.weight),), -100, device=device)
    table[ids.to(device)] = partners.to(device)
    return table


def _fits(student: Head, teacher: Head, ids: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """pinv(W_S) W_T and pinv(W_T) W_S of the rows that `ids` and `partners` name.

    By pinv(W) = pinv(W'W) W', in float64, so that no more than a few rows of the heads are copied.
    """
    device = student.weight.device
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    width = student.weight.shape[1]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for chunk in zip(ids.split(FIT_ROWS), partners.split(FIT_ROWS), strict=True):
        both = torch.cat(
            [
                head.weight[rows.to(head.weight.device)].to(device, torch.float64)
                * (1 if head.scale is None else head.scale)
                for head, rows in zip((student, teacher), chunk, strict=True)
            ],
            dim=1,
        )
        total = total + both.T @ both
    own, cross, other = total[:width, :width], total[:width, width:], total[width:, width:]
    return (
        torch.linalg.pinv(own, hermitian=True) @ cross,
        torch.linalg.pinv(other, hermitian=True) @ cross.T,
    )
