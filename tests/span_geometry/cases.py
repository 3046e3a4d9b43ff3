"""Inputs and options on which span_geometry is tested."""

import pytest
import torch

from sra_kernels import native

needs_cpp = pytest.mark.skipif(native.cpu is None, reason="the C++ library is not built")

COUNTS = {
    "one sample": [7],
    "several": [5, 2, 9, 3],
    "empty and single among others": [0, 3, 1, 0, 4, 0],
    "only singles": [1, 1, 1],
    "longer than a chunk": [300, 2, 200],
    "no spans": [0, 0],
    "no samples": [],
}


def case(counts, dtype=torch.float64, ours=13, theirs=21):
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    spans = int(offsets[-1])
    student = torch.randn(spans, ours).to(dtype).requires_grad_()
    teacher = torch.randn(spans, theirs).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return student, teacher, torch.rand(spans, dtype=wide), offsets
