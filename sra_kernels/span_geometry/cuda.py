"""span_geometry in CUDA (csrc/cuda/span_geometry.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.span_geometry import params
from sra_kernels.span_geometry.portable import check_offsets
from sra_kernels.span_kl.portable import saved_dtype

# As in csrc/cuda/geometry_blocks.h: what one block holds on chip, half of that for a band of more.
SPANS = {torch.float32: 128, torch.float64: 64}
# One block works through a sample, whatever its length. How long each is the device alone knows,
# but the longest has at least the mean.
MEAN_SPANS = 2048


def span_geometry_forward(
    student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Returns (loss [B], its gradient [S, Ds] or [0])."""
    spans, samples = len(student), len(offsets) - 1
    if spans > MEAN_SPANS * samples:
        raise RuntimeError(
            f"span_geometry has {spans} spans in {samples} samples, and its CUDA kernel is for "
            f'samples of up to {MEAN_SPANS} spans. use_backend("triton") takes any.'
        )
    if check.contents(student.device):
        check_offsets(offsets, spans)
        check.weights_content(weights)
    return params.forward(native.cuda_call, student, teacher, weights, offsets, need_grad)


def plan(student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): the gradient twice, and bands of cosines."""
    spans, wide = len(student), check.accumulator(student.dtype)
    held = SPANS[wide]
    gradients = student.numel() * (saved_dtype(student.dtype).itemsize + student.element_size())
    bands = 0 if spans <= held else spans * (4 * 8 + (held + 1) * wide.itemsize)
    return f"a block a sample, up to {held} spans in one piece", gradients + bands
