"""linear_span_kl with no logits in memory: the preset "tiles", a value without gradient.

Each block of logits is made where it is compared, on chip, and twice: for the sums that every
probability needs, then for the divergence.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from sra_kernels import check
from sra_kernels.linear_span_kl import tile_kernels as kernels
from sra_kernels.linear_span_kl.chunks import check_contents
from sra_kernels.native import rows
from sra_kernels.span_kl.triton import ASSUMED_PROCESSORS, DIRECTIONS, finish, two_floats
from sra_kernels.tuning import Config, architecture, chosen


def _blocks(spans: int, entries: int, dim: int) -> dict[str, int]:
    return {"BLOCK_SPANS": spans, "BLOCK_ENTRIES": entries, "BLOCK_DIM": dim}


# By kernel and bits of an input number. Larger blocks would spill: those of the statistics where
# rows begin at no multiple of 16 bytes, the others in the direction "jsd".
CONFIGS = {
    "statistics, 16": (
        Config(_blocks(128, 128, 32), num_warps=8, num_stages=4),
        Config(_blocks(128, 64, 64), num_warps=8, num_stages=3),
    ),
    "statistics, 16@sm_80": (Config(_blocks(128, 64, 32), num_warps=8, num_stages=4),),
    "statistics, 16@sm_100": (Config(_blocks(64, 64, 32), num_warps=8, num_stages=4),),
    "statistics, 32": (Config(_blocks(64, 64, 32), num_warps=8),),
    "statistics, 32@sm_80": (Config(_blocks(64, 64, 16), num_warps=8),),
    "statistics, 64": (Config(_blocks(32, 32, 16)),),
    "divergence, 16": (
        Config(_blocks(128, 64, 32), num_warps=8, num_stages=4),
        Config(_blocks(64, 128, 32), num_warps=8, num_stages=4),
    ),
    "divergence, 16@sm_80": (Config(_blocks(128, 32, 32), num_warps=8, num_stages=4),),
    "divergence, 16@sm_100": (Config(_blocks(64, 64, 32), num_warps=8, num_stages=4),),
    "divergence, 32": (Config(_blocks(64, 64, 32), num_warps=8),),
    "divergence, 32@sm_80": (Config(_blocks(64, 32, 16), num_warps=8),),
    "divergence, 64": (Config(_blocks(32, 32, 16)),),
    "divergence, 64@sm_100": (Config(_blocks(32, 32, 16), num_warps=8),),
}

# Entries are cut into slices until there are some programs for each multiprocessor, but no smaller.
TILE = 128  # spans of a program, about
PROGRAMS_PER_PROCESSOR = 4
MOST_SLICES = 128
SLICE = 512  # entries; a slice is a multiple of it

Side: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # states, head, bias, ids


def linear_span_kl_tiles(
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
) -> Tensor:
    """The weighted kl [S]; `outside` is "renormalise", or there are no ids."""
    if check.contents(student.device):
        check_contents(
            student, student_head, student_bias, teacher, teacher_head, teacher_bias, student_ids,
            teacher_ids, span_weights,
        )  # fmt: skip
    spans = len(student)
    shared = len(student_head) if student_ids is None else len(student_ids)
    wide = check.accumulator(student.dtype)
    if spans == 0:
        return student.new_empty(0, dtype=wide)
    slices, length = slices_of(spans, shared, student.device)
    statistics = student.new_empty(spans, slices, kernels.STATISTICS.value, dtype=wide)
    kl = student.new_empty(spans, slices, dtype=wide)
    sides = (
        _side(student, student_head, student_bias, student_ids),
        _side(teacher, teacher_head, teacher_bias, teacher_ids),
    )
    weights = None if span_weights is None else span_weights.contiguous()
    tensors = *sides[0], *sides[1], statistics
    finishes = (
        finish(student_scale, student_softcap, temperature),
        finish(teacher_scale, teacher_softcap, temperature),
    )
    sizes: list[Any] = []
    for (hidden, head, _, _), finished in zip(sides, finishes, strict=True):
        sizes += [hidden.stride(0), head.stride(0), *head.shape, finished]
    sizes += [spans, shared, slices, length]
    options = {
        "STUDENT_CAP": student_softcap is not None,
        "TEACHER_CAP": teacher_softcap is not None,
        "ACC": tl.float64 if wide == torch.float64 else tl.float32,
        # How float32 is multiplied: on NVIDIA's tensor cores three tf32 products make one.
        "PRECISION": "tf32x3" if architecture(student.device).startswith("sm_") else "ieee",
    }

    def grid(config: Config) -> tuple[int]:
        return (triton.cdiv(spans, config.blocks["BLOCK_SPANS"]) * slices,)

    def sums(config: Config) -> None:
        kernels.tile_statistics_kernel[grid(config)](*tensors, *sizes, **options, **config.launch())

    def divergences(config: Config) -> None:
        kernels.tile_divergence_kernel[grid(config)](
            *tensors, weights, kl, *sizes, two_floats(beta or 0.0),
            DIRECTION=DIRECTIONS[direction], **options, **config.launch(),
        )  # fmt: skip

    bits = 8 * max(student.element_size(), teacher.element_size())
    for kernel, launch in (("statistics", sums), ("divergence", divergences)):
        launch(chosen("linear_span_kl", CONFIGS, f"{kernel}, {bits}", student.device, launch))
    return kl.sum(1)


def _side(hidden: Tensor, head: Tensor, bias: Tensor | None, ids: Tensor | None) -> Side:
    """The bias is cut to the shared entries: a gather beside the products costs them registers."""
    if ids is not None:
        ids = ids.contiguous()
        bias = None if bias is None else bias.index_select(0, ids)
    return rows(hidden), rows(head), None if bias is None else bias.contiguous(), ids


def slices_of(spans: int, shared: int, device: torch.device) -> tuple[int, int]:
    """(slices of the entries, entries of a slice)."""
    processors = ASSUMED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = triton.cdiv(spans, TILE)
    wanted = min(MOST_SLICES, triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, tiles))
    length = SLICE * triton.cdiv(triton.cdiv(shared, wanted), SLICE)
    return triton.cdiv(shared, length), length


def plan(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    vocab: tuple[Tensor, Tensor] | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **options: Any,
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs)."""
    shared = len(student_head) if vocab is None else len(vocab[0])
    slices, length = slices_of(max(1, len(student)), shared, student.device)
    numbers = len(student) * (slices * (kernels.STATISTICS.value + 1) + 1)
    biases = 0
    if vocab is not None:
        biases = sum(
            shared * x.element_size() for x in (student_bias, teacher_bias) if x is not None
        )
    return (
        f"tiles of spans by {slices} slices of {length} entries, no logits in memory",
        numbers * check.accumulator(student.dtype).itemsize + biases,
    )
