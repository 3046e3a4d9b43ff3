"""ALM: approximate likelihood matching (arXiv 2503.20083, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sra.baselines.baseline import Baseline, Pair
from sra.likelihood import span_likelihood


@dataclass(frozen=True)
class ALM(Baseline):
    """Both sides shall find the text of each span equally likely: see `sra.likelihood`.

    The paper's unconstrained chunks are our spans. Its correction of the tokenizers' bias, its
    latent loss and its weighting by gradients are not here.
    """

    temperature: float = 100.0
    name: ClassVar[str] = "alm"
    normaliser: ClassVar[Literal["tokens", "sequences", "spans"]] = "spans"

    def loss(self, pair: Pair, projections: Sequence[Tensor]) -> Tensor:
        return span_likelihood(pair.student, pair.teacher, self.temperature)
