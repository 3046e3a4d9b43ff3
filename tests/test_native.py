"""The C++ library as a whole: instruction sets, sanitizers, threads, far addresses, its absence.

Each check runs the same operations, those of tests/every_op.py, so an op that the library lacks
fails here. What needs a build is built once for all of them.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sra_kernels import backends, use_backend
from tests import every_op

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-DCLONES="]
# Vectorised as by -O3, compiled in half its time.
VECTORISED = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]
SANITIZED = [
    "-Og", "-g1", "-march=native", "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
]  # fmt: skip

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
each_op = pytest.mark.parametrize("op", every_op.CASES)


def run_every_op(wanted: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.every_op", wanted], cwd=ROOT, text=True,
        env={**os.environ, **environment}, capture_output=True, timeout=300,
    )  # fmt: skip


def assert_right(op: str, done: subprocess.CompletedProcess[str]) -> None:
    assert f"{op}: right" in done.stdout.splitlines(), done.stdout + done.stderr[-20_000:]


def compile_library(target: Path, sources: list[Path], flags: list[str]) -> Path:
    argv = [COMPILER, *FLAGS, *flags, "-I", ROOT / "csrc" / "include", "-shared", "-fPIC"]
    subprocess.run([*argv, *sources, "-o", target], check=True, timeout=300)
    return target


SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))

# --- instruction sets ---

# What /proc/cpuinfo lists on a machine that runs the set.
SETS = {
    "x86-64": [],
    "x86-64-v3": ["avx2", "bmi2", "f16c", "fma"],
    "x86-64-v4": ["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"],
} if platform.machine() in ("x86_64", "AMD64") else {"native": []}  # fmt: skip


@pytest.fixture(scope="module")
def ran_on(tmp_path_factory):
    """Every op in a process of its own, compiled for one instruction set alone."""
    folder = tmp_path_factory.mktemp("libraries")

    @functools.cache
    def run(instructions: str) -> subprocess.CompletedProcess[str]:
        flags = [*VECTORISED, f"-march={instructions}"]
        library = compile_library(folder / f"{instructions}.so", SOURCES, flags)
        return run_every_op("cpu", SRA_KERNELS_CPU_LIBRARY=str(library))

    return run


@needs_compiler
@pytest.mark.parametrize("instructions", SETS)
@each_op
def test_every_instruction_set(ran_on, instructions, op):
    cpuinfo = Path("/proc/cpuinfo")
    listed = cpuinfo.read_text().split() if cpuinfo.exists() else []
    if missing := set(SETS[instructions]) - set(listed):
        pytest.skip(f"{instructions} not run: this machine has no {', '.join(sorted(missing))}")
    assert_right(op, ran_on(instructions))


# --- sanitizers ---


def run_sanitized(library: Path) -> subprocess.CompletedProcess[str]:
    """torch's allocations have the exact size of their tensors, so a read beyond one is seen."""
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.check_output([COMPILER, f"-print-file-name={n}"], text=True) for n in names]
    return run_every_op(
        "cpu",
        SRA_KERNELS_CPU_LIBRARY=str(library),
        LD_PRELOAD=":".join(path.strip() for path in found),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
    )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    library = tmp_path_factory.mktemp("sanitized") / "sanitized.so"
    return run_sanitized(compile_library(library, SOURCES, SANITIZED))


@needs_compiler
@each_op
def test_sanitizers_find_nothing(sanitized, op):
    assert_right(op, sanitized)


FAULTY = """
#include "sra_kernels.h"
int sra_kernels_abi(void) { return SRA_KERNELS_ABI; }
int sra_span_com_backward(const sra_span_com*) { return SRA_OK; }
int sra_span_com_forward(const sra_span_com* p) { return FAULT; }
"""


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("((const double*)p->hidden)[p->tokens * p->dim] > 0", "heap-buffer-overflow"),
        ("int(p->dim << 8) * int(p->dim << 20)", "signed integer overflow"),
    ],
    ids=["reads beyond the end", "overflows"],
)
def test_sanitizers_find_a_planted_fault(tmp_path, fault, report):
    source = tmp_path / "faulty.cpp"
    source.write_text(FAULTY.replace("FAULT", fault))
    done = run_sanitized(compile_library(tmp_path / "faulty.so", [source], SANITIZED))
    assert done.returncode != 0
    assert report in done.stderr


# --- in this process, with the library that is installed ---


@pytest.fixture
def library():
    if COMPILER is None and not backends()["cpu"].available:
        pytest.skip(backends()["cpu"].reason)
    with use_backend("cpu"):
        yield


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_twice_and_for_any_number_of_threads(library, set_threads, op, dtype):
    for name, case in every_op.cases(op, dtype).items():
        set_threads(1)
        first = every_op.outputs(op, case)
        for threads in (1, 2, 7):
            set_threads(threads)
            if op == "linear_span_kl":  # torch's products are cut otherwise for other threads
                first = every_op.outputs(op, case)
            for i, (a, b) in enumerate(zip(every_op.outputs(op, case), first, strict=True)):
                assert torch.equal(a, b), f"{name}, output {i}, {threads} threads"


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, the rows of each matrix so far apart that the last begins past 2^31
    elements. Only the rows take memory: the rest of the 4 GiB (of 2 bytes) is address space."""
    *outer, rows, columns = x.shape
    stride = 2**31 // max(1, rows - 1) + x[..., :1, :].numel()
    strides = torch.empty(*outer, columns, device="meta").stride()[:-1]
    far = torch.empty(stride * rows + x.numel(), dtype=x.dtype)
    return far.as_strided(x.shape, (*strides, stride, 1)).copy_(x)


@each_op
def test_addresses_past_32_bits(library, op):
    every = every_op.cases(op, torch.bfloat16)
    for name, case in every.items():
        near = every_op.outputs(op, case)
        for tensor, x in case.tensors.items():
            if x.dim() < 2:
                continue
            case.tensors[tensor] = far_apart(x)
            for i, (a, b) in enumerate(zip(every_op.outputs(op, case), near, strict=True)):
                assert torch.equal(a, b), f"{name}, {tensor} far apart, output {i}"
            case.tensors[tensor] = x


# --- without the library ---


@pytest.fixture(scope="module")
def without_library(tmp_path_factory):
    return run_every_op("torch", SRA_KERNELS_CPU_LIBRARY=str(tmp_path_factory.mktemp("none") / "x"))


@each_op
def test_every_op_works_without_the_library(without_library, op):
    assert_right(op, without_library)
