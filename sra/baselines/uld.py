"""ULD: universal logit distillation (arXiv 2402.12030, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sra.baselines.baseline import Baseline, Pair, lined_up

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
        """The teacher's is sorted again in the backward: all of them are as large as all logits."""
        with torch.no_grad():
            target = self._sorted(pair.teacher.head.logits(other))
        ranks = self._sorted(pair.student.head.logits(own))
        width = max(ranks.shape[-1], target.shape[-1])
        ranks, target = (F.pad(x, (0, width - x.shape[-1])) for x in (ranks, target))
        return (ranks - target).abs().sum()

    def _sorted(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True).values
