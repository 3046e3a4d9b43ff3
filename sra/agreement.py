"""How often student and teacher find the same token the likeliest."""

from __future__ import annotations

import torch
from torch import Tensor

from sra.model import Head


@torch.no_grad()
def top_agreement(
    student: Tensor,
    student_head: Head,
    teacher: Tensor,
    teacher_head: Head,
    vocabulary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Share of rows whose most likely entry of the shared vocabulary is the same on both sides.

    Args:
        student, teacher: ``[S, Ds]``, ``[S, Dt]``, post-final-norm states at the ends of spans.
    """
    own, other = student_head.logits(student), teacher_head.logits(teacher)
    if vocabulary is not None:
        own, other = own[:, vocabulary[0]], other[:, vocabulary[1]]
    return (own.argmax(-1) == other.argmax(-1)).float().mean()


def evenly_spaced(count: int, most: int, device: torch.device) -> Tensor:
    """Up to `most` of `count` indices, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most), device=device).long()
