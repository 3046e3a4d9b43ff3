"""span_geometry in CUDA (csrc/cuda/span_geometry.cu): fills the params struct and calls."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.native import DTYPES, address, rows
from sra_kernels.span_geometry.cpu import Params
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
    student, teacher = rows(student), rows(teacher)
    weights, offsets = weights.contiguous(), offsets.contiguous()
    loss = weights.new_empty(samples)
    grad = student.new_empty(student.shape if need_grad else 0, dtype=saved_dtype(student.dtype))
    params = Params(
        student=address(student),
        teacher=address(teacher),
        weights=address(weights),
        offsets=address(offsets),
        loss=address(loss),
        grad=address(grad) if need_grad else None,
        spans=spans,
        samples=samples,
        student_dim=student.shape[1],
        teacher_dim=teacher.shape[1],
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        student_dtype=DTYPES[student.dtype],
        teacher_dtype=DTYPES[teacher.dtype],
    )
    native.cuda_call("span_geometry_forward", params, student)
    return loss, grad


def plan(student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): the gradient twice, and bands of cosines."""
    spans, wide = len(student), check.accumulator(student.dtype)
    held = SPANS[wide]
    gradients = student.numel() * (saved_dtype(student.dtype).itemsize + student.element_size())
    bands = 0 if spans <= held else spans * (4 * 8 + (held + 1) * wide.itemsize)
    return f"a block a sample, up to {held} spans in one piece", gradients + bands
