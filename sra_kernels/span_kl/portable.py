"""`span_kl` in torch operations: blocks of rows, first statistics, then value and gradient.

The value is Σ p φ(r) with φ(r) = eʳ − 1 − r and r = log q − log p: every term is ≥ 0, so the sum
keeps its accuracy when the two distributions agree, and an entry with p = 0 needs no special case.
`linear_span_kl` runs `compare` on its own chunks of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sra_kernels import check

STATS = 16  # sums over a row that the kernels keep for their backward; 0: not known
# One float32 buffer of a block: near the L2 cache on a CPU, enough work for one launch elsewhere.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 8 << 20}


def block_rows(columns: int, device: torch.device) -> int:
    return max(1, BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"]) // (4 * max(columns, 1)))


def span_kl_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
    need_mass: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (kl [S], teacher_shared_mass [S] or [0], sums over each row [S, STATS] or [0]).

    The sums are for the backward, zero where not known: here always, for it makes them again.
    """
    check_ids(student_ids, student_logits.shape[1], "student")
    check_ids(teacher_ids, teacher_logits.shape[1], "teacher")
    student_ids, teacher_ids = long(student_ids), long(teacher_ids)
    kl = student_logits.new_empty(
        len(student_logits), dtype=check.accumulator(student_logits.dtype)
    )
    mass = kl.new_empty(len(kl) if need_mass else 0)
    args = (student_logits, teacher_logits, student_ids, teacher_ids, temperature, direction, beta)
    for rows, values, block_mass, _ in blocks(*args, outside, need_mass, False):
        kl[rows] = values
        if need_mass:
            mass[rows] = block_mass
    return kl, mass, kl.new_zeros((len(kl), STATS) if need_grad else 0)


def span_kl_backward(
    grad_kl: Tensor,
    stats: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
) -> Tensor:
    """The gradient [S, Vs]; entries outside the vocabulary that is compared get zeros."""
    student_ids, teacher_ids = long(student_ids), long(teacher_ids)
    inside = student_ids is not None and outside != "bucket"
    grad = (torch.zeros_like if inside else torch.empty_like)(
        student_logits, memory_format=torch.contiguous_format
    )
    args = (student_logits, teacher_logits, student_ids, teacher_ids, temperature, direction, beta)
    for rows, _, _, block in blocks(*args, outside, False, True):
        block = block.mul_(grad_kl[rows, None] / temperature).to(grad.dtype)
        if inside and student_ids is not None:
            grad[rows].index_copy_(1, student_ids, block)
        else:
            grad[rows] = block
    return grad


def blocks(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
    need_mass: bool,
    need_grad: bool,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(rows, kl, mass, gradient before the temperature) of each block of rows."""
    wide = check.accumulator(student_logits.dtype)
    step = block_rows(max(student_logits.shape[1], teacher_logits.shape[1]), student_logits.device)
    for start in range(0, len(student_logits), step):
        rows = slice(start, start + step)
        student = student_logits[rows]
        if student_ids is not None and outside != "bucket":
            student = student.index_select(1, student_ids)
        yield (
            rows,
            *compare(
                student.to(wide) / temperature,
                teacher_logits[rows].to(wide) / temperature,
                student_ids if outside == "bucket" else None,
                teacher_ids,
                direction,
                beta,
                outside,
                need_mass,
                need_grad,
            ),
        )


def plan(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    direction: str,
    outside: str = "renormalise",
    **options: Any,
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs), the backward included if there is one."""
    (spans, columns), theirs = student_logits.shape, teacher_logits.shape[1]
    step = max(1, min(spans, block_rows(max(columns, theirs), student_logits.device)))
    block = block_bytes(step, max(columns, theirs), student_logits.dtype, direction, outside)
    grad = student_logits.numel() * student_logits.element_size() * student_logits.requires_grad
    small = 2 * spans * check.accumulator(student_logits.dtype).itemsize
    return f"blocks of {step} spans", small + grad + block


def block_bytes(rows: int, columns: int, dtype: torch.dtype, direction: str, outside: str) -> int:
    """What `compare` and its inputs hold at once, counted in buffers of [rows, columns]."""
    buffers = (18 if direction == "jsd" else 13) + (3 if outside == "bucket" else 0)
    return buffers * rows * columns * check.accumulator(dtype).itemsize


def compare(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    direction: str,
    beta: float | None,
    outside: str,
    need_mass: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of rows, logits already wide and divided by the temperature.

    Ids that are None mean that the columns of that side are the shared entries already. Returns
    (kl [C], mass [C] or [0], gradient with respect to `student` as given, or [0]). The weight of
    `outside="weight"` is in both.
    """
    if outside == "bucket":  # the bucket's log-sum-exp is rounded at its own size: keep that small
        student, teacher = student - top(student), teacher - top(teacher)
    shared = teacher if teacher_ids is None else teacher.index_select(1, teacher_ids)
    mass = teacher.new_empty(0)
    if need_mass or outside == "weight":
        mass = shared_mass(teacher, shared, teacher_ids)
    if outside == "bucket" and student_ids is not None and teacher_ids is not None:
        student_bucket, student_share = bucket(student, student_ids)
        teacher_bucket, _ = bucket(teacher, teacher_ids)
        kl, classes = divergence(
            torch.cat([student.index_select(1, student_ids), student_bucket], 1),
            torch.cat([shared, teacher_bucket], 1),
            direction,
            beta,
            need_grad,
        )
        if not need_grad:
            return kl, mass, classes
        grad = student_share.mul_(classes[:, -1:])
        return kl, mass, grad.index_copy_(1, student_ids, classes[:, :-1])
    kl, grad = divergence(student, shared, direction, beta, need_grad)
    if outside == "weight":
        kl = kl * mass
        grad = grad.mul_(mass[:, None]) if need_grad else grad
    return kl, mass, grad


def divergence(
    student: Tensor, teacher: Tensor, direction: str, beta: float | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """KL of each row over the columns of two equal-shaped blocks, and its gradient (or [0]).

    A teacher row without any finite logit has nothing to teach: 0 with zero gradient.
    """
    teaches = teacher.amax(1, keepdim=True) != -torch.inf
    teacher_shift, p_t, log_t = softmax(teacher)
    student_shift, p_s, log_s = softmax(student)
    ratio = (student_shift - teacher_shift).sub_(log_s - log_t)  # log p_s − log p_t
    grad = ratio.new_empty(0)
    if direction == "forward":
        kl = divergence_terms(p_t, p_s, ratio).sum(1)
        if need_grad:
            grad = p_s.sub_(p_t)
    elif direction == "reverse":
        kl = divergence_terms(p_s, p_t, ratio.neg_()).sum(1)
        if need_grad:
            grad = through_softmax(p_s, ratio.neg_())
    else:
        assert beta is not None
        mixture = beta * p_t + (1 - beta) * p_s
        # log(m/s) and log(m/t): each from the side whose exponential cannot overflow.
        from_s = torch.log1p(beta * torch.expm1(-ratio))
        from_t = torch.log1p((1 - beta) * torch.expm1(ratio))
        over_s = torch.where(ratio < 0, from_t - ratio, from_s)
        over_t = torch.where(ratio < 0, from_t, from_s + ratio)
        kl = beta * divergence_terms(p_t, mixture, over_t).sum(1)
        kl += (1 - beta) * divergence_terms(p_s, mixture, over_s).sum(1)
        if need_grad:
            grad = through_softmax(p_s, over_s.mul_(beta - 1))
    if need_grad:
        grad = grad.masked_fill_(~teaches, 0)
    return kl.masked_fill_(~teaches[:, 0], 0), grad


def softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits − row maximum, probabilities, log of the sum): a large maximum costs no accuracy."""
    shifted = logits - logits.amax(1, keepdim=True)
    p = shifted.exp()
    total = p.sum(1, keepdim=True)
    return shifted, p.mul_(1 / total), total.log()


def through_softmax(p: Tensor, slope: Tensor) -> Tensor:
    """p (slope − Σ p·slope), centred on the likeliest entry first: where one entry holds nearly all
    the mass, its own slope would cancel against the sum."""
    slope = slope.masked_fill_(p == 0, 0)
    slope = slope.sub_(slope.gather(1, p.argmax(1, keepdim=True)))
    return slope.sub_((p * slope).sum(1, keepdim=True)).mul_(p)


def divergence_terms(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """p φ(r) with r = log q − log p; q where p is 0.

    p eʳ carries the rounding of a large r, so there q itself is taken; near 0 nothing cancels.
    """
    near = torch.expm1(ratio).sub_(ratio).mul_(p)
    far = (q - p).addcmul_(p, ratio, value=-1)
    return torch.where(p == 0, q, torch.where(ratio > 1, far, near))


def shared_mass(logits: Tensor, shared: Tensor, ids: Tensor | None) -> Tensor:
    """Softmax mass of the shared entries in the whole row, [C]."""
    if ids is None:
        return logits.new_ones(len(logits))
    level = top(logits)
    part, whole = (shared - level).exp_().sum(1), (logits - level).exp_().sum(1)
    return torch.where(whole == 0, 0, (part / whole).clamp_(max=1))


def bucket(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [C, 1] of the entries outside `ids`, and their softmax among themselves [C, V].

    Summed over the outside entries themselves: 1 − Σ shared would cancel.
    """
    others = logits.index_fill(1, ids, -torch.inf)
    level = top(others)
    share = others.sub_(level).exp_()
    total = share.sum(1, keepdim=True)
    return total.log() + level, share.div_(total.masked_fill(total == 0, 1))


def top(logits: Tensor) -> Tensor:
    """Row maximum [C, 1]; 0 where nothing is finite, so that −inf − top stays −inf."""
    highest = logits.amax(1, keepdim=True)
    return highest.masked_fill_(highest == -torch.inf, 0)


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients wait in float32 for the loss scale, which arrives only in the backward."""
    return torch.float32 if dtype == torch.float16 else dtype


def long(ids: Tensor | None) -> Tensor | None:
    """As torch's own functions want them."""
    return None if ids is None else ids.long()


def check_ids(ids: Tensor | None, entries: int, side: str) -> None:
    """Raises unless the ids are unique and inside [0, entries); on a GPU without a host sync."""
    if ids is None:
        return
    bad_range = f"{side}_ids of vocab must lie in [0, {entries}), the entries of the {side}'s head."
    bad_twice = f"{side}_ids of vocab name an entry twice. Pair each entry once."
    if ids.device.type == "cpu" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= entries:
            raise ValueError(f"{bad_range} Found {low if low < 0 else high}.")
        if int(ids.bincount().max()) > 1:
            raise ValueError(f"{bad_twice} Found {int(ids.bincount().argmax())} again.")
    elif ids.numel():
        torch._assert_async(((ids >= 0) & (ids < entries)).all(), bad_range)
        ordered = ids.sort().values
        torch._assert_async((ordered[1:] != ordered[:-1]).all(), bad_twice)
