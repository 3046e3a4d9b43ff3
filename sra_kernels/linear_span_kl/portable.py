"""linear_span_kl in torch operations: the chunks of chunks.py, compared by span_kl's `compare`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.linear_span_kl import chunks
from sra_kernels.linear_span_kl.chunks import RESTORED_BYTES, Chunk, Objective, Side
from sra_kernels.span_kl.portable import block_bytes, block_rows, compare, long


def linear_span_kl_forward(*args: Any) -> tuple[Tensor, ...]:
    chunks.check_contents(*args)
    return chunks.sweep(compare_chunk, *args)


def linear_span_kl_backward(*args: Any) -> tuple[Tensor, ...]:
    return chunks.backward(compare_chunk, *args)


def linear_span_kl_restore(
    grad: Tensor, factor: Tensor | None, ids: Tensor, entries: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of a whole head: `grad` times the factor in the rows `ids`, zeros elsewhere."""
    ids = ids.long()
    whole = grad.new_zeros((entries, grad.shape[1]), dtype=dtype)
    # A piece at a time: a scaled copy of all would be one more buffer of the head's size.
    step = max(1, RESTORED_BYTES // max(1, grad.shape[1] * grad.element_size()))
    for start in range(0, len(grad), step):
        piece = grad[start : start + step]
        piece = piece if factor is None else piece * factor
        whole.index_copy_(0, ids[start : start + step], piece.to(dtype))
    return whole


def compare_chunk(
    ours: Side, theirs: Side, objective: Objective, chunk: Chunk, need_grad: bool
) -> None:
    """Fills the chunk's kl and mass; its student logits become their gradient, if needed."""
    temperature, direction, beta, outside, student_ids, teacher_ids = objective
    student_ids, teacher_ids = long(student_ids), long(teacher_ids)
    step = block_rows(max(chunk.student.shape[1], chunk.teacher.shape[1]), chunk.student.device)
    for start in range(0, len(chunk.student), step):
        rows = slice(start, start + step)
        student = finish(ours, chunk.student[rows], temperature, chunk.kl.dtype)
        teacher = finish(theirs, chunk.teacher[rows], temperature, chunk.kl.dtype)
        kl, mass, grad = compare(
            student, teacher, student_ids, teacher_ids, direction, beta, outside,
            chunk.mass is not None, need_grad,
        )  # fmt: skip
        factors = kl.new_ones(len(kl)) if chunk.factors is None else chunk.factors[rows]
        chunk.kl[rows] = (kl * factors).masked_fill_(factors == 0, 0)
        if chunk.mass is not None:
            chunk.mass[rows] = mass
        if need_grad:
            grad = unfinish(ours, grad, student, temperature).mul_(factors[:, None])
            # Rounded once, to the dtype of the products.
            chunk.student[rows] = grad.masked_fill_((factors == 0)[:, None], 0)


def finish(side: Side, logits: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    """Scale, softcap and temperature."""
    logits = logits.to(wide, copy=True)
    if side.scale is not None:
        logits.mul_(side.scale)
    if side.softcap is not None:
        logits.div_(side.softcap).tanh_().mul_(side.softcap)
    return logits.div_(temperature)


def unfinish(side: Side, grad: Tensor, finished: Tensor, temperature: float) -> Tensor:
    """From the gradient of the finished logits to that of the product, in place."""
    grad.div_(temperature)
    if side.softcap is not None:
        capped = finished * (temperature / side.softcap)
        grad.mul_(capped.square_().neg_().add_(1))
    return grad if side.scale is None else grad.mul_(side.scale)


def plan(*args: Any, **options: Any) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs), with gradients for whatever requires them."""
    return chunks.plan_with(block_bytes_of_chunk, *args, **options)


def block_bytes_of_chunk(
    rows: int, ours: int, theirs: int, student: Tensor, direction: str, outside: str
) -> int:
    """What `compare_chunk` holds beside the chunk."""
    block = min(rows, block_rows(max(ours, theirs), student.device))
    whole = 4 * block * theirs * check.accumulator(student.dtype).itemsize
    return block_bytes(block, ours, student.dtype, direction, outside) + whole * (theirs != ours)
