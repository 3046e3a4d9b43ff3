"""linear_span_kl in chunks of spans, so that no whole [S, V] tensor exists: what backends share.

For each chunk: two matrix products give its logits; these become the student's gradient in place,
with every factor folded in, by the backend's `compare_chunk`; two more products give the gradients
of the student's states and of its head. Heads are cut to the shared rows, where those suffice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.span_kl.options import Vocab
from sra_kernels.span_kl.portable import check_ids, saved_dtype


class Sizes(NamedTuple):
    """How the work is cut.

    Each chunk adds to the whole head's gradient, 8 bytes for each of its numbers. With fewer spans
    than `rows` that, and not the product, would be the cost: on an H100 by arithmetic 1181 / spans
    of the product's time.
    """

    chunk_bytes: int  # a chunk's logits of both sides, at least
    rows: int  # a chunk's spans, at least
    piece_bytes: int  # the part of a head that is gathered, or cast, at a time
    align: int  # entries: rows of logits, and pieces of them, begin at multiples, for wide accesses

    def columns(self, entries: int) -> int:
        """From one row of logits to the next."""
        return -(-entries // self.align) * self.align


SIZES = {"cpu": Sizes(64 << 20, 64, 4 << 20, 1), "cuda": Sizes(1 << 30, 1024, 256 << 20, 64)}
RESTORED_BYTES = 2 << 20  # the part of a head's gradient that is put in place at a time


class Side(NamedTuple):
    """One model's part: its states, its head, the head's rows in use, and what follows it."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    scale: float | None
    softcap: float | None
    ids: Tensor | None

    @property
    def entries(self) -> int:
        return len(self.head) if self.ids is None else len(self.ids)

    @property
    def dtype(self) -> torch.dtype:
        return product_dtype(self.head)

    def pieces(self) -> list[slice]:
        """Ranges of the rows in use whose copy, gathered and in the dtype of the products, is
        small: on a CPU it stays in the cache. All at once where the head serves as it is."""
        step = self.entries
        if self.ids is not None or self.head.dtype != self.dtype:
            size = sizes(self.head.device)
            step = size.piece_bytes // (self.head.shape[1] * self.dtype.itemsize)
            step = max(1, step - step % size.align)
        return [slice(i, i + step) for i in range(0, self.entries, step)]

    def rows(self, of: Tensor, piece: slice) -> Tensor:
        """A piece of the head or of its bias."""
        part = of[piece] if self.ids is None else of.index_select(0, self.ids[piece])
        return part.to(self.dtype)

    def buffer(self, rows: int) -> Tensor:
        """Room for the logits of so many spans; used for one chunk after another."""
        columns = sizes(self.hidden.device).columns(self.entries)
        room = self.hidden.new_empty(rows, columns, dtype=self.dtype)
        return native.prefer_huge_pages(room)[:, : self.entries]

    def logits(self, rows: slice, room: Tensor) -> Tensor:
        hidden = self.hidden[rows].to(self.dtype)
        out = room[: len(hidden)]
        for piece in self.pieces():
            head = self.rows(self.head, piece).T
            if self.bias is None:
                torch.mm(hidden, head, out=out[:, piece])
            else:
                torch.addmm(self.rows(self.bias, piece), hidden, head, out=out[:, piece])
        return out

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of the states, from that of the products."""
        first, *others = self.pieces()
        out = grad[:, first] @ self.rows(self.head, first)
        for piece in others:
            out.addmm_(grad[:, piece], self.rows(self.head, piece))
        return out


class Objective(NamedTuple):
    """What the logits are compared by. Ids are None where the columns are the shared entries."""

    temperature: float
    direction: str
    beta: float | None
    outside: str
    student_ids: Tensor | None
    teacher_ids: Tensor | None


class Chunk(NamedTuple):
    """Logits of some spans, [C, Vs] and [C, Vt]; what is to be filled, and each span's factor."""

    student: Tensor
    teacher: Tensor
    factors: Tensor | None
    kl: Tensor
    mass: Tensor | None


CompareChunk: TypeAlias = Callable[[Side, Side, Objective, Chunk, bool], None]


def forward(compare_chunk: CompareChunk, *args: Any) -> tuple[Tensor, ...]:
    """Returns (weighted kl [S], teacher_shared_mass [S], and the gradients of the sum of the former
    with respect to student, the head's rows in use, and its bias there). Not needed: [0]."""
    if check.contents(args[0].device):  # beside kernels on a GPU they would be most of the launches
        check_contents(*args)
    return sweep(compare_chunk, *args)


def check_contents(*args: Any) -> None:
    _, student_head, _, _, teacher_head, _, student_ids, teacher_ids, span_weights = args[:9]
    check_ids(student_ids, len(student_head), "student")
    check_ids(teacher_ids, len(teacher_head), "teacher")
    check.weights_content(span_weights, "span_weights")


def backward(compare_chunk: CompareChunk, grad_kl: Tensor, *constants: Any) -> tuple[Tensor, ...]:
    """The gradients for any upstream gradient of the spans: the logits are made again, chunk by
    chunk, and the upstream gradient is folded in before the products."""
    inputs, span_weights, options = constants[:8], constants[8], constants[9:]
    factors = grad_kl if span_weights is None else grad_kl * span_weights
    args = [*inputs, factors, *options[:8], False, *options[8:]]
    return sweep(compare_chunk, *args)[2:]


def sweep(
    compare_chunk: CompareChunk,
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
    ours = Side(student, student_head, student_bias, student_scale, student_softcap, cut_student)
    theirs = Side(teacher, teacher_head, teacher_bias, teacher_scale, teacher_softcap, cut_teacher)
    objective = Objective(
        temperature, direction, beta, outside,
        student_ids if cut_student is None else None,
        teacher_ids if cut_teacher is None else None,
    )  # fmt: skip

    need_grad = need_student or need_head or need_bias
    wide = check.accumulator(student.dtype)
    saved = saved_dtype(student.dtype)
    kl = student.new_empty(len(student), dtype=wide)
    mass = kl.new_empty(len(student)) if need_mass else None
    grad_student = student.new_empty(student.shape if need_student else 0, dtype=saved)
    # The first chunk's product writes it: zeros first would be one more pass over the whole head.
    grad_head = kl.new_empty((ours.entries, student.shape[1]) if need_head else 0)
    native.prefer_huge_pages(grad_head)
    grad_bias = kl.new_zeros(ours.entries if need_bias else 0)
    if len(student) == 0:
        grad_head.zero_()

    step = chunk_rows(ours.entries + theirs.entries, ours.dtype.itemsize, student_head, need_head)
    rooms = [x.buffer(min(step, len(student))) for x in (ours, theirs)]
    for start in range(0, len(student), step):
        rows = slice(start, start + step)
        factor = None if factors is None else factors[rows]
        part = None if mass is None else mass[rows]
        logits = ours.logits(rows, rooms[0]), theirs.logits(rows, rooms[1])
        chunk = Chunk(*logits, factor, kl[rows], part)
        compare_chunk(ours, theirs, objective, chunk, need_grad)
        if need_student:
            grad_student[rows] = ours.back(chunk.student)
        if need_head:
            hidden = student[rows].to(ours.dtype)
            if factor is not None:  # a factor of 0 takes the span out, whatever its state holds
                hidden = hidden.masked_fill((factor == 0)[:, None], 0)
            add_product(grad_head, chunk.student.T, hidden, first=start == 0)
        if need_bias:
            grad_bias += chunk.student.sum(0, dtype=wide)
        del logits, chunk
    rooms.clear()  # before the head's gradient is rounded into a copy
    none = kl.new_empty(0)
    mass = none if mass is None else mass
    return kl, mass, grad_student, grad_head.to(saved), grad_bias.to(saved)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or = if it is the first; the sum stays in the dtype of `total`."""
    if a.dtype != total.dtype and total.device.type == "cuda":
        # The product's own sums go on in float32: it is never rounded to the dtype of the logits.
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype != total.dtype:
        product = a @ b
        if first:
            total.copy_(product)
        else:
            total += product
    elif first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def with_kernel(compare: Callable[..., None]) -> CompareChunk:
    """`compare_chunk` by the `compare` of another backend of span_kl."""

    def compare_chunk(
        ours: Side, theirs: Side, objective: Objective, chunk: Chunk, need_grad: bool
    ) -> None:
        temperature, direction, beta, outside, student_ids, teacher_ids = objective
        compare(
            chunk.student, chunk.teacher, student_ids, teacher_ids, temperature, direction, beta,
            outside,
            factors=None if chunk.factors is None else chunk.factors.contiguous(),
            kl=chunk.kl,
            mass=chunk.mass,
            grad=chunk.student if need_grad else None,
            student_scale=ours.scale,
            student_softcap=ours.softcap,
            teacher_scale=theirs.scale,
            teacher_softcap=theirs.softcap,
        )  # fmt: skip

    return compare_chunk


def plan_with(
    comparing: Callable[[int, int, int, Tensor, str, str], int],
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    direction: str,
    vocab: Vocab | None = None,
    outside: str = "renormalise",
    return_shared_mass: bool = False,
    preset: str = "chunks",
    **options: Any,
) -> tuple[str, int]:
    if preset != "chunks":
        raise RuntimeError(
            f"Only the Triton kernels serve preset={preset!r}: explain it under "
            "use_backend('triton') on a GPU, or 'interpreter' on a CPU."
        )
    wide, saved = check.accumulator(student.dtype).itemsize, saved_dtype(student.dtype).itemsize
    product, theirs_product = (product_dtype(x).itemsize for x in (student_head, teacher_head))
    shared = None if vocab is None else len(vocab[0])
    cut_student = shared is not None and outside != "bucket"
    cut_teacher = shared is not None and outside == "renormalise" and not return_shared_mass
    ours = shared if shared is not None and cut_student else len(student_head)
    theirs = shared if shared is not None and cut_teacher else len(teacher_head)
    learns = student_head.requires_grad
    step = chunk_rows(ours + theirs, product, student_head, learns)
    rows = max(1, min(len(student), step))
    pieces = 0
    for cut, head, entries, size in (
        (cut_student, student_head, ours, product),
        (cut_teacher, teacher_head, theirs, theirs_product),
    ):
        copies = cut * head.element_size() + (size > head.element_size()) * size
        whole = entries * head.shape[1]
        pieces = max(pieces, copies * min(whole, sizes(head.device).piece_bytes // size))
    results = 2 * wide * len(student) + student.numel() * saved * student.requires_grad
    columns = sizes(student_head.device).columns
    logits = rows * (columns(ours) * product + columns(theirs) * theirs_product)
    working = logits + comparing(rows, ours, theirs, student, direction, outside)
    entries = ours * student.shape[1] * learns
    temporary = entries * max(saved if saved < wide else 0, product if product < wide else 0)
    forward = results + entries * wide + max(working + pieces, temporary)
    full = student_head.numel() * student_head.element_size() * learns
    backward = 2 * results + entries * saved + full + min(2 * RESTORED_BYTES, entries * saved)
    return (
        f"chunks of {rows} spans by {ours} student and {theirs} teacher entries "
        f"({logits / 2**20:.1f} MiB of logits)",
        max(forward, backward),
    )


def chunk_rows(columns: int, itemsize: int, head: Tensor, need_head: bool) -> int:
    """Spans whose logits take chunk_bytes, or what the head's gradient will take in the backward,
    when these logits are gone."""
    size = sizes(head.device)
    budget = max(size.chunk_bytes, head.numel() * head.element_size() * need_head)
    return max(size.rows, budget // (columns * itemsize))


def sizes(device: torch.device) -> Sizes:
    return SIZES.get(device.type, SIZES["cpu"])


def product_dtype(head: Tensor) -> torch.dtype:
    """float16 gradients of probabilities would underflow, and a processor without bfloat16
    arithmetic is many times slower in it: both multiply in float32."""
    if head.dtype == torch.float16:
        return torch.float32
    native = head.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if head.dtype == torch.bfloat16 and not native else head.dtype
