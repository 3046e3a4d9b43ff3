"""Eager `span_kl`: log-softmax and the textbook formulas, differentiated by plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check


def span_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
) -> tuple[Tensor, Tensor]:
    """Returns (kl [S], teacher_shared_mass [S])."""
    wide = check.accumulator(student_logits.dtype)
    student = student_logits.to(wide) / temperature
    teacher = teacher_logits.to(wide) / temperature
    if student_ids is None or teacher_ids is None:
        mass = teacher.new_ones(len(teacher))
    else:
        mass = teacher.softmax(1)[:, teacher_ids].sum(1)
        if outside == "bucket":
            student = with_bucket(student, student_ids)
            teacher = with_bucket(teacher, teacher_ids)
        else:
            student, teacher = student[:, student_ids], teacher[:, teacher_ids]
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    if direction == "forward":
        kl = divergence(log_t, log_s)
    elif direction == "reverse":
        kl = divergence(log_s, log_t)
    else:
        assert beta is not None
        mixture = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
        kl = beta * divergence(log_t, mixture) + (1 - beta) * divergence(log_s, mixture)
    return (kl * mass if outside == "weight" else kl), mass


def with_bucket(logits: Tensor, ids: Tensor) -> Tensor:
    """[S, K+1]: the logits of `ids`, then the log-sum-exp of all the others."""
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[ids] = False
    return torch.cat([logits[:, ids], logits[:, others].logsumexp(1, keepdim=True)], 1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q) per row; an entry with p = 0 counts as 0 whatever q is."""
    ratio = torch.where(log_p > -torch.inf, log_p, 0) - torch.where(log_p > -torch.inf, log_q, 0)
    return (log_p.exp() * ratio).sum(1)
