"""The calls that together launch every Triton kernel in each form that it is compiled in.

Tensors are of the "meta" device. Each op is called with real sizes, whose rows begin at multiples
of 16 bytes, with sizes that are no multiple of anything, and with tensors of more than 2³¹
elements. All of this in bfloat16, and the first call of each op in every dtype.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.linear_span_kl import chunks
from sra_kernels.span_kl.portable import STATS

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    dtype: torch.dtype
    aligned: bool
    run: Callable[[], Any]


def cases() -> Iterator[Case]:
    for op, calls in CALLS.items():
        module = importlib.import_module(f"sra_kernels.{op}.triton")
        for dtype in DTYPES:
            for name, aligned, run in calls(module, dtype):
                yield Case(op, name, dtype, aligned, run)


Calls = Iterator[tuple[str, bool, Callable[[], Any]]]


def real(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def far_apart(rows: int, columns: int, stride: int, dtype: torch.dtype) -> Tensor:
    """Rows that lie far apart in memory: the last of them beyond 2³¹ elements."""
    return torch.empty_strided((rows, columns), (stride, 1), dtype=dtype, device="meta")


def span_com(module: Any, dtype: torch.dtype) -> Calls:
    wide = check.accumulator(dtype)

    def call(hidden: Tensor, index: torch.dtype, weighted: bool = True) -> None:
        tokens, dim = hidden.shape
        spans = integers(tokens // 2, 2, dtype=index)
        weights = real(tokens, dtype=wide) if weighted else None
        _, mass = module.span_com_forward(hidden, spans, weights)
        grad = real(len(spans), dim, dtype=dtype), real(len(spans), dtype=wide)
        saved = hidden if weighted else None
        module.span_com_backward(*grad, spans, weights, mass, saved, tokens, True, weighted)

    yield "wide", True, partial(call, real(8192, 2048, dtype=dtype), torch.int64)
    if dtype in (torch.bfloat16, torch.float32):
        yield "odd narrow", False, partial(call, real(8191, 37, dtype=dtype), torch.int32)
    if dtype == torch.bfloat16:
        yield "narrow", True, partial(call, real(8192, 128, dtype=dtype), torch.int64)
        yield "odd", False, partial(call, real(8191, 1037, dtype=dtype), torch.int32)
        plain = real(8192, 2048, dtype=dtype)
        yield "no weights", True, partial(call, plain, torch.int64, weighted=False)
        yield "huge", True, partial(call, real(2**21, 4096, dtype=dtype), torch.int64)
        yield "far apart", True, partial(call, far_apart(99, 2048, 2**32, dtype), torch.int64)


def attention_mass(module: Any, dtype: torch.dtype) -> Calls:
    def call(
        sizes: tuple[int, int, int, int, int], one: bool, softcap: float | None = None,
        window: int | None = None, mask: bool = False, lse: bool = False,
    ) -> None:  # fmt: skip
        batch, heads, kv_heads, tokens, dim = sizes
        module.attention_mass_forward(
            real(batch, heads, tokens, dim, dtype=dtype),
            real(batch, kv_heads, tokens, dim, dtype=dtype),
            integers(batch) if one else None,
            dim**-0.5,
            real(batch, tokens, dtype=torch.bool) if mask else None,
            softcap,
            window,
            real(batch, heads, tokens, dtype=check.accumulator(dtype)) if lse else None,
        )

    for rows, one in (("one row", True), ("all rows", False)):
        for dim in (64, 128, 256) if dtype != torch.float16 else (128,):
            yield f"{rows}, dim {dim}", True, partial(call, (4, 32, 8, 4096, dim), one)
        if dtype == torch.bfloat16:
            usual = 4, 32, 8, 4096, 128
            yield f"{rows}, dim 512", True, partial(call, (4, 8, 2, 4096, 512), one)
            yield f"{rows}, dim 24", False, partial(call, (4, 6, 2, 4001, 24), one, mask=True)
            yield f"{rows}, options", True, partial(call, usual, one, 30.0, 512, True)
            yield f"{rows}, huge", True, partial(call, (64, 64, 16, 2**14, 128), one)
    if dtype == torch.bfloat16:
        yield "all rows, lse", True, partial(call, (4, 32, 8, 4096, 128), False, lse=True)


def span_kl(module: Any, dtype: torch.dtype) -> Calls:
    wide = check.accumulator(dtype)

    def call(
        spans: int, entries: tuple[int, int], shared: int, direction: str = "forward",
        outside: str = "renormalise",
    ) -> None:  # fmt: skip
        logits = [real(spans, n, dtype=dtype) for n in entries]
        ids = (integers(shared), integers(shared)) if shared else (None, None)
        options = 2.0, direction, 0.3 if direction == "jsd" else None, outside
        for need_grad in (False, True):
            module.span_kl_forward(*logits, *ids, *options, outside == "weight", need_grad)
        stats = real(spans, STATS, dtype=wide)
        module.span_kl_backward(real(spans, dtype=wide), stats, *logits, *ids, *options)

    one, two = (32768, 32768), (128256, 151936)
    yield "many rows", True, partial(call, 4096, two, 40960)
    if dtype == torch.bfloat16:
        yield "few rows", True, partial(call, 8, two, 40960, "reverse")
        yield "odd", False, partial(call, 513, (50257, 32001), 20001)
        yield "one vocabulary", True, partial(call, 4096, one, 0)
        yield "small vocabulary", True, partial(call, 512, (512, 640), 200, "reverse", "weight")
        yield "bucket", True, partial(call, 4096, two, 40960, "jsd", "bucket")
        yield "huge", True, partial(call, 2**15, two, 40960)


def linear_span_kl(module: Any, dtype: torch.dtype) -> Calls:
    wide = check.accumulator(dtype)

    chunks.SIZES.setdefault("meta", chunks.SIZES["cuda"])

    def call(
        shared: int, direction: str = "forward", outside: str = "renormalise",
        softcap: float | None = None,
    ) -> None:  # fmt: skip
        spans, weighted, entries = 1024, softcap is not None, (128256, 151936)
        inputs: list[Tensor | None] = []
        for n, dim in zip(entries, (2048, 4096), strict=True):
            bias = real(n, dtype=dtype) if weighted else None
            inputs += [real(spans, dim, dtype=dtype), real(n, dim, dtype=dtype), bias]
        inputs += [integers(shared), integers(shared)]
        inputs.append(real(spans, dtype=wide) if weighted else None)
        beta = 0.3 if direction == "jsd" else None
        options = None, softcap, None, softcap, 2.0, direction, beta, outside
        learn = True, True, weighted
        mass = outside == "weight"
        module.linear_span_kl_tiles(*inputs, *options[:-1], "renormalise")
        _, _, _, head, bias = module.linear_span_kl_forward(*inputs, *options, mass, *learn)
        module.linear_span_kl_backward(real(spans, dtype=wide), *inputs, *options, *learn)
        factor = None if weighted else real(dtype=wide)
        for grad in (head, bias.view(-1, 1))[: 1 + weighted]:
            module.linear_span_kl_restore(grad, factor, inputs[6], entries[0], dtype)

    yield "shared", True, partial(call, 40960)
    if dtype == torch.bfloat16:
        yield "odd entries", True, partial(call, 40961)
        yield "options", True, partial(call, 40960, "jsd", "weight", 30.0)


def span_geometry(module: Any, dtype: torch.dtype) -> Calls:
    def call(
        spans: int, samples: int, dims: tuple[int, int], theirs: torch.dtype = dtype,
        grad: bool = True,
    ) -> None:  # fmt: skip
        student, teacher = real(spans, dims[0], dtype=dtype), real(spans, dims[1], dtype=theirs)
        weights = real(spans, dtype=check.accumulator(dtype))
        module.span_geometry_forward(student, teacher, weights, integers(samples + 1), grad)

    usual = 2048, 4096
    yield "large samples", True, partial(call, 4096, 4, usual)
    if dtype == torch.float32:
        yield "16-bit teacher", True, partial(call, 4096, 4, usual, torch.bfloat16)
    if dtype == torch.bfloat16:
        yield "small samples", True, partial(call, 40, 1, usual)
        yield "value alone", True, partial(call, 4096, 4, usual, grad=False)
        yield "odd", False, partial(call, 1237, 5, (37, 61))
        yield "huge", True, partial(call, 8192, 4, (2**19, 2**19))


CALLS: dict[str, Callable[[Any, torch.dtype], Calls]] = {
    f.__name__: f for f in (span_com, attention_mass, span_kl, linear_span_kl, span_geometry)
}
