"""MultiLevelOT: optimal transport between tokens, and between sequences (arXiv 2412.14528)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sra.baselines.baseline import Baseline, Pair, Side, answers

ROWS = 64  # whose distributions exist at once: 64 * 150,000 fp32 is 38 MB
EPSILON, ITERATIONS = 0.1, 20  # of Sinkhorn's algorithm


@dataclass(frozen=True)
class MultiLevelOT(Baseline):
    """Vocabularies are paired by rank, and that ranking is one for all tokens of a sequence.

    Per sequence, with p = softmax of the logits over their standard deviation, the columns of each
    side in descending order of their sum over its tokens, and of those the first `top`:

        L = mean_n |p_student - p_teacher|_1                 (holistic absolute difference)
          + logarithmic * mean_n -p_teacher . log p_student  (sequential logarithmic)
          + sinkhorn * sum_ij P_ij C_ij                      (Sinkhorn distance)

    over the n tokens that have a partner of the same number in the answer. C_ij is the L1 distance
    of the student's token i from the teacher's token j, and P is the plan of Sinkhorn's algorithm
    in which each of the student's tokens weighs 1. The weights are those of the authors' code.

    Where that code differs: it ranks by the sum over the batch, so that a sequence's loss depends
    on its neighbours; takes softmax once more of the probabilities it kept, for both the second and
    the third term; has student and teacher the wrong way round in the second, which it also
    averages over padding; sums the third over sequences and averages the others; makes sequences
    one length with rows of zeros, which are tokens to the third (here the teacher's tokens weigh
    T_student / T_teacher each); and writes the probabilities into the models' logits. A copy of it
    multiplies the loss by the padding mask. None of this is here.
    """

    temperature: float = 1.0
    top: int = 50
    logarithmic: float = 0.1
    sinkhorn: float = 1e-4
    name: ClassVar[str] = "multilevel-ot"
    normaliser: ClassVar[Literal["tokens", "sequences", "spans"]] = "sequences"

    def loss(self, pair: Pair, projections: Sequence[Tensor]) -> Tensor:
        total = pair.student.hidden.new_zeros((), dtype=torch.float32)
        top = min(self.top, *(len(side.head.weight) for side in (pair.student, pair.teacher)))
        for rows, others in zip(*(_of_each(s, pair.offsets) for s in pair[:2]), strict=True):
            if not len(rows) or not len(others):
                continue
            log_student = self._ranked(pair.student, rows, top)
            with torch.no_grad():
                teacher = self._ranked(pair.teacher, others, top).exp()
            student, n = log_student.exp(), min(len(rows), len(others))
            absolute = (student[:n] - teacher[:n]).abs().sum() / n
            logarithmic = -(teacher[:n] * log_student[:n]).sum() / n
            total = total + absolute + self.logarithmic * logarithmic
            total = total + self.sinkhorn * sinkhorn_distance(student, teacher)
        return total

    def _ranked(self, side: Side, rows: Tensor, top: int) -> Tensor:
        """``[T, top]`` log-probabilities of a sequence's tokens, by their columns' rank."""
        states = side.hidden[rows - 1].split(ROWS)
        with torch.no_grad():
            masses = [self._log_probabilities(side, some).exp().sum(0) for some in states]
            columns = torch.stack(masses).sum(0).topk(top).indices

        def kept(some: Tensor) -> Tensor:
            return self._log_probabilities(side, some)[:, columns]

        return torch.cat([checkpoint(kept, some, use_reentrant=False) for some in states])

    def _log_probabilities(self, side: Side, states: Tensor) -> Tensor:
        logits = side.head.logits(states)
        scale = logits.std(dim=-1, keepdim=True).clamp(min=1e-6)
        return (logits / (scale * self.temperature)).log_softmax(dim=-1)


def _of_each(side: Side, offsets: Tensor) -> Sequence[Tensor]:
    """The rows of each sequence's answer."""
    said = answers(side, offsets)
    return said.rows.split(torch.bincount(said.sequence, minlength=len(offsets) - 1).tolist())


def sinkhorn_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_ij P_ij C_ij, C the L1 distances between the rows of ``[N, K]`` and ``[M, K]``.

    P = diag(u) exp(-C / epsilon) diag(v), whose rows sum to 1, and whose columns to N / M but for
    what the iterations leave. No factor is below exp(-2 / 0.1) between distributions, so nothing
    needs logarithms.
    """
    cost = torch.cdist(student, teacher, p=1)
    kernel = torch.exp(-cost / EPSILON)
    with torch.autocast(cost.device.type, enabled=False):  # products of few bits do not converge
        u = kernel.new_ones(len(student))
        for _ in range(ITERATIONS):
            v = 1 / (u @ kernel)  # times N / M, which u would divide by again
            u = 1 / (kernel @ v)
        return u @ (kernel * cost) @ v
