"""`linear_span_kl` in torch operations: chunks of spans, so that no whole [S, V] tensor exists.

For each chunk: two matrix products give its logits; `compare` (of span_kl) turns the student's into
their gradient in place, with every factor folded in; two more products give the gradients of the
student's states and of its head. Heads are cut to the shared rows once, where those suffice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.span_kl.options import Vocab
from sra_kernels.span_kl.portable import block_bytes, block_rows, check_ids, compare, saved_dtype

CHUNK_BYTES = 64 << 20  # the chunk's logits of both sides
# Each chunk adds to the whole head's gradient: with fewer rows than this, that would be the cost.
MIN_ROWS = 64
CAST_BYTES = 32 << 20  # the part of a head that is cast at a time, where products need it wider


class Side(NamedTuple):
    """One model's part: its states, its head (cut to the rows in use), and what follows it."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    scale: float | None
    softcap: float | None

    @property
    def dtype(self) -> torch.dtype:
        return product_dtype(self.head)

    def parts(self) -> list[slice]:
        """Ranges of the head whose copy in the dtype of the products is small."""
        step = len(self.head)
        if self.head.dtype != self.dtype:
            step = max(1, CAST_BYTES // (self.head.shape[1] * self.dtype.itemsize))
        return [slice(i, i + step) for i in range(0, len(self.head), step)]

    def logits(self, rows: slice) -> Tensor:
        hidden = self.hidden[rows].to(self.dtype)
        out = hidden.new_empty(len(hidden), len(self.head))
        for part in self.parts():
            head = self.head[part].to(self.dtype).T
            if self.bias is None:
                torch.mm(hidden, head, out=out[:, part])
            else:
                torch.addmm(self.bias[part].to(self.dtype), hidden, head, out=out[:, part])
        return out

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of the states, from that of the products."""
        first, *others = self.parts()
        out = grad[:, first] @ self.head[first].to(self.dtype)
        for part in others:
            out.addmm_(grad[:, part], self.head[part].to(self.dtype))
        return out

    def finish(self, logits: Tensor, temperature: float) -> Tensor:
        """Scale, softcap and temperature, in place."""
        if self.scale is not None:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits.div_(temperature)

    def unfinish(self, grad: Tensor, finished: Tensor, temperature: float) -> Tensor:
        """From the gradient of the finished logits to that of the product, in place."""
        grad.div_(temperature)
        if self.softcap is not None:
            capped = finished * (temperature / self.softcap)
            grad.mul_(capped.square_().neg_().add_(1))
        return grad if self.scale is None else grad.mul_(self.scale)


def linear_span_kl_forward(
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
    need_mass: bool,
    need_student: bool,
    need_head: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (weighted kl [S], teacher_shared_mass [S], and the gradients of the sum of the former
    with respect to student, the head's rows in use, and its bias there). Not needed: [0]."""
    check_ids(student_ids, len(student_head), "student")
    check_ids(teacher_ids, len(teacher_head), "teacher")
    check.weights_content(span_weights, "span_weights")
    return sweep(
        student, student_head, student_bias, teacher, teacher_head, teacher_bias, student_ids,
        teacher_ids, span_weights, student_scale, student_softcap, teacher_scale, teacher_softcap,
        temperature, direction, beta, outside, need_mass, need_student, need_head, need_bias,
    )  # fmt: skip


def linear_span_kl_backward(grad_kl: Tensor, *constants: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for any upstream gradient of the spans: the logits are made again, chunk by
    chunk, and the upstream gradient is folded in before the products."""
    inputs, span_weights, options = constants[:8], constants[8], constants[9:]
    factors = grad_kl if span_weights is None else grad_kl * span_weights
    args = [*inputs, factors, *options[:8], False, *options[8:]]
    _, _, grad_student, grad_head, grad_bias = sweep(*args)
    return grad_student, grad_head, grad_bias


def sweep(
    student: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    factors: Tensor | None,
    student_scale: float | None,
    student_softcap: float | None,
    teacher_scale: float | None,
    teacher_softcap: float | None,
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
    need_mass: bool,
    need_student: bool,
    need_head: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over the chunks, with any real factor for each span."""
    cut_student = student_ids if outside != "bucket" else None
    cut_teacher = teacher_ids if outside == "renormalise" and not need_mass else None
    ours = side(student, student_head, student_bias, student_scale, student_softcap, cut_student)
    theirs = side(teacher, teacher_head, teacher_bias, teacher_scale, teacher_softcap, cut_teacher)
    inner_student = student_ids if cut_student is None else None
    inner_teacher = teacher_ids if cut_teacher is None else None

    need_grad = need_student or need_head or need_bias
    wide = check.accumulator(student.dtype)
    saved = saved_dtype(student.dtype)
    kl = student.new_empty(len(student), dtype=wide)
    mass = kl.new_empty(len(student) if need_mass else 0)
    grad_student = student.new_empty(student.shape if need_student else 0, dtype=saved)
    grad_head = kl.new_zeros(ours.head.shape if need_head else 0)
    grad_bias = kl.new_zeros(len(ours.head) if need_bias else 0)

    columns = len(ours.head) + len(theirs.head)
    step = chunk_rows(columns, ours.dtype.itemsize)
    block = block_rows(max(len(ours.head), len(theirs.head)), student.device)
    for start in range(0, len(student), step):
        rows = slice(start, start + step)
        student_logits, teacher_logits = ours.logits(rows), theirs.logits(rows)
        for first in range(0, len(student_logits), block):
            inner = slice(first, first + block)
            outer = slice(start + first, start + first + len(student_logits[inner]))
            finished = ours.finish(student_logits[inner].to(wide, copy=True), temperature)
            values, block_mass, grad = compare(
                finished, theirs.finish(teacher_logits[inner].to(wide, copy=True), temperature),
                inner_student, inner_teacher, direction, beta, outside, need_mass, need_grad,
            )  # fmt: skip
            # A factor of 0 takes the span out, whatever its states hold.
            unused = None if factors is None else factors[outer] == 0
            if factors is not None and unused is not None:
                values = (values * factors[outer]).masked_fill_(unused, 0)
            kl[outer] = values
            if need_mass:
                mass[outer] = block_mass
            if need_grad:
                grad = ours.unfinish(grad, finished, temperature)
                if factors is not None and unused is not None:
                    grad.mul_(factors[outer, None]).masked_fill_(unused[:, None], 0)
                student_logits[inner] = grad  # rounded once, to the dtype of the products
                if need_bias:
                    grad_bias += grad.sum(0)
        if need_student:
            grad_student[rows] = ours.back(student_logits)
        if need_head:
            hidden = student[rows].to(ours.dtype)
            if factors is not None:
                hidden = hidden.masked_fill((factors[rows] == 0)[:, None], 0)
            if hidden.dtype == wide:
                grad_head.addmm_(student_logits.T, hidden)
            else:
                grad_head += student_logits.T @ hidden
        del student_logits, teacher_logits  # before the next chunk's are made
    return kl, mass, grad_student, grad_head.to(saved), grad_bias.to(saved)


def plan(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    direction: str,
    vocab: Vocab | None = None,
    outside: str = "renormalise",
    return_shared_mass: bool = False,
    **options: Any,
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs), with gradients for whatever requires them."""
    wide, saved = check.accumulator(student.dtype).itemsize, saved_dtype(student.dtype).itemsize
    product, theirs_product = (product_dtype(x).itemsize for x in (student_head, teacher_head))
    shared = None if vocab is None else len(vocab[0])
    cut_student = shared is not None and outside != "bucket"
    cut_teacher = shared is not None and outside == "renormalise" and not return_shared_mass
    ours = shared if shared is not None and cut_student else len(student_head)
    theirs = shared if shared is not None and cut_teacher else len(teacher_head)
    rows = max(1, min(len(student), chunk_rows(ours + theirs, product)))
    block = min(rows, block_rows(max(ours, theirs), student.device))

    heads = ours * student.shape[1] * student_head.element_size() * cut_student
    heads += theirs * teacher.shape[1] * teacher_head.element_size() * cut_teacher
    casts = product > student_head.element_size() or theirs_product > teacher_head.element_size()
    heads += min(CAST_BYTES, 4 * max(ours * student.shape[1], theirs * teacher.shape[1])) * casts
    results = 2 * wide * len(student) + student.numel() * saved * student.requires_grad
    working = rows * (ours * product + theirs * theirs_product)
    working += block_bytes(block, ours, student.dtype, direction, outside)
    working += 0 if shared is None or cut_teacher else 4 * block * theirs * wide
    head = ours * student.shape[1] * student_head.requires_grad
    temporary = head * max(saved, product if product < wide else 0)
    forward = heads + results + head * wide + max(working, temporary)
    full = student_head.numel() * student_head.element_size() * student_head.requires_grad
    backward = 2 * results + 2 * head * saved + full * cut_student
    return (
        f"chunks of {rows} spans by {ours} student and {theirs} teacher entries",
        max(forward, backward),
    )


def chunk_rows(columns: int, itemsize: int) -> int:
    return max(MIN_ROWS, CHUNK_BYTES // (columns * itemsize))


def side(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    ids: Tensor | None,
) -> Side:
    if ids is not None:
        head = head.index_select(0, ids)
        bias = None if bias is None else bias.index_select(0, ids)
    return Side(hidden, head, bias, scale, softcap)


def product_dtype(head: Tensor) -> torch.dtype:
    """float16 gradients of probabilities would underflow, and a processor without bfloat16
    arithmetic is many times slower in it: both multiply in float32."""
    if head.dtype == torch.float16:
        return torch.float32
    native = head.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if head.dtype == torch.bfloat16 and not native else head.dtype
