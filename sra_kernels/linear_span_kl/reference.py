"""Eager `linear_span_kl`: both whole logit matrices, then the eager `span_kl`."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.span_kl.reference import span_kl


def linear_span_kl(
    student: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    span_weights: Tensor | None,
    student_scale: float | None,
    student_softcap: float | None,
    teacher_scale: float | None,
    teacher_softcap: float | None,
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
) -> tuple[Tensor, Tensor]:
    """Returns (weighted kl [S], teacher_shared_mass [S])."""
    wide = check.accumulator(student.dtype)
    kl, mass = span_kl(
        logits(student, student_head, student_bias, student_scale, student_softcap).to(wide),
        logits(teacher, teacher_head, teacher_bias, teacher_scale, teacher_softcap).to(wide),
        student_ids, teacher_ids, temperature, direction, beta, outside,
    )  # fmt: skip
    if span_weights is None:
        return kl, mass
    return torch.where(span_weights == 0, 0, span_weights.to(wide) * kl), mass


def logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    z = torch.nn.functional.linear(hidden, head, bias)
    if scale is not None:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)
