"""Inputs and options on which span_kl is tested."""

import torch

from sra_kernels.span_kl.reference import span_kl as reference

OBJECTIVES = {
    "forward": {"direction": "forward"},
    "reverse": {"direction": "reverse"},
    "jsd": {"direction": "jsd", "beta": 0.3},
}
OUTSIDE = ("one vocabulary", "renormalise", "weight", "bucket")
EVERY = [(o, d) for o in OUTSIDE for d in OBJECTIVES]
S, VS, VT, K = 6, 41, 53, 23


def case(outside, dtype=torch.float64, spans=S, size=2.0):
    """Student and teacher logits, and the options about the vocabulary."""
    student = (size * torch.randn(spans, VS)).to(dtype).requires_grad_()
    if outside == "one vocabulary":
        return student, (size * torch.randn(spans, VS)).to(dtype), {}
    vocab = torch.randperm(VS)[:K], torch.randperm(VT)[:K]
    return student, (size * torch.randn(spans, VT)).to(dtype), {"vocab": vocab, "outside": outside}


def eager(student, teacher, *, temperature, direction, beta=None, vocab=None, outside=""):
    ids = (None, None) if vocab is None else vocab
    return reference(student, teacher, *ids, temperature, direction, beta, outside)
