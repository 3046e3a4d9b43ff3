"""span_geometry in C++ (csrc/cpu/span_geometry.cpp)."""

from __future__ import annotations

import ctypes

from torch import Tensor

from sra_kernels import check, native
from sra_kernels.native import OK
from sra_kernels.span_geometry import params
from sra_kernels.span_geometry.portable import check_offsets
from sra_kernels.span_kl.portable import saved_dtype

BAND_BYTES = 16 << 20  # kBandBytes of the C++: cosines held at a time


def span_geometry_forward(
    student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    def launch(function: str, given: ctypes.Structure, like: Tensor) -> None:
        if native.cpu_call(function, given) != OK:
            check_offsets(offsets, len(student))
            check.weights_content(weights)

    return params.forward(launch, student, teacher, weights, offsets, need_grad)


def plan(student: Tensor, teacher: Tensor, weights: Tensor, offsets: Tensor) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): the gradient twice, and what one sample needs.

    The samples' lengths are not read, so one sample may hold all spans.
    """
    spans, size = len(student), check.accumulator(student.dtype).itemsize
    band = min(spans, max(1, BAND_BYTES // (2 * max(spans, 1) * size)))
    gradients = student.numel() * (saved_dtype(student.dtype).itemsize + student.element_size())
    vectors = (student.numel() + teacher.numel()) * size
    return (
        f"sample by sample, bands of at most {band} spans",
        gradients + vectors + 2 * band * spans * size,
    )
