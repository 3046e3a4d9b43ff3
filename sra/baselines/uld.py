"""ULD: universal logit distillation (arXiv 2402.12030, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sra.baselines.baseline import Baseline, Pair, lined_up
from sra.baselines.ranks import sorted_distance

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
        total = pair.student.hidden.new_zeros((), dtype=torch.float32)
        states = (
            pair.student.hidden[rows - 1].split(ROWS),
            pair.teacher.hidden[others - 1].split(ROWS),
        )
        for own, other in zip(*states, strict=True):
            total = total + checkpoint(self._distance, pair, own, other, use_reentrant=False)
        return total

    def _distance(self, pair: Pair, own: Tensor, other: Tensor) -> Tensor:
        """The teacher's is made again in the backward: all of them are as large as all logits."""
        with torch.no_grad():
            target = self._probabilities(pair.teacher.head.logits(other))
        return sorted_distance(self._probabilities(pair.student.head.logits(own)), target)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(dim=-1)
