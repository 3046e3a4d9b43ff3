"""span_kl: the divergence between teacher and student logits, one value for each span."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sra_kernels import backend, check
from sra_kernels.span_kl import reference
from sra_kernels.span_kl.autograd import SpanKl
from sra_kernels.span_kl.options import Direction, Outside, Vocab, validate


@overload
def span_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    direction: Direction,
    beta: float | None = None,
    vocab: Vocab | None = None,
    outside: Outside = "renormalise",
    return_shared_mass: Literal[False] = False,
) -> Tensor: ...
@overload
def span_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    direction: Direction,
    beta: float | None = None,
    vocab: Vocab | None = None,
    outside: Outside = "renormalise",
    return_shared_mass: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def span_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    direction: Direction,
    beta: float | None = None,
    vocab: Vocab | None = None,
    outside: Outside = "renormalise",
    return_shared_mass: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""KL divergence of each span's teacher and student logits (SRA, arXiv 2605.01205, logit term).

    With :math:`p^T, p^S` the softmaxes of the logits over ``temperature``:
    ``"forward"`` is :math:`KL(p^T \| p^S)` (the paper's), ``"reverse"`` :math:`KL(p^S \| p^T)`, and
    ``"jsd"`` :math:`\beta KL(p^T \| m) + (1-\beta) KL(p^S \| m)` with
    :math:`m = \beta p^T + (1-\beta) p^S` (generalised Jensen-Shannon, GKD, arXiv 2306.13649).
    There is no factor of temperature squared.

    Args:
        student_logits: ``[S, Vs]`` float32, bfloat16, float16 or float64.
        teacher_logits: ``[S, Vt]`` any of these; a constant. An entry of −inf has probability 0,
            and a row of nothing else has nothing to teach: value and gradient 0.
        temperature: a positive number.
        direction, beta: as above; ``beta`` in (0, 1) for ``"jsd"`` and only there.
        vocab: ``(student_ids [K], teacher_ids [K])``, integer ids of the entries that both
            vocabularies share, unique on each side. None means one vocabulary, and ``Vs == Vt``.
        outside: what the entries outside ``vocab`` do. ``"renormalise"`` (the paper's) compares
            softmaxes inside it; ``"weight"`` multiplies that by the teacher's shared mass, a
            constant; ``"bucket"`` compares the whole heads' softmaxes, with everything outside
            as one more class.
        return_shared_mass: give the teacher's shared mass as well.

    Returns:
        ``kl [S]`` float32 (float64 for float64 logits), never below 0 but for rounding; with
        ``return_shared_mass`` also ``teacher_shared_mass [S]``, the part of the teacher's softmax
        over its whole head (at this temperature) that lies in ``vocab``; 1 without ``vocab``.

    The gradient goes to ``student_logits`` alone, linear in any upstream gradient of the spans,
    formed in float32 in a sweep of the backward and rounded once; the logits and a few sums a span
    are saved, and a second backward is right. ``"reverse"`` is +inf, and its gradient undefined,
    where a teacher logit is −inf and the student's is not. Double backward raises. Same input, same
    bits.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or options; a teacher that requires
            grad; ids out of range or given twice.

    Cost: both logits are read once forward and once backward; the gradient is the one tensor of
    their size; working memory is a few rows.

    >>> loss = span_kl(student, teacher, temperature=2.0, direction="forward", vocab=(s, t)).mean()
    """
    check.floating("student_logits", student_logits, 2)
    check.floating("teacher_logits", teacher_logits, 2)
    check.same_device("teacher_logits", teacher_logits, "student_logits", student_logits)
    if teacher_logits.shape[0] != student_logits.shape[0]:
        raise ValueError(
            f"student_logits has {student_logits.shape[0]} rows and teacher_logits "
            f"{teacher_logits.shape[0]}. Pass one row of each for every span."
        )
    check.constant("teacher_logits", teacher_logits, "span_kl gives the teacher no gradient")
    student_ids, teacher_ids = validate(
        temperature, direction, beta, outside, vocab, student_logits,
        (student_logits.shape[1], teacher_logits.shape[1]),
    )  # fmt: skip
    options = (temperature, direction, beta, outside)
    if backend.current() == "reference":
        kl, mass = reference.span_kl(
            student_logits, teacher_logits, student_ids, teacher_ids, *options
        )
    else:
        kl, mass = SpanKl.apply(
            student_logits, teacher_logits, student_ids, teacher_ids, *options, return_shared_mass,
            student_logits.requires_grad and torch.is_grad_enabled(),
        )  # fmt: skip
    return (kl, mass) if return_shared_mass else kl


__all__ = ["span_kl"]
