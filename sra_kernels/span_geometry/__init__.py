"""span_geometry: how differently two models place a sample's spans relative to one another."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import backend, check
from sra_kernels.span_geometry import reference
from sra_kernels.span_geometry.autograd import SpanGeometry


def span_geometry(student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    r"""Weighted difference of all pairwise cosines (SRA, arXiv 2605.01205, structural term).

    .. math:: L_b = \sum_{i \ne j} \pi_{ij} (\cos(S_i, S_j) - \cos(T_i, T_j))^2, \qquad
        \pi_{ij} = \frac{\lambda_i \lambda_j}{\sum_{k \ne l} \lambda_k \lambda_l}

    over the pairs of spans of sample b. The two sides need not have the same width.

    Args:
        student: ``[S, Ds]`` float32, bfloat16, float16 or float64.
        teacher: ``[S, Dt]`` any of these; a constant.
        weights: ``[S]`` :math:`\lambda`, finite and not negative, a constant. Only their ratios
            inside a sample count.
        offsets: ``[B + 1]`` integers; sample b owns spans ``offsets[b]:offsets[b + 1]``.

    Returns:
        ``[B]`` float32 (float64 for a float64 student). A sample with fewer than two spans of
        positive weight gives 0. A zero vector has cosine 0 with everything, and gradient 0; a span
        of weight 0 is left out whatever it holds.

    The gradient goes to ``student`` alone, linear in any upstream gradient of the samples, formed
    in float32 in the forward sweep and saved; nothing saved is changed, and a second backward is
    right. Double backward raises. Same input, same bits.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; teacher or weights that require
            grad; weights that are NaN, infinite or negative; offsets that are no partition.

    Cost: 2·(Ds + Dt) flops for each pair of spans in a sample (on a GPU, so far: in the batch), and
    2·Ds for the gradient; one chunk of rows of the cosine matrices in memory at a time.

    >>> loss = span_geometry(com_student, com_teacher, weights, torch.tensor([0, 80, 210])).mean()
    """
    check.floating("student", student, 2)
    check.floating("teacher", teacher, 2)
    check.floating("weights", weights, 1)
    check.length("weights", weights, student.shape[0], "span")
    check.integers("offsets", offsets, (None,))
    for name, x in (("teacher", teacher), ("weights", weights), ("offsets", offsets)):
        check.same_device(name, x, "student", student)
        check.constant(name, x, f"span_geometry gives {name} no gradient")
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"student has {student.shape[0]} rows and teacher {teacher.shape[0]}. "
            "Pass one row of each for every span."
        )
    if offsets.shape[0] == 0:
        raise ValueError("offsets is empty; for no samples it is [0].")
    weights = weights.to(check.accumulator(student.dtype))
    offsets = offsets.long()
    if backend.current() == "reference":
        return reference.span_geometry(student, teacher, weights, offsets)
    need_grad = student.requires_grad and torch.is_grad_enabled()
    return SpanGeometry.apply(student, teacher, weights, offsets, need_grad)


__all__ = ["span_geometry"]
