"""GOLD: merged distributions on matched and unmatched entries (TRL's experimental trainer)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sra.baselines.baseline import Baseline, Pair, Side
from sra.baselines.ranks import sorted_distance
from sra.chunks import sum_by_chunks
from sra.model import Head
from sra.side import rows_of

ROWS = 64  # whose two distributions are sorted at once: 64 * 150,000 fp32 is 38 MB


@dataclass(frozen=True)
class GOLD(Baseline):
    """One distribution for each side of a span, compared by entries where both have them.

    TRL closes a group of tokens where both sides reach the same byte; that is a span. Of a span's
    tokens x_1 ... x_n, with p_k the distribution at `temperature` that predicts x_k:

        gold-observed: P = p_1 * p_2(x_2) * ... * p_n(x_n)
        gold-bayesian: P = p_1(x_1) * ... * p_{n-1}(x_{n-1}) * p_n

    P is not normalised, and with n > 1 its sum is below 1. With s and t the student's and the
    teacher's, and m = beta t + (1 - beta) s:

        L = sum over spans of w_m [beta sum t log(t / m) + (1 - beta) sum s log(s / m)]
                            + w_u sum over ranks of |sort(s) - sort(t)|

    the first over the entries of the shared vocabulary, where neither is renormalised, the second
    over all others, padding of the heads included, the fewer filled with zeros. `matched_weight`
    w_m is by default the shared part of the teacher's head, `unmatched_weight` w_u = 1 - w_m.

    Public code reads observed probabilities and p_1 one position late, from the states behind the
    tokens that they should predict (bayesian mode shifts them); keeps a last group that is closed
    on no common byte; raises probabilities below 1e-8 to that; drops the second sum if one side has
    no unmatched entry; and averages over the spans of each row, then over rows, where here the sum
    is divided by the spans of the step.
    """

    temperature: float = 1.0
    beta: float = 0.5
    matched_weight: float | None = None
    unmatched_weight: float | None = None

    normaliser: ClassVar[Literal["tokens", "sequences", "spans"]] = "spans"
    # The token of a span whose whole distribution is kept.
    kept: ClassVar[Literal["first", "last"]] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ValueError(f"beta = {self.beta}: the teacher's share of the mixture, in (0, 1).")

    def loss(self, pair: Pair, projections: Sequence[Tensor]) -> Tensor:
        sides = pair.student, pair.teacher
        # Where nothing predicts a span's first token, there is nothing to multiply.
        known = ~(sides[0].first[sides[0].spans[:, 0]] | sides[1].first[sides[1].spans[:, 0]])
        rows, likelihood = self._merge(sides[0], sides[0].spans[known])
        with torch.no_grad():
            others, target = self._merge(sides[1], sides[1].spans[known])
        own, other = self._parts(pair)
        weight = self.matched_weight
        if weight is None:
            weight = len(other[0]) / len(pair.teacher.head.weight)
        rest = 1 - weight if self.unmatched_weight is None else self.unmatched_weight

        theirs = pair.teacher.hidden[others - 1]

        def distance(states: Tensor, head: Head, here: slice, factor: Tensor) -> Tensor:
            s = self._log_probabilities(head, states) + factor[:, None]
            with torch.no_grad():
                t = self._log_probabilities(pair.teacher.head, theirs[here])
                t += target[here, None]
            matched = jensen_shannon(s[:, own[0]], t[:, other[0]], self.beta)
            unmatched = sorted_distance(s[:, own[1]].exp(), t[:, other[1]].exp())
            return weight * matched + rest * unmatched

        states = pair.student.hidden[rows - 1]
        return sum_by_chunks(distance, states, pair.student.head, likelihood, rows=ROWS)

    def _merge(self, side: Side, spans: Tensor) -> tuple[Tensor, Tensor]:
        """``[S]``, the row of each span whose distribution is kept, and the log-likelihood of its
        other tokens."""
        starts, ends = spans.unbind(1)
        kept = starts if self.kept == "first" else ends - 1
        span, rows = rows_of(spans)
        rows, span = (x[rows != kept[span]] for x in (rows, span))

        def observed(states: Tensor, ids: Tensor) -> Tensor:
            return self._log_probabilities(side.head, states).gather(1, ids[:, None])[:, 0]

        dtype = torch.promote_types(side.head.weight.dtype, torch.float32)
        total = torch.zeros(len(spans), dtype=dtype, device=spans.device)
        for own, at in zip(rows.split(ROWS), span.split(ROWS), strict=True):
            states, ids = side.hidden[own - 1], side.ids[own]
            found: Tensor = checkpoint(observed, states, ids, use_reentrant=False)
            total = total.index_add(0, at, found)
        return kept, total

    def _log_probabilities(self, head: Head, states: Tensor) -> Tensor:
        return (head.logits(states) / self.temperature).log_softmax(dim=-1)

    def _parts(self, pair: Pair) -> list[tuple[Tensor, Tensor]]:
        """Matched and unmatched entries of both sides; the matched ones in one order."""
        parts = []
        for side, name in ((pair.student, "student_ids"), (pair.teacher, "teacher_ids")):
            every = torch.arange(len(side.head.weight), device=side.hidden.device)
            shared = every
            if pair.vocabulary is not None:
                shared = getattr(pair.vocabulary, name).to(every.device)
            outside = torch.ones_like(every, dtype=torch.bool).index_fill(0, shared, False)
            parts.append((shared, every[outside]))
        return parts


class GOLDObserved(GOLD):
    """`GOLD` with the distribution that predicts a span's first token, TRL's default."""

    name: ClassVar[str] = "gold-observed"
    kept: ClassVar[Literal["first", "last"]] = "first"


class GOLDBayesian(GOLD):
    """`GOLD` with the distribution that predicts a span's last token."""

    name: ClassVar[str] = "gold-bayesian"
    kept: ClassVar[Literal["first", "last"]] = "last"


def jensen_shannon(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """Generalised (GKD, arXiv 2306.13649), of logarithms of positive numbers of any sum; summed.

    Not negative, and 0 only where both are the same: x log x is convex.
    """
    share = torch.tensor(beta, dtype=s.dtype, device=s.device)
    m = torch.logaddexp(t + share.log(), s + torch.log1p(-share))
    return (share * t.exp() * (t - m) + (1 - share) * s.exp() * (s - m)).sum()
