"""span_kl in Triton: a program for each pair of rows, or, where rows are few, for a slice of one.

With enough rows one launch does everything: statistics, value and gradient. Otherwise each sweep is
a launch, and the slices' sums meet in between, in a fixed order.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sra_kernels import check
from sra_kernels.span_kl import calls, row_kernel
from sra_kernels.span_kl.divergence_terms import FORWARD, JSD, REVERSE
from sra_kernels.span_kl.portable import STATS
from sra_kernels.span_kl.row_kernel import span_kl_kernel
from sra_kernels.span_kl.row_sweeps import BUCKET, RENORMALISE, WEIGHT
from sra_kernels.span_kl.tables import PADDING, tables
from sra_kernels.tuning import Config, chosen

# The longer the rows, the more warps on each: those at work on the GPU at once should come close to
# fitting its L2 cache until they are read again.
CONFIGS = {
    "short": (Config({"LANES": 128}),),
    "middle": (Config({"LANES": 256}, num_warps=8),),
    "long": (
        Config({"LANES": 512}, num_warps=16),
        Config({"LANES": 1024}, num_warps=32),
        Config({"LANES": 256}, num_warps=8),
    ),
    "long@gfx942": (Config({"LANES": 512}, num_warps=8),),
    "middle@gfx942": (Config({"LANES": 512}, num_warps=8),),
    # With a cap, on one GPU or another, the threads of 16 warps run out of registers.
    "long, capped": (Config({"LANES": 256}, num_warps=8),),
    "long, capped@sm_100": (Config({"LANES": 512}, num_warps=16),),
    "long, capped@gfx942": (Config({"LANES": 512}, num_warps=8),),
}
SHORT, MIDDLE = 4096, 16384  # entries

DIRECTIONS = {"forward": FORWARD.value, "reverse": REVERSE.value, "jsd": JSD.value}
OUTSIDE = {"renormalise": RENORMALISE.value, "weight": WEIGHT.value, "bucket": BUCKET.value}

# Rows are cut into slices where they are fewer than the GPU works on at once, but no smaller.
ROWS_PER_PROCESSOR = 2
ASSUMED_PROCESSORS = 132
SLICE = 16384  # entries


def span_kl_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return calls.forward(compare, *args)


def span_kl_backward(*args: Any) -> Tensor:
    return calls.backward(compare, *args)


def compare(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
    *,
    factors: Tensor | None = None,
    kl: Tensor | None = None,
    mass: Tensor | None = None,
    stats: Tensor | None = None,
    known: Tensor | None = None,
    grad: Tensor | None = None,
    student_scale: float | None = None,
    student_softcap: float | None = None,
    teacher_scale: float | None = None,
    teacher_softcap: float | None = None,
) -> None:
    """Fills `kl`, `mass`, `stats` and `grad`, those that are given. `grad` may be `student`.

    Ids that are None mean that the columns of that side are the shared entries already. `known` are
    `stats` of an earlier call on the same logits: with them, only `grad` may be asked for.
    """
    count, entries = student.shape
    if count == 0:
        return
    partner, shared = tables(student_ids, teacher_ids, entries, teacher.shape[1])
    mode = OUTSIDE["renormalise" if shared is None else outside]
    wide = check.accumulator(student.dtype)
    slices = slices_of(count, max(entries, teacher.shape[1]), student.device)
    width = 16 // student.element_size()
    walked = student, grad, teacher if partner is None else None
    partials = None
    if slices > 1 and known is None:
        partials = student.new_empty(count, slices, row_kernel.PARTIALS.value, dtype=wide)
    tensors = (
        student, teacher, grad, partner, shared,
        None if factors is None else factors.contiguous(), kl, mass, stats, known, partials,
        student.stride(0), teacher.stride(0), 0 if grad is None else grad.stride(0),
        entries, teacher.shape[1], slices,
        finish(student_scale, student_softcap, temperature),
        finish(teacher_scale, teacher_softcap, temperature),
        two_floats(beta or 0.0),
    )  # fmt: skip
    options = {
        "DIRECTION": DIRECTIONS[direction],
        "OUTSIDE": mode,
        "REST": shared is not None and (mode != OUTSIDE["renormalise"] or mass is not None),
        "STUDENT_CAP": student_softcap is not None,
        "TEACHER_CAP": teacher_softcap is not None,
        "ACC": tl.float64 if wide == torch.float64 else tl.float32,
        "WIDTH": width,  # neighbours: one load of 16 bytes
        "PADDED": entries % PADDING != 0 and all(roomy(x, width) for x in walked if x is not None),
    }

    def launch(config: Config) -> None:
        whole, *sweeps = (stage.value for stage in row_kernel.STAGES)
        if partials is None:
            span_kl_kernel[(count, slices)](*tensors, STAGE=whole, **options, **config.launch())
            return
        for stage in sweeps:
            last_of_forward = stage == sweeps[-1] and (grad is None or direction == "forward")
            grid = (count, 1 if last_of_forward else slices)
            span_kl_kernel[grid](*tensors, STAGE=stage, **options, **config.launch())

    size = "short" if entries <= SHORT else "middle" if entries <= MIDDLE else "long"
    if size == "long" and (student_softcap is not None or teacher_softcap is not None):
        size = "long, capped"
    # In place, a second run would take the gradient for logits.
    once = grad is not None and grad.data_ptr() == student.data_ptr()
    launch(chosen("span_kl", CONFIGS, size, student.device, None if once else launch))


def roomy(x: Tensor, width: int) -> bool:
    """Whether each row has memory of its own up to a multiple of `width`, as those of the chunks of
    linear_span_kl have: without it, loads by a mask that ends anywhere are of one number."""
    columns = -(-x.shape[1] // width) * width
    end = x.storage_offset() + (len(x) - 1) * x.stride(0) + columns
    return x.stride(0) >= columns and end * x.element_size() <= x.untyped_storage().nbytes()


def slices_of(count: int, entries: int, device: torch.device) -> int:
    """As many as the GPU can work on at once, while each is long enough for its launches."""
    processors = ASSUMED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = min(row_kernel.MOST_SLICES.value, entries // SLICE)
    return max(1, min(most, ROWS_PER_PROCESSOR * processors // count))


def finish(
    scale: float | None, softcap: float | None, temperature: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(a, b) of a finished logit, a z or a tanh(b z)."""
    scale = 1.0 if scale is None else scale
    if softcap is None:
        return two_floats(scale / temperature), two_floats(0.0)
    return two_floats(softcap / temperature), two_floats(scale / softcap)


def two_floats(x: float) -> tuple[float, float]:
    """x as a sum of two float32, because Triton passes no float64."""
    high = ctypes.c_float(x).value
    return high, x - high


def plan(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    vocab: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs), the backward included if there is one."""
    size = check.accumulator(student_logits.dtype).itemsize
    (spans, entries), theirs = student_logits.shape, teacher_logits.shape[1]
    slices = slices_of(max(1, spans), max(entries, theirs), student_logits.device)
    grad = student_logits.numel() * student_logits.element_size() * student_logits.requires_grad
    partials = spans * slices * row_kernel.PARTIALS.value * size * (slices > 1)
    ids = 0 if vocab is None else 4 * entries + theirs + 4 * len(vocab[0])
    return (
        "one pair of rows in a program"
        if slices == 1
        else f"a pair of rows in {slices} programs, three launches",
        grad + (2 + STATS) * spans * size + partials + ids,
    )
