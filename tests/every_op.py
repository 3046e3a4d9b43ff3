"""Every operation on small ragged inputs, forward and backward, in any dtype.

As a program, `python -m tests.every_op BACKEND [OP ...]`, it checks each against float64 in a
process of its own, with the libraries that SRA_KERNELS_CPU_LIBRARY and SRA_KERNELS_CUDA_LIBRARY
name, and prints "<op>: right" for what is. On a GPU, where the backend is for one.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sra_kernels
from sra_kernels import backend, use_backend
from sra_kernels.testing import DTYPES, assert_as_good_as_torch, poisoned_empty, ragged_spans


@dataclass
class Case:
    """The tensors that hold numbers, which of them learn, and the other arguments."""

    tensors: dict[str, Tensor]
    learn: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def outputs(op: str, case: Case, exact: bool = False) -> list[Tensor]:
    """What `op` returns and the gradients of a fixed upstream; in float64 if `exact`."""
    tensors = {
        name: (x.double() if exact else x).detach().requires_grad_(name in case.learn)
        for name, x in case.tensors.items()
    }
    out = getattr(sra_kernels, op)(**tensors, **case.options)
    out = [out] if isinstance(out, Tensor) else [*out]
    if not case.learn:
        return out
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    pairs = [
        # bfloat16 numbers: the same upstream in every dtype.
        (x, torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype))
        for x in out
        if x.requires_grad
    ]
    heads, upstream = zip(*pairs, strict=True)
    grads = torch.autograd.grad(heads, [tensors[name] for name in case.learn], upstream)
    return [*(x.detach() for x in out), *grads]


def span_com(dtype: torch.dtype) -> dict[str, Case]:
    def case(spans: Tensor, dim: int, weighted: bool = True) -> Case:
        rows = int(spans.max()) + 3
        tensors = {"hidden": torch.randn(rows, dim).to(dtype)}
        if weighted:
            tensors["weights"] = torch.rand(rows).to(_wide(dtype))
        return Case(tensors, tuple(tensors), {"spans": spans})

    return {
        "ragged": case(ragged_spans([1, 3, 0, 2, 16, 1, 5], gap=1), 37),
        "overlapping": case(ragged_spans([5, 5, 5, 9], gap=-3), 513, weighted=False),
        "one long span": case(ragged_spans([2, 3000, 1]), 72),
        "wide rows": case(ragged_spans([1, 2, 3]), 60_001),
        "one long span, odd": case(ragged_spans([2, 200, 1]), 37),
    }


def span_kl(dtype: torch.dtype) -> dict[str, Case]:
    def case(spans: int, entries: tuple[int, int], shared: int, size: float, **options) -> Case:
        student, teacher = (size * torch.randn(spans, n) for n in entries)
        if options["direction"] == "forward":
            teacher[torch.rand(teacher.shape) < 0.01] = -torch.inf
        if shared:
            options["vocab"] = tuple(torch.randperm(n)[:shared] for n in entries)
        return Case(
            {"student_logits": student.to(dtype), "teacher_logits": teacher.to(dtype)},
            ("student_logits",),
            {"temperature": 2.0, "return_shared_mass": True, **options},
        )

    jsd = {"direction": "jsd", "beta": 0.3}
    return {
        "one vocabulary": case(5, (517, 517), 0, 3, direction="forward"),
        "confident": case(5, (517, 601), 203, 30, direction="forward"),
        "weight": case(4, (517, 601), 203, 3, direction="reverse", outside="weight"),
        "bucket": case(4, (517, 601), 203, 3, outside="bucket", **jsd),
        "few wide rows": case(
            2, (150_001, 160_003), 100_003, 3, direction="forward", outside="bucket"
        ),
    }


def linear_span_kl(dtype: torch.dtype) -> dict[str, Case]:
    def case(spans: int, entries: tuple[int, int], dims: tuple[int, int], **options) -> Case:
        tensors = {}
        for side, n, d in zip(("student", "teacher"), entries, dims, strict=True):
            tensors[side] = torch.randn(spans, d)
            tensors[f"{side}_head"] = torch.randn(n, d) / d**0.5
            tensors[f"{side}_bias"] = torch.randn(n)
        shared = min(entries) // 2
        options["vocab"] = tuple(torch.randperm(n)[:shared] for n in entries)
        return Case(
            {name: x.to(dtype) for name, x in tensors.items()},
            ("student", "student_head", "student_bias"),
            {"temperature": 2.0, "return_shared_mass": True, **options},
        )

    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 1.0, 3.0])
    return {
        "sum": case(7, (203, 301), (24, 40), direction="forward", reduction="sum"),
        "each": case(
            7, (203, 301), (24, 40), direction="reverse", reduction="none", outside="weight",
            student_softcap=5.0, teacher_scale=0.5, span_weights=weights,
        ),
        "bucket": case(
            70, (203, 301), (23, 17), direction="jsd", beta=0.3, reduction="sum", outside="bucket"
        ),
        "few wide rows": case(3, (30_001, 40_003), (8, 9), direction="forward", reduction="none"),
    }  # fmt: skip


def attention_mass(dtype: torch.dtype) -> dict[str, Case]:
    def case(queries: int, keys: int, batch: int = 2, heads: int = 4, **options) -> Case:
        query, key = torch.randn(batch, heads, queries, 24), torch.randn(batch, 2, keys, 24)
        options["scale"] = 24**-0.5
        return Case({"query": query.to(dtype), "key": key.to(dtype)}, (), options)

    padded = torch.arange(37).expand(2, 37) >= torch.tensor([[5], [0]])
    padded[1, 30:] = False
    last = torch.tensor([36, 29])
    return {
        "one row": case(37, 37, query_index=last, key_mask=padded),
        "one row, capped": case(37, 37, query_index=last, key_mask=padded, softcap=2.0, window=9),
        "all rows": case(37, 37, key_mask=padded),
        "all rows, capped": case(29, 37, key_mask=padded, softcap=2.0, window=9),
        "many rows": case(150, 201, batch=1),
        "many keys": case(1, 20_001, query_index=torch.tensor([0, 0])),
    }


def span_geometry(dtype: torch.dtype) -> dict[str, Case]:
    def case(offsets: list[int], dims: tuple[int, int]) -> Case:
        student, teacher = (torch.randn(offsets[-1], d).to(dtype) for d in dims)
        weights = torch.rand(offsets[-1]).to(_wide(dtype))
        weights[::7] = 0
        tensors = {"student": student, "teacher": teacher, "weights": weights}
        return Case(tensors, ("student",), {"offsets": torch.tensor(offsets)})

    return {
        "ragged": case([0, 1, 1, 21, 60, 62], (37, 51)),
        "one large sample": case([0, 600], (24, 40)),
        "wide rows": case([0, 3, 5], (40_001, 50_003)),
    }


CASES: dict[str, Callable[[torch.dtype], dict[str, Case]]] = {
    f.__name__: f for f in (span_com, span_kl, linear_span_kl, attention_mass, span_geometry)
}


def cases(op: str, dtype: torch.dtype) -> dict[str, Case]:
    torch.manual_seed(0)
    return CASES[op](dtype)


def served(op: str, case: Case) -> bool:
    """Of all rows of attention there is no CUDA kernel."""
    one_row = op != "attention_mass" or "query_index" in case.options
    return one_row or backend.current() != "cuda"


def check(op: str) -> None:
    for dtype in DTYPES:
        for name, case in cases(op, dtype).items():
            if not served(op, case):
                continue
            with use_backend("reference"):
                exact, plain = outputs(op, case, exact=True), outputs(op, case)
            with poisoned_empty():
                ours = outputs(op, case)
            for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
                assert_as_good_as_torch(a, b, c, f"{op}, {name}, {dtype}, output {i}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def main(wanted: str, *ops: str) -> int:
    torch.set_num_threads(3)
    if backend.DEVICES.get(wanted) == "cuda" and torch.cuda.is_available():
        torch.set_default_device("cuda")
    wrong = 0
    for op in ops or CASES:
        try:
            # The CPU's own backends must be what "auto" comes to.
            with use_backend("auto" if wanted in ("cpu", "torch") else wanted):
                found, why = backend.select(op, torch.get_default_device())
                assert found == wanted, f"{op} is served by {found}: {why}"
                check(op)
        except Exception:
            wrong += 1
            traceback.print_exc()
        else:
            print(f"{op}: right", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
