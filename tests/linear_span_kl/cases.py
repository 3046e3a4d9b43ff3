"""Inputs and options on which linear_span_kl is tested."""

import torch

from sra_kernels import linear_span_kl
from sra_kernels.linear_span_kl import chunks
from sra_kernels.linear_span_kl.reference import linear_span_kl as reference

OBJECTIVES = {
    "forward": {"direction": "forward"},
    "reverse": {"direction": "reverse"},
    "jsd": {"direction": "jsd", "beta": 0.3},
}
OUTSIDE = ("one vocabulary", "renormalise", "weight", "bucket")
EVERY = [(o, r) for o in OUTSIDE for r in ("sum", "none")]
TRANSFORMS = {
    "plain": {},
    "Cohere": {"student_scale": 0.25, "teacher_scale": 0.5},
    "Gemma": {"student_softcap": 3.0, "teacher_softcap": 5.0},
    "both": {"student_scale": 1.5, "student_softcap": 2.0, "teacher_scale": 0.7},
}
S, VS, VT, K, DS, DT = 6, 41, 53, 23, 9, 14


def case(outside, dtype=torch.float64, spans=S, bias=False, weights=False):
    """((student, head, bias or None), (teacher, head), options)"""
    entries = VS if outside == "one vocabulary" else VT
    ours = [torch.randn(spans, DS), torch.randn(VS, DS), torch.randn(VS) if bias else None]
    theirs = [torch.randn(spans, DT), torch.randn(entries, DT) / 2]
    options = {"temperature": 1.7, "direction": "forward"}
    if outside != "one vocabulary":
        options["vocab"] = torch.randperm(VS)[:K], torch.randperm(VT)[:K]
        options["outside"] = outside
    if weights:
        options["span_weights"] = torch.rand(spans) * (torch.arange(spans) != 1)
    if bias:
        options["teacher_bias"] = torch.randn(entries).to(dtype)
    ours = [None if x is None else x.to(dtype).requires_grad_() for x in ours]
    return ours, [x.to(dtype) for x in theirs], options


def run(ours, theirs, options, **more):
    student, head, bias = ours
    return linear_span_kl(student, head, *theirs, student_bias=bias, **options, **more)


def eager(ours, theirs, options, reduction, dtype):
    """The reference by itself, in any dtype."""
    o = {"beta": None, "outside": "renormalise", "vocab": (None, None)} | options
    student, head, bias = ours
    bias_t, weights = o.get("teacher_bias"), o.get("span_weights")
    kl, mass = reference(
        student, head, bias, *theirs, None if bias_t is None else bias_t.to(dtype), *o["vocab"],
        weights, o.get("student_scale"), o.get("student_softcap"), o.get("teacher_scale"),
        o.get("teacher_softcap"), o["temperature"], o["direction"], o["beta"], o["outside"],
    )  # fmt: skip
    return (kl.sum() if reduction == "sum" else kl), mass


def cast(ours, theirs, dtype):
    fresh = [None if x is None else x.detach().to(dtype).requires_grad_() for x in ours]
    return fresh, [x.to(dtype) for x in theirs]


def grads(loss, ours, upstream=None):
    given = [x for x in ours if x is not None]
    return torch.autograd.grad(loss, given, upstream, retain_graph=True)


def cut(monkeypatch, **sizes):
    """Other pieces and chunks, on every device."""
    for device, usual in chunks.SIZES.items():
        monkeypatch.setitem(chunks.SIZES, device, usual._replace(**sizes))
