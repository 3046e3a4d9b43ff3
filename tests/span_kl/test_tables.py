"""The tables of a vocabulary: made once for ids of any dtype, and never in a graph's memory."""

from __future__ import annotations

import pytest
import torch

from sra_kernels import library, linear_span_kl, span_kl, use_backend
from sra_kernels.span_kl import tables
from tests.span_kl.cases import case

DTYPES = [torch.int32, torch.int64]


@pytest.fixture
def made(monkeypatch):
    """How often tables were made."""
    calls = []
    make = tables._made
    monkeypatch.setattr(tables, "_known", type(tables._known)())
    monkeypatch.setattr(tables, "_made", lambda *args: calls.append(args) or make(*args))
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_made_once_for_the_callers_ids(backend, made, dtype):
    if backend in ("cpu", "torch"):
        pytest.skip("the kernels of a GPU go by tables")
    student, teacher, options = case("weight", torch.float32)
    ids = tuple(x.to(dtype) for x in options["vocab"])
    options = {"temperature": 1.0, "direction": "forward", "outside": "weight", "vocab": ids}
    for _ in range(3):
        span_kl(student, teacher, **options).sum().backward()
    assert len(made) == 1
    ids[0].copy_(ids[0].flip(0))  # other contents in the same memory
    span_kl(student, teacher, **options)
    assert len(made) == 2


@pytest.mark.parametrize("op", ["span_kl", "linear_span_kl"])
@pytest.mark.parametrize("outside", ["renormalise", "weight", "bucket"])
def test_int32_ids_give_the_same_bits(backend, op, outside):
    student, teacher, options = case(outside, torch.float32)
    long = {"temperature": 1.0, "direction": "forward", "vocab": options["vocab"]}
    short = long | {"vocab": tuple(x.int() for x in options["vocab"])}
    runs = []
    for wanted in (long, short):
        if op == "span_kl":
            leaf = student.detach().requires_grad_()
            loss = span_kl(leaf, teacher, outside=outside, **wanted).sum()
        else:
            generator = torch.Generator().manual_seed(0)
            leaf, theirs = (
                torch.randn(x.shape[1], 3, generator=generator) for x in (student, teacher)
            )
            leaf.requires_grad_()
            loss = linear_span_kl(
                student[:, :3].detach(), leaf, teacher[:, :3], theirs, outside=outside,
                reduction="sum", **wanted,
            )  # fmt: skip
        runs.append((loss, *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu_only
def test_int32_ids_in_the_reference(backend):
    student, teacher, options = case("bucket")
    options |= {"temperature": 1.0, "direction": "forward"}
    with use_backend("reference"):
        want = span_kl(student, teacher, **options)
        vocab = tuple(x.int() for x in options["vocab"])
        got = span_kl(student, teacher, **options | {"vocab": vocab})
        torch.autograd.grad(got.sum(), student)
    assert torch.equal(got, want)


def test_what_remembers_tables_stays_out_of_graphs():
    for function in library.REMEMBER:
        operator = getattr(torch.ops.sra_kernels, function).default
        assert torch.Tag.cudagraph_unsafe in operator.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.sra_kernels.span_com_forward.default.tags
