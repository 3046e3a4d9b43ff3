"""The CUDA kernels on the CPU: the emulator finds planted faults, and every op is right in it.

tests/emulation/cuda_emulation.h says what the emulator is. Each planted fault of faults.cu has a
mended twin that must pass, so a report is worth something.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import every_op
from tests.emulation.build import COMPILER, KERNELS, PLAIN, ROOT, compile_emulated, library

SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SEEDS = (0, 1, 2)  # the order of threads and blocks; 0: as they are numbered

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")


# --- planted faults ---

# What is said of each: by a plain build, and by one with AddressSanitizer where that sees more.
FAULTS = {
    "missing_barrier": ("wrong", None),
    "read_out_of_bounds": (None, "heap-buffer-overflow"),
    "write_out_of_bounds": (None, "heap-buffer-overflow"),
    "shared_out_of_bounds": ("behind the end of shared memory", "heap-buffer-overflow"),
    "dynamic_shared_out_of_bounds": ("behind the end of shared memory", "heap-buffer-overflow"),
    "shared_not_written": ("wrong", None),
    "workspace_not_written": ("wrong", None),
    "output_not_written": ("wrong", None),
    "barrier_for_some": ("deadlock: 32 at the barrier of faults.cu", None),
    "two_barriers": ("threads of one block stand at different barriers", None),
    "lane_missing": ("without lanes 00000020", None),
    "lane_outside_the_mask": ("wrong", None),
    "lanes_disagree": ("does not do the same as lane", None),
    "empty_grid": ("the grid or the block is empty", None),
    "shared_memory_not_asked_for": ("more shared memory than this kernel has asked for", None),
}
BY_PLAIN = [(fault, report) for fault, (report, _) in FAULTS.items() if report]
BY_SANITIZER = [(fault, report) for fault, (_, report) in FAULTS.items() if report]


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """faults(flags)(fault, *arguments, seed=0): what the program says."""
    folder = tmp_path_factory.mktemp("faults")

    @functools.cache
    def build(*flags: str) -> Path:
        name = "sanitized" if "-g1" in flags else "plain"
        return compile_emulated(folder / name, [ROOT / "tests/emulation/faults.cu"], [*flags])

    def run(flags: list[str], *arguments: str, seed: int = 0) -> str:
        environment = {**os.environ, "SRA_EMULATION_SEED": str(seed)}
        done = subprocess.run(
            [build(*flags), *arguments], env=environment, text=True, capture_output=True, timeout=60
        )
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize(("fault", "report"), BY_PLAIN, ids=[name for name, _ in BY_PLAIN])
def test_a_planted_fault_is_found(faults, fault, report):
    assert any(report in faults(PLAIN, fault, seed=seed) for seed in SEEDS)


@pytest.mark.parametrize(("fault", "report"), BY_SANITIZER, ids=[name for name, _ in BY_SANITIZER])
def test_a_planted_fault_is_found_by_the_sanitizer(faults, fault, report):
    assert report in faults(SANITIZED, fault)


@pytest.mark.parametrize("flags", [PLAIN, SANITIZED], ids=["plain", "sanitized"])
def test_without_the_fault_nothing_is_found(faults, flags):
    for fault in FAULTS:
        for seed in SEEDS:
            assert faults(flags, fault, "mended", seed=seed) == "right\n", (fault, seed)


# --- the kernels ---


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """emulated(seed): every op in a process of its own; without a seed, under AddressSanitizer."""
    folder = tmp_path_factory.mktemp("emulated")
    sanitized = functools.cache(lambda: compile_emulated(folder / "asan.so", KERNELS, SANITIZED))

    @functools.cache
    def run(seed: int | None) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "SRA_KERNELS_BACKEND": "cuda",
            "SRA_KERNELS_CUDA_LIBRARY": str(sanitized() if seed is None else library()),
            "SRA_EMULATION_SEED": str(1 if seed is None else seed),
        }
        if seed is None:
            # torch's allocations have the size of their tensors: what lies beyond one is seen.
            found = subprocess.check_output([COMPILER, "-print-file-name=libasan.so"], text=True)
            environment |= {"LD_PRELOAD": found.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run(
            [sys.executable, "-m", "tests.every_op", "cuda"], cwd=ROOT, env=environment, text=True,
            capture_output=True, timeout=300,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("op", every_op.CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_op_is_right_in_any_order_of_threads(emulated, op, seed):
    done = emulated(seed)
    assert f"{op}: right" in done.stdout.splitlines(), done.stdout + done.stderr[-20_000:]


@pytest.mark.parametrize("op", every_op.CASES)
def test_no_op_leaves_its_arrays(emulated, op):
    done = emulated(None)
    assert f"{op}: right" in done.stdout.splitlines(), done.stdout + done.stderr[-20_000:]
