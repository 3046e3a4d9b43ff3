"""Kernels that are wrong on purpose: the checks must refuse each of them, and the right one not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from tests.aot import inspect_kernel
from tests.aot.cases import Case, far_apart, real
from tests.aot.compile_triton import Compilation
from tests.aot.rows import write


@triton.jit
def right(x, out, stride, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * stride + columns, mask=columns < dim, other=0.0)
        sums += values.to(tl.float32)
    tl.store(out + row, tl.sum(sums))


@triton.jit
def overflowing(x, out, stride, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float32)
    first = x + row * stride
    for start in range(0, dim, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        sums += tl.load(first + columns, mask=columns < dim, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(sums))


@triton.jit
def widened_late(x, out, rows, stride, dim, BLOCK: tl.constexpr):
    row = tl.load(rows + tl.program_id(0))
    while row >= 0:
        first = row * stride
        columns = tl.arange(0, BLOCK)
        value = tl.load(x + first.to(tl.int64) + columns, mask=columns < dim, other=0.0)
        tl.store(out + row, tl.sum(value.to(tl.float32)))
        row -= 1


@triton.jit
def spilling(x, out, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + columns).to(tl.float32)
    values = values - tl.sum(values) / BLOCK
    tl.store(out + row * BLOCK + columns, values * tl.sum(values * values))


def cases() -> Iterator[Case]:
    def case(name: str, aligned: bool, kernel: Any, *args: Any, block: int, grid: int) -> Case:
        run = partial(kernel[(grid,)], *args, BLOCK=block, num_warps=1)
        return Case("planted", name, torch.bfloat16, aligned, run)

    x, out = real(2**20, 4096, dtype=torch.bfloat16), real(2**20, dtype=torch.float32)
    few, apart = x[:100], far_apart(100, 4096, 2**32, torch.bfloat16)
    index = torch.empty(9, dtype=torch.int32, device="meta")
    yield case("right", True, right, x, out, 4096, 4096, block=256, grid=2**20)
    yield case("right, far apart", True, right, apart, out, 2**32, 4096, block=256, grid=100)
    yield case("narrow", True, right, few, out, 4097, 4096, block=256, grid=100)
    yield case("overflowing", True, overflowing, x, out, 4096, 4096, block=256, grid=2**20)
    yield case("few rows", True, overflowing, few, out, 4096, 4096, block=256, grid=100)
    yield case("far apart", True, overflowing, apart, out, 2**32, 4096, block=256, grid=100)
    yield case("widened late", True, widened_late, x, out, index, 4096, 4096, block=256, grid=9)
    yield case("spilling", True, spilling, x, x, 4096, block=16384, grid=100)


def machine_code_agrees() -> None:
    """The widths that inspect_kernel reads from PTX are those of the instructions."""
    for case in cases():
        compiled = case.run()
        (code,) = inspect_kernel.disassembled(compiled.asm["cubin"]).values()
        for ours, theirs in zip(
            inspect_kernel.ptx_accesses(compiled.asm["ptx"]),
            inspect_kernel.sass_accesses(code),
            strict=True,
        ):
            assert ours.keys() == theirs.keys(), f"{case.name}: {ours} in PTX, {theirs} in code"


if __name__ == "__main__":
    compilation = Compilation(sys.argv[1])
    compilation.run(cases())
    assert not [text for text in compilation.failures if "Traceback" in text], compilation.failures
    machine_code_agrees()
    write(sys.argv[2], compilation.rows.values())
