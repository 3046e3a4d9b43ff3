"""DSKD: distillation in both models' spaces, with cross-model attention (arXiv 2406.17328)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra.baselines.baseline import Baseline, Pair, answers, embedding_of
from sra.model import Head, linear_map, state_width
from sra_kernels import linear_span_kl

ROWS = 256  # whose logits are held at once


@dataclass(frozen=True)
class DSKD(Baseline):
    """Each model's states, brought to the other's tokens by attention and into its space by a map.

    For the tokens x_i (student) and y_j (teacher) of one answer, with e a model's input embedding,
    h the state that predicts a token, and N division by the standard deviation (section 3.3):

        Q_i = P_q [e(x_i-1); e(x_i)],   K_j = N[e(y_j-1); e(y_j)],   a_ij = Q_i . K_j / sqrt(2 D_t)
        student space: u_i = sum_j softmax_j(a_ij) P_ts (N h_j + N e(y_j)), through the student's
            head, which is a constant: CE(u_i, x_i), and KL(u_i || h_i) where u_i's most likely
            token is x_i; in the KL u is a constant
        teacher space: w_j = sum_i softmax_i(a_ij) P_st h_i, through the teacher's head:
            KL(h_j || w_j)

    L is the sum of the three, of the teacher's tokens too, as in public code. There the maps have a
    bias, and learn at 1e-3, and the standard deviations are of a batch with its prompts and its
    padding; here each is one number for a sequence, over all entries of its answer's rows, so that
    neither padding nor what else is in the batch changes the loss. Heads keep their bias, scale and
    softcap, and the attention is fp32 under autocast.
    """

    temperature: float = 2.0
    name: ClassVar[str] = "dskd"

    def projections(
        self, student: Any, teacher: Any, vocabulary: Any | None = None
    ) -> list[nn.Linear]:
        """P_q, P_ts, P_st.

        Raises:
            TypeError: the teacher is on disk, which keeps no embeddings.
            ValueError: its embeddings and its states, which are added, differ in width.
        """
        width = _embedding_width(teacher)
        own, other = state_width(student, -1), state_width(teacher, -1)
        if width != other:
            raise ValueError(
                f"The teacher's embeddings are {width} wide and its last states {other}; the "
                "method 'dskd' adds them. Use another method."
            )
        return [
            linear_map(student, 2 * _embedding_width(student), 2 * other),
            linear_map(student, other, own),
            linear_map(student, own, other),
        ]

    def loss(self, pair: Pair, projections: Sequence[Tensor]) -> Tensor:
        student, teacher = pair.student, pair.teacher
        sides = [(side, answers(side, pair.offsets)) for side in (student, teacher)]
        sequences = len(pair.offsets) - 1
        counts = [torch.bincount(a.sequence, minlength=sequences) for _, a in sides]
        both = (counts[0] > 0) & (counts[1] > 0)
        rows = [a.rows[both[a.sequence]] for _, a in sides]
        parts = [
            of_side.split((count * both).tolist())
            for of_side, count in zip(rows, counts, strict=True)
        ]
        wide = torch.promote_types(student.hidden.dtype, torch.float32)
        weights = [p.to(wide) for p in projections]
        embeddings = [embedding_of(side.model).detach() for side, _ in sides]

        def exchange(
            states: Tensor, own: Tensor, other: Tensor, query: Tensor, *maps: Tensor
        ) -> tuple[Tensor, Tensor]:
            """Of one sequence: the teacher's states for the student's tokens, and the reverse."""
            with torch.autocast(states.device.type, enabled=False):
                ours, theirs = (
                    table[torch.stack([side.ids[at - 1], side.ids[at]], dim=1).to(table.device)]
                    .flatten(1)
                    .to(states.device, wide)
                    for table, (side, _), at in zip(embeddings, sides, (own, other), strict=True)
                )
                targets = theirs[:, theirs.shape[1] // 2 :]
                value = _scaled(teacher.hidden[other - 1].to(wide)) + _scaled(targets)
                scores = F.linear(ours, query) @ _scaled(theirs).T / math.sqrt(theirs.shape[1])
                return (
                    scores.softmax(dim=1) @ F.linear(value, maps[0]),
                    scores.T.softmax(dim=1) @ F.linear(states.to(wide), maps[1]),
                )

        # Formed again in the backward: scores of all sequences are never held together.
        exchanged = [
            checkpoint(exchange, student.hidden[own - 1], own, other, *weights, use_reentrant=False)
            for own, other in zip(*parts, strict=True)
        ]
        to_student, to_teacher = (torch.cat(x) for x in zip(*exchanged, strict=True))
        return student_space(
            student.hidden[rows[0] - 1],
            student.head,
            to_student,
            student.ids[rows[0]],
            self.temperature,
        ) + head_kl(
            to_teacher,
            teacher.head,
            teacher.hidden[rows[1] - 1],
            teacher.head,
            self.temperature,
        )


def student_space(
    states: Tensor, head: Head, projected: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """CE of projected states, through the head as a constant, and where they predict the label,
    their KL to the student's own, in which they are constants. A label of -100 is left out.

    Args:
        states, projected: ``[A, D]``.
        labels: ``[A]``.
    """
    fixed = Head(
        head.weight.detach(),
        None if head.bias is None else head.bias.detach(),
        head.scale,
        head.softcap,
    )

    def score(projected: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = fixed.logits(projected)
        return F.cross_entropy(logits, labels, reduction="sum"), logits.argmax(dim=-1) == labels

    sums, right = zip(
        *(
            checkpoint(score, *part, use_reentrant=False)
            for part in zip(projected.split(ROWS), labels.split(ROWS), strict=True)
        ),
        strict=True,
    )
    where = torch.cat(right)
    kl = head_kl(states[where], head, projected[where].detach(), fixed, temperature)
    return torch.stack(sums).sum() + kl


def head_kl(
    states: Tensor, head: Head, target: Tensor, target_head: Head, temperature: float
) -> Tensor:
    """Sum over rows of KL(target || states), softmaxes of one vocabulary at a temperature."""
    return linear_span_kl(
        states.to(head.weight.dtype),
        head.weight,
        target.to(target_head.weight.dtype),
        target_head.weight,
        temperature=temperature,
        direction="forward",
        reduction="sum",
        student_bias=head.bias,
        student_scale=head.scale,
        student_softcap=head.softcap,
        teacher_bias=target_head.bias,
        teacher_scale=target_head.scale,
        teacher_softcap=target_head.softcap,
    )


def _scaled(x: Tensor) -> Tensor:
    """Divided by the standard deviation of all its entries."""
    deviation = (x - x.mean()).square().mean().sqrt()
    return x / deviation.clamp(min=torch.finfo(x.dtype).tiny)


def _embedding_width(model: Any) -> int:
    weight = embedding_of(model)
    return getattr(weight, "ds_shape", weight.shape)[1]  # DeepSpeed leaves a stub behind
