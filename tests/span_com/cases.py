"""Inputs and options on which span_com is tested."""

import torch

from sra_kernels.testing import ragged_spans, real_lengths


def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


CASES = {
    "ones": ragged_spans([1] * 9),
    "mixed, touching": ragged_spans([1, 3, 2, 16, 1, 4, 5]),
    "gaps and an offset": ragged_spans([2, 1, 7], gap=3, offset=2),
    "overlapping": ragged_spans([5, 5, 5, 9], gap=-3),
    "the same span twice": torch.tensor([[2, 6], [2, 6], [2, 7]]),
    "empty among others": ragged_spans([0, 2, 0, 0, 3, 0]),
    "all empty": ragged_spans([0, 0]),
    "none": ragged_spans([]),
    "one long": ragged_spans([1, 700, 2]),
    "just over a GPU's piece": ragged_spans([65] * 12, gap=1),
    "as in real text": ragged_spans(real_lengths(200, seeded(0))),
}


def inputs(spans, dim=37, extra=3, dtype=torch.float64, weighted=True):
    rows = (int(spans.max()) if len(spans) else 4) + extra
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    weights = torch.rand(rows, dtype=wide, requires_grad=True) if weighted else None
    return hidden, weights


def grads(outputs, inputs, upstream):
    given = [x for x in inputs if x is not None]
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in pairs], given, [g for _, g in pairs], allow_unused=True
    )
