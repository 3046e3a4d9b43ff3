"""`span_geometry` in torch operations: chunks of spans against the spans of their samples.

On a CPU a chunk's columns are those of its samples. Elsewhere their bounds are not known without
making the host wait, so the columns are all spans, and a mask keeps the pairs of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.span_kl.portable import saved_dtype

CHUNK_BYTES = 32 << 20  # the chunk's buffers [rows, spans], of which about six are alive
CPU_ROWS = 128  # few, so that a chunk reaches into few samples


def span_geometry_forward(
    student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Returns (loss [B], its gradient [S, Ds] or [0])."""
    spans = len(student)
    check_offsets(offsets, spans)
    check.weights_content(weights)
    wide = check.accumulator(student.dtype)
    index = torch.arange(spans, device=student.device)
    sample = torch.searchsorted(offsets[1:], index, right=True)
    # Pair weights are ratios: with each sample's largest at 1, their products cannot underflow.
    largest = weights.new_zeros(len(offsets) - 1).scatter_reduce_(0, sample, weights, "amax")
    weights = torch.where(weights == 0, 0, weights / largest[sample])
    ours, inverse = unit(student, weights, wide)
    theirs, _ = unit(teacher, weights, wide)

    squares, pairs = weights.new_empty(spans), weights.new_empty(spans)
    grad = ours.new_empty(ours.shape if need_grad else 0)
    step = chunk_rows(spans, student.device, wide.itemsize)
    for start in range(0, spans, step):
        rows = slice(start, min(start + step, spans))
        columns = slice(0, spans)
        if offsets.device.type == "cpu":
            first, last = sample[rows.start], sample[rows.stop - 1]
            columns = slice(int(offsets[first]), int(offsets[last + 1]))
        apart = (sample[rows, None] != sample[columns]) | (index[rows, None] == index[columns])
        cosine = ours[rows] @ ours[columns].T
        error = torch.addmm(cosine, theirs[rows], theirs[columns].T, alpha=-1)
        pull = error.masked_fill_(apart, 0) * weights[columns]
        squares[rows] = (pull * error).sum(1) * weights[rows]
        pairs[rows] = weights[columns].expand_as(apart).masked_fill(apart, 0).sum(1) * weights[rows]
        if need_grad:
            # Along the sphere: Σ_j pull_ij (u_j − cos_ij u_i), over the length of the vector.
            radial = (pull * cosine).sum(1, keepdim=True) * ours[rows]
            grad[rows] = (pull @ ours[columns] - radial) * (4 * weights[rows] * inverse[rows])[
                :, None
            ]
    total = sample_sums(pairs, offsets)
    share = torch.where(total < torch.finfo(wide).tiny, 0, 1 / total)
    loss = sample_sums(squares, offsets) * share
    if need_grad:
        grad.mul_(share[sample, None])
    return loss, grad.to(saved_dtype(student.dtype))


def plan(student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): unit vectors, the gradient, one chunk."""
    spans, size = len(student), check.accumulator(student.dtype).itemsize
    rows = min(spans, chunk_rows(spans, student.device, size))
    vectors = (2 * student.numel() + teacher.numel()) * size
    return f"chunks of {rows} spans", vectors + 6 * rows * spans * size


def chunk_rows(spans: int, device: torch.device, size: int) -> int:
    rows = max(1, CHUNK_BYTES // (6 * max(spans, 1) * size))
    return min(rows, CPU_ROWS) if device.type == "cpu" else rows


def unit(x: Tensor, weights: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit vectors and 1/length; zeros and 0 for a zero vector, and for one without weight."""
    x = x.to(wide).masked_fill(weights[:, None] == 0, 0)
    if x.shape[1] == 0:
        return x, x.sum(1)
    largest = x.abs().amax(1, keepdim=True)  # squares of tiny or huge numbers leave the range
    x = x / largest.masked_fill(largest == 0, 1)
    length = x.square().sum(1, keepdim=True).sqrt_()
    inverse = torch.where(length == 0, 0, 1 / (length * largest))
    return x.div_(length.masked_fill_(length == 0, 1)), inverse[:, 0]


def sample_sums(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", offsets=offsets, initial=0, unsafe=True)


def check_offsets(offsets: Tensor, spans: int) -> None:
    """0 first, `spans` last, never decreasing."""
    good = (offsets[0] == 0) & (offsets[-1] == spans) & (offsets[1:] >= offsets[:-1]).all()
    rule = f"offsets must begin with 0, never decrease and end with {spans}, the number of spans"
    if offsets.device.type != "cpu":
        torch._assert_async(good, rule)
    elif not good:
        raise ValueError(
            f"{rule}, but are {offsets.tolist()[:8]}{'...' if len(offsets) > 8 else ''}. Sample b "
            "owns spans offsets[b]:offsets[b + 1]."
        )
