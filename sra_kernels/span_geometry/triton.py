"""span_geometry on a GPU: small samples whole, one program each; larger ones in tiles.

The lengths of samples are on the device. Every sample gets a program: a small one is done there,
loss and gradient, and of a larger one it leaves the sums over weights. Only a batch of more spans
than a small sample may have can hold a larger one; then tiles of rows follow, as many as there can
be, of which those without rows return. Weighed errors of cosines lie in memory for a chunk of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sra_kernels import check
from sra_kernels.native import rows
from sra_kernels.span_geometry.portable import check_offsets
from sra_kernels.span_geometry.triton_kernels import (
    WIDTH,
    gradient_kernel,
    lengths_kernel,
    loss_kernel,
    pull_kernel,
    samples_kernel,
)
from sra_kernels.span_kl.portable import saved_dtype
from sra_kernels.tuning import Config, architecture, chosen

LIMIT = 64  # spans of the largest sample that one program does
ROWS = 64  # of a tile of weighed errors
SPLITS = 4  # programs that share the columns of a tile of rows
PULL_BYTES = 64 << 20  # the weighed errors in memory at once, unless the student itself is larger
NARROW = 64  # dims up to which rows are measured many at a time

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}

# By what the widest numbers are, except for lengths_kernel. Wide tiles spill on one GPU or another.
CONFIGS: dict[str, tuple[Config, ...]] = {
    "narrow": (Config({"BS": 64, "BD": 64}),),
    "wide": (Config({"BS": 4, "BD": 512}), Config({"BS": 8, "BD": 256})),
    "samples 16": (Config({"BD": 32}, num_warps=8), Config({"BD": 64})),
    "samples 32": (Config({"BD": 16}, num_warps=8), Config({"BD": 32}, num_warps=8)),
    "samples 64": (Config({"BD": 16}, num_warps=8),),
    "pull 16": (Config({"BN": 64, "BD": 32}, num_warps=8), Config({"BN": 64, "BD": 64})),
    "pull 32": (Config({"BN": 64, "BD": 32}, num_warps=8), Config({"BN": 64, "BD": 16})),
    "pull 32@sm_80": (Config({"BN": 128, "BD": 16}, num_warps=8),),
    "pull 64": (Config({"BN": 64, "BD": 16}, num_warps=8),),
    "gradient 16": (Config({"BN": 64, "BD": 64}, num_warps=8), Config({"BN": 64, "BD": 64})),
    "gradient 16@sm_80": (Config({"BN": 32, "BD": 64}, num_warps=8),),
    "gradient 32": (Config({"BN": 64, "BD": 64}, num_warps=8), Config({"BN": 64, "BD": 64})),
    "gradient 32@sm_80": (Config({"BN": 32, "BD": 64}, num_warps=8),),
    "gradient 64": (Config({"BN": 16, "BD": 64}, num_warps=8),),
}
# The interpreter's time goes by statements, whatever the size of what they handle.
for _bits in (16, 32, 64):
    CONFIGS[f"samples {_bits}@interpreter"] = (Config({"BD": 512}),)
    CONFIGS[f"pull {_bits}@interpreter"] = (Config({"BN": 128, "BD": 512}),)
    CONFIGS[f"gradient {_bits}@interpreter"] = (Config({"BN": 128, "BD": 512}),)


def span_geometry_forward(
    student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Returns (loss [B], its gradient [S, Ds] or [0])."""
    if check.contents(student.device):
        check_offsets(offsets, len(student))
        check.weights_content(weights)
    loss = weights.new_empty(len(offsets) - 1)
    grad = student.new_empty(student.shape if need_grad else 0, dtype=saved_dtype(student.dtype))
    if len(student) == 0 or len(loss) == 0:
        return loss.zero_(), grad.zero_()
    student, teacher = rows(student), rows(teacher)
    weights, offsets = weights.contiguous(), offsets.contiguous()
    lengths = measure(student, teacher, weights)
    stats = whole_samples(student, teacher, weights, offsets, lengths, loss, grad)
    if len(student) > LIMIT:
        tiles(student, teacher, weights, offsets, lengths, stats, loss, grad)
    return loss, grad


def plan(student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): the gradient twice, and the tiles' memory.

    The samples' lengths are not read, so one sample may hold all spans.
    """
    spans, size = len(student), check.accumulator(student.dtype).itemsize
    gradients = student.numel() * (saved_dtype(student.dtype).itemsize + student.element_size())
    sums = 4 * spans * size
    if spans <= LIMIT:
        return f"samples whole, up to {LIMIT} spans", gradients + sums
    slots, held, pieces = tiling(student, len(offsets) - 1, size)
    sums += SPLITS * (slots + held * ROWS) * size
    return (
        f"samples whole up to {LIMIT} spans; beyond, {held * ROWS} rows of tiles at a time",
        gradients + sums + held * ROWS * pieces * WIDTH * size,
    )


def tiling(student: Tensor, samples: int, size: int) -> tuple[int, int, int]:
    """Slots for tiles of rows, slots in memory at once, tiles of columns: of any samples' lengths.

    A sample of n spans needs at most n // ROWS + 1 tiles; tile_of says which slots are its own.
    """
    spans = len(student)
    slots, pieces = spans // ROWS + samples, triton.cdiv(spans, WIDTH)
    held = max(PULL_BYTES, student.nbytes) // (ROWS * pieces * WIDTH * size)
    return slots, min(slots, max(1, held)), pieces


def measure(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """[4, S]: each row's power of two and the inverse length of what it gives, on both sides."""
    spans, dims = len(student), (student.shape[1], teacher.shape[1])
    lengths = weights.new_empty(4, spans)

    def launch(config: Config) -> None:
        lengths_kernel[(triton.cdiv(spans, config.blocks["BS"]), 2)](
            student, teacher, weights, lengths, spans, *dims, student.stride(0), teacher.stride(0),
            ACC=ACCUMULATORS[weights.dtype], **config.launch(),
        )  # fmt: skip

    bucket = "narrow" if max(dims) <= NARROW else "wide"
    launch(chosen("span_geometry_lengths", CONFIGS, bucket, student.device, launch))
    return lengths


def whole_samples(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    loss: Tensor,
    grad: Tensor,
) -> Tensor:
    """Loss and gradient of small samples; of the others [2, B], the largest weight and the share.

    The share is 1 over the sum of all pairs' weights.
    """
    stats = weights.new_empty(2, len(loss))

    def launch(config: Config) -> None:
        samples_kernel[(len(loss),)](
            student, teacher, weights, offsets, lengths, stats, loss, grad, len(student), len(loss),
            student.shape[1], teacher.shape[1], student.stride(0), teacher.stride(0),
            NEED_GRAD=grad.dim() == 2, ACC=ACCUMULATORS[weights.dtype],
            TINY=torch.finfo(weights.dtype).tiny,
            **precisions(student, teacher, weights.dtype, alike=True),
            PULL=accurate(weights.dtype, student.device), LIMIT=LIMIT,
            enable_fp_fusion=False, **config.launch(),
        )  # fmt: skip

    bucket = f"samples {bits(student, teacher)}"
    launch(chosen("span_geometry_samples", CONFIGS, bucket, student.device, launch))
    return stats


def tiles(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    stats: Tensor,
    loss: Tensor,
    grad: Tensor,
) -> None:
    """Loss and gradient of the samples that are too large for one program."""
    spans, samples, need_grad, wide = len(student), len(loss), grad.dim() == 2, weights.dtype
    slots, held, pieces = tiling(student, samples, wide.itemsize)
    squares = weights.new_empty(SPLITS, slots)
    radial = weights.new_empty((SPLITS, held * ROWS) if need_grad else 0)
    pull = weights.new_empty((held * ROWS, pieces * WIDTH) if need_grad else 0)
    kinds = {"ACC": ACCUMULATORS[wide], "LIMIT": LIMIT, "ROWS": ROWS}

    for first in range(0, slots, held):
        here = min(held, slots - first)

        def form(config: Config, first: int = first, here: int = here) -> None:
            pull_kernel[(here, SPLITS)](
                student, teacher, weights, offsets, lengths, stats, squares, radial, pull, spans,
                samples, slots, first, pieces, student.shape[1], teacher.shape[1],
                student.stride(0), teacher.stride(0), NEED_GRAD=need_grad,
                **precisions(student, teacher, wide), **kinds, enable_fp_fusion=False,
                **config.launch(),
            )  # fmt: skip

        def apply(config: Config, first: int = first, here: int = here) -> None:
            gradient_kernel[(here, triton.cdiv(student.shape[1], config.blocks["BD"]))](
                student, weights, offsets, lengths, stats, radial, pull, grad, spans, samples,
                first, pieces, student.shape[1], student.stride(0),
                PULL=accurate(wide, student.device), SPLITS=SPLITS, **kinds, **config.launch(),
            )  # fmt: skip

        bucket = f"pull {bits(student, teacher)}"
        form(chosen("span_geometry_pull", CONFIGS, bucket, student.device, form))
        if need_grad:
            bucket = f"gradient {bits(student, teacher)}"
            apply(chosen("span_geometry_gradient", CONFIGS, bucket, student.device, apply))
    loss_kernel[(samples,)](
        offsets, stats, squares, loss, spans, samples, slots, SPLITS=SPLITS, **kinds
    )


def bits(student: Tensor, teacher: Tensor) -> int:
    """16, 32 or 64: of the wider side as it is multiplied. It decides what fits into registers."""
    wide = check.accumulator(student.dtype).itemsize
    return 8 * (wide if wide == 8 else max(student.element_size(), min(teacher.element_size(), 4)))


def accurate(wide: torch.dtype, device: torch.device) -> str:
    """The products of float32 that keep its digits: on tensor cores where they can."""
    tensor_cores = wide == torch.float32 and architecture(device).startswith("sm_")
    return "tf32x3" if tensor_cores else "ieee"


def precisions(
    student: Tensor, teacher: Tensor, wide: torch.dtype, alike: bool = False
) -> dict[str, str]:
    """For the cosines of each side: a number of 16 bits is exact in tf32. `alike`: one for both."""
    full = accurate(wide, student.device)

    def of(x: Tensor) -> str:
        return "tf32" if full == "tf32x3" and x.element_size() == 2 else full

    sides = of(student), of(teacher)
    if alike and sides[0] != sides[1]:
        sides = full, full
    return {"STUDENT": sides[0], "TEACHER": sides[1]}
