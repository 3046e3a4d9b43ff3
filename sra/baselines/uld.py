"""ULD: universal logit distillation (arXiv 2402.12030, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sra.baselines.baseline import Baseline, Pair, lined_up
from sra.baselines.ranks import sorted_distance
from sra.chunks import sum_by_chunks
from sra.model import Head

ROWS = 64  # whose two distributions are sorted at once: 64 * 150,000 fp32 is 38 MB


@dataclass(frozen=True)
class ULD(Baseline):
    """Tokens are paired by their number in the answer, probabilities by their rank.

    L = sum over positions and ranks of |sort(p_student) - sort(p_teacher)|, the smaller vocabulary
    filled with zeros. Public code takes softmax at temperature 1 whatever its option says, and
    begins at the answer's own positions; here `temperature` is one, and the distributions compared
    are those that predict the tokens.
    """

    temperature: float = 1.0
    name: ClassVar[str] = "uld"

    def loss(self, pair: Pair, projections: Sequence[Tensor]) -> Tensor:
        rows, others = lined_up(pair)
        theirs = pair.teacher.hidden[others - 1]

        def distance(states: Tensor, head: Head, here: slice) -> Tensor:
            with torch.no_grad():
                target = self._probabilities(pair.teacher.head.logits(theirs[here]))
            return sorted_distance(self._probabilities(head.logits(states)), target)

        states = pair.student.hidden[rows - 1]
        return sum_by_chunks(distance, states, pair.student.head, rows=ROWS)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(dim=-1)
