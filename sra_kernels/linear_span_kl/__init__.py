"""linear_span_kl: span_kl from hidden states and heads, without the logit matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from sra_kernels import backend, check, library
from sra_kernels.linear_span_kl import reference
from sra_kernels.linear_span_kl.autograd import Each, Sum
from sra_kernels.span_kl.options import Direction, Outside, Vocab, validate

Reduction: TypeAlias = Literal["sum", "none"]
Preset: TypeAlias = Literal["chunks", "tiles"]


@overload
def linear_span_kl(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float,
    direction: Direction,
    reduction: Reduction,
    beta: float | None = None,
    vocab: Vocab | None = None,
    outside: Outside = "renormalise",
    span_weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    student_scale: float | None = None,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_scale: float | None = None,
    teacher_softcap: float | None = None,
    return_shared_mass: Literal[False] = False,
    preset: Preset = "chunks",
) -> Tensor: ...
@overload
def linear_span_kl(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float,
    direction: Direction,
    reduction: Reduction,
    beta: float | None = None,
    vocab: Vocab | None = None,
    outside: Outside = "renormalise",
    span_weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    student_scale: float | None = None,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_scale: float | None = None,
    teacher_softcap: float | None = None,
    return_shared_mass: Literal[True],
    preset: Preset = "chunks",
) -> tuple[Tensor, Tensor]: ...
def linear_span_kl(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float,
    direction: Direction,
    reduction: Reduction,
    beta: float | None = None,
    vocab: Vocab | None = None,
    outside: Outside = "renormalise",
    span_weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    student_scale: float | None = None,
    student_softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_scale: float | None = None,
    teacher_softcap: float | None = None,
    return_shared_mass: bool = False,
    preset: Preset = "chunks",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The logit term of SRA (arXiv 2605.01205): KL of the heads' logits at each span's state.

    .. math:: \ell_i = \lambda_i\, D\big(z^T_i / \tau,\ z^S_i / \tau\big), \qquad
        z = \mathrm{softcap}(\mathrm{scale} \cdot (x W^\top + b))

    with :math:`D` exactly as in `span_kl` (``temperature``, ``direction``, ``beta``, ``vocab``,
    ``outside`` are described there), :math:`\mathrm{softcap}(z) = c \tanh(z / c)`.

    Args:
        student, student_head: ``[S, Ds]`` and ``[Vs, Ds]``, one dtype: float32, bfloat16, float16
            or float64.
        teacher, teacher_head: ``[S, Dt]`` and ``[Vt, Dt]``, one dtype; constants.
        reduction: ``"sum"`` gives the scalar :math:`\sum_i \ell_i`, ``"none"`` every
            :math:`\ell_i`.
        span_weights: ``[S]`` :math:`\lambda`, finite and not negative, a constant; None for 1. A
            span of weight 0 is left out whatever its states hold.
        student_bias, teacher_bias: ``[Vs]``, ``[Vt]``, in the dtype of their head.
        student_scale, teacher_scale: a factor on the logits (Cohere's ``logit_scale``, the inverse
            of Granite's ``logits_scaling``).
        student_softcap, teacher_softcap: the cap (Gemma-2's ``final_logit_softcapping``), applied
            after the scale and before the temperature.
        return_shared_mass: give the teacher's shared mass ``[S]`` as well.
        preset: ``"tiles"`` gives the value alone, without gradient, and holds no logits in memory
            at all; see below.

    Returns:
        A scalar or ``[S]``, float32 (float64 for float64 inputs); with ``return_shared_mass`` also
        ``teacher_shared_mass [S]`` (see `span_kl`).

    Gradients go to ``student``, ``student_head`` and ``student_bias``, each only if it requires
    one: a frozen head costs neither a product nor a buffer. The head's gradient accumulates in
    float32. ``"sum"`` forms gradients in the forward sweep, and its backward multiplies them by
    the upstream scalar, out of place; ``"none"`` sweeps again in the backward, with the upstream
    gradient of each span folded in. A second backward is right; double backward raises. Same
    input and number of threads, same bits (the products are torch's).

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or options; a teacher tensor or
            ``span_weights`` that requires grad; ids out of range or given twice; weights that are
            NaN, infinite or negative.

    Cost: for K compared entries 2·S·K·(Ds + Dt) flops forward and 2·S·K·Ds for each of the two
    gradients (``"none"`` repeats the forward). Logits exist for one chunk of spans at a time;
    ``explain(linear_span_kl, ...)`` tells its size and the peak memory. ``"bucket"``, ``"weight"``
    and ``return_shared_mass`` need the teacher's whole head, ``"bucket"`` also the student's.

    With ``preset="tiles"`` the Triton kernels make the logits block by block, on chip, and twice:
    for the sums behind every probability, then for the exact value, so 4·S·K·(Ds + Dt) flops. In
    memory there are a few sums for each span. It is for evaluation and tight memory, with ``vocab``
    renormalised or one vocabulary, and raises where a gradient would be recorded.

    >>> loss = linear_span_kl(com_s, lm_head_s, com_t, lm_head_t, temperature=2.0,
    ...     direction="forward", vocab=(ids_s, ids_t), reduction="sum")
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none', not {reduction!r}.")
    _check_side("student", student, student_head, student_bias)
    _check_side("teacher", teacher, teacher_head, teacher_bias)
    _check_transform("student", student_scale, student_softcap)
    _check_transform("teacher", teacher_scale, teacher_softcap)
    _check_preset(
        preset, (student, student_head, student_bias),
        return_shared_mass or (vocab is not None and outside != "renormalise"),
    )  # fmt: skip
    check.same_device("teacher", teacher, "student", student)
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"student has {student.shape[0]} rows and teacher {teacher.shape[0]}. "
            "Pass one row of each for every span."
        )
    for name, x in (
        ("teacher", teacher), ("teacher_head", teacher_head), ("teacher_bias", teacher_bias),
    ):  # fmt: skip
        check.constant(name, x, "linear_span_kl gives the teacher no gradient")
    if span_weights is not None:
        check.floating("span_weights", span_weights, 1)
        check.length("span_weights", span_weights, student.shape[0], "span")
        check.same_device("span_weights", span_weights, "student", student)
        check.constant("span_weights", span_weights, "linear_span_kl gives weights no gradient")
        span_weights = span_weights.to(check.accumulator(student.dtype))
    student_ids, teacher_ids = validate(
        temperature, direction, beta, outside, vocab, student,
        (student_head.shape[0], teacher_head.shape[0]),
    )  # fmt: skip
    args: tuple[Any, ...] = (
        student, student_head, student_bias, teacher, teacher_head, teacher_bias, student_ids,
        teacher_ids, span_weights, student_scale, student_softcap, teacher_scale, teacher_softcap,
        temperature, direction, beta, outside,
    )  # fmt: skip
    if backend.current() == "reference":
        kl, mass = reference.linear_span_kl(*args)
        loss = kl.sum() if reduction == "sum" else kl
    elif preset == "tiles":
        kl = library.ops.linear_span_kl_tiles(*args)
        return kl.sum() if reduction == "sum" else kl
    else:
        function = Sum if reduction == "sum" else Each
        loss, mass = function.apply(torch.is_grad_enabled(), *args, return_shared_mass)
    return (loss, mass) if return_shared_mass else loss


def _check_side(name: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    check.floating(name, hidden, 2)
    check.floating(f"{name}_head", head, 2)
    check.same_dtype(f"{name}_head", head, name, hidden)
    check.same_device(f"{name}_head", head, name, hidden)
    if head.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}_head has shape {[*head.shape]} and {name} {[*hidden.shape]}: the second sizes "
            "must agree. A head is [vocabulary, hidden size], as in lm_head.weight."
        )
    if bias is not None:
        check.floating(f"{name}_bias", bias, 1)
        check.length(f"{name}_bias", bias, head.shape[0], f"row of {name}_head")
        check.same_dtype(f"{name}_bias", bias, f"{name}_head", head)
        check.same_device(f"{name}_bias", bias, f"{name}_head", head)


def _check_transform(name: str, scale: float | None, softcap: float | None) -> None:
    if isinstance(scale, Tensor) or isinstance(softcap, Tensor):
        raise TypeError(f"{name}_scale and {name}_softcap are Python numbers: pass .item() once.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}_softcap must be positive, not {softcap}; None for no cap.")


def _check_preset(preset: str, learners: Sequence[Tensor | None], whole_heads: bool) -> None:
    if preset not in ("chunks", "tiles"):
        raise ValueError(f"preset must be 'chunks' or 'tiles', not {preset!r}.")
    if preset == "chunks":
        return
    if whole_heads:
        raise ValueError(
            "preset='tiles' compares shared entries alone: for outside='weight' or 'bucket' and "
            "for return_shared_mass use preset='chunks'."
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learners):
        raise ValueError(
            "preset='tiles' gives no gradient: use preset='chunks', or torch.no_grad()."
        )


__all__ = ["linear_span_kl"]
