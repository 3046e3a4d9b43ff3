"""How a benchmark is measured: verified first, then timed in turns, memory in a fresh process.

Everything happens on torch's default device. On a GPU, times are those of the GPU itself, from a
cold L2 cache, and memory is what torch's allocator hands out.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import NAMES, Absent, Benchmark, Job, load

WARM_UP = 1  # beside the run that verifies
LONG = 1000  # milliseconds, from which the warm-up counts as a sample


class Refused(Exception):
    """A provider that does not compute what the benchmark asks for; it is not timed."""


# Rows this much smaller than the tensor's largest value count as this large: what they hold may be
# a difference of nearly equal probabilities, and no more than rounding.
SMALL_ROW = 1e-3


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference in float64, relative to the largest value of its row (its last axis).

    Relative to the row, so that a long span, whose mean is small, cannot hide behind short ones.
    """
    if actual.shape != exact.shape:
        raise Refused(f"shape {[*actual.shape]} instead of {[*exact.shape]}")
    if not actual.numel():
        return 0.0
    difference = (actual.detach().double() - exact.double()).abs().amax(dim=-1)
    size = exact.double().abs().amax(dim=-1)
    relative = difference / size.clamp_min(SMALL_ROW * size.max())
    relative[difference == 0] = 0  # a row of zeros, met exactly
    return float(torch.where(relative.isnan(), torch.inf, relative).max())


def verify(job: Job, exact: Sequence[Tensor] | None, tolerance: float) -> float | None:
    """The job's error against float64; raises `Refused` where it is above the tolerance.

    Without exact results, all that can be asked is that the job's are finite.
    """
    try:
        outputs = job.run()
    except Exception as problem:  # a rival may fail in its own way; the suite goes on without it
        raise Refused(f"{type(problem).__name__}: {problem}") from problem
    finally:
        job.reset()
    if exact is None:
        if not all(x.isfinite().all() for x in outputs):
            raise Refused("a result is not finite")
        return None
    if len(outputs) != len(exact):
        raise Refused(f"{len(outputs)} results instead of {len(exact)}")
    worst = max(error(a, e) for a, e in zip(outputs, exact, strict=True))
    if not worst <= tolerance:
        raise Refused(f"error {worst:.1e} against float64, more than {tolerance:.1e}")
    return worst


AT_LEAST = 0.3  # seconds of samples of a provider, however late it is: 30 where a run takes 10 ms


class Effort(NamedTuple):
    """Samples of each provider: `most`, fewer when `seconds` are used up, but at least `least`."""

    most: int = 30
    least: int = 3
    seconds: float = 0.2


def interleave(jobs: Mapping[str, Job], effort: Effort) -> dict[str, Tensor]:
    """Milliseconds of each run of each job, in turns A B A B: a busy moment hits all of them."""
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for name, job in jobs.items():
        for _ in range(WARM_UP):
            first = _timed(job)
        if first >= LONG:  # as warm as it gets, after the run that verified it
            samples[name].append(first)
    pending = list(jobs)
    while pending:
        for name in pending:
            samples[name].append(_timed(jobs[name]))
        pending = [
            name
            for name in pending
            if len(samples[name]) < effort.least
            or (len(samples[name]) < effort.most and sum(samples[name]) < 1e3 * effort.seconds)
        ]
    return {name: torch.tensor(times) for name, times in samples.items()}


def _timed(job: Job) -> float:
    if on_gpu():
        return _timed_on_gpu(job)
    begin = time.perf_counter()
    outputs = job.run()
    end = time.perf_counter()
    del outputs
    job.reset()
    return 1e3 * (end - begin)


def on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


COLD = 256 << 20  # bytes, several times the L2 cache of any GPU


@functools.cache
def _cold() -> Tensor:
    return torch.empty(COLD, dtype=torch.uint8)


def _timed_on_gpu(job: Job) -> float:
    """While the cache is swept, the host runs ahead: a launch that it is late for counts."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cold().zero_()
    begin.record()
    outputs = job.run()
    end.record()
    end.synchronize()
    del outputs
    job.reset()
    return begin.elapsed_time(end)


def first_ms(job: Job) -> float:
    """Wall clock of the first run in this process: what compiling costs, or loading what was."""
    begin = time.perf_counter()
    try:
        job.run()
    except Exception as problem:
        raise Refused(f"{type(problem).__name__}: {problem}") from problem
    finally:
        job.reset()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def peak_mib_on_gpu(job: Job) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = job.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del outputs
    job.reset()
    return peak / 2**20


def peak_mib(name: str, case: Any, provider: str) -> float | None:
    """Peak resident memory of one run above its inputs, outputs and gradients included.

    Measured in a fresh process, forked from a server that has imported the suite and nothing more.
    None where the system cannot tell (it is not Linux) or has not enough memory for the run.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=_server()) as process:
        try:
            return process.submit(_peak_here, name, case, provider).result()
        except BrokenProcessPool:
            return None


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"benchmarks.{name}" for name in NAMES])
    return context


def _peak_here(name: str, case: Any, provider: str) -> float:
    benchmark = load(name)
    job = benchmark.providers[provider](benchmark.inputs(case))
    _timed(job)  # compiles, loads libraries, starts threads
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_kib("VmRSS")
    outputs = job.run()
    peak = _status_kib("VmHWM") - before
    del outputs
    return peak / 1024


def _status_kib(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1])


def copy_of(size: int) -> tuple[Job, int]:
    """A copy that moves `size` bytes, the op's own number, so that both fit the same caches; and
    the bytes, at most 256 MiB, which fit none."""
    source = torch.ones(max(min(size, 256 << 20) // 8, 1))
    out = torch.empty_like(source)
    return Job(lambda: [out.copy_(source)]), 8 * len(source)


# The side and dtype of the square product whose rate is the roof of arithmetic.
GEMM = {"cpu": (1024, torch.float32), "cuda": (8192, torch.bfloat16)}


def gemm() -> tuple[Job, int]:
    side, dtype = GEMM[torch.get_default_device().type]
    # Random numbers: a GPU multiplies ones faster, because it then draws less power.
    a, b, out = (torch.randn(side, side).to(dtype) for _ in range(3))
    return Job(lambda: [torch.mm(a, b, out=out)]), 2 * side**3


def measure(
    name: str,
    case: Any,
    effort: Effort,
    memory: bool,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row for each provider of a case, the bounds first. What is not timed has no times.

    `effort.seconds` is for all providers together, and verifying them counts.
    """
    begin = time.perf_counter()
    benchmark = load(name)
    data = benchmark.inputs(case)
    rows: dict[str, dict[str, Any]] = {}
    jobs, size, flops = _bounds(benchmark, data)
    rows |= {bound: {"kind": "bound", "status": "ok"} for bound in jobs}
    exact = benchmark.exact(data) if benchmark.exact else None
    providers = {**benchmark.providers, **(benchmark.gpu_providers if on_gpu() else {})}
    for provider, prepare in providers.items():
        if provider in benchmark.headline_only and not benchmark.headline(case):
            continue
        row: dict[str, Any] = {
            "kind": "ours" if provider.startswith("ours") else "rival",
            "status": "ok",
        }
        rows[provider] = row
        try:
            job = prepare(data)
            if on_gpu():
                row["first_ms"] = first_ms(job)
            row["error_vs_float64"] = verify(job, exact, benchmark.tolerance(case))
            jobs[provider] = job
            row["package"] = job.package
        except Absent as reason:
            row["status"] = str(reason)
        except Refused as reason:
            row["status"] = f"refused: {reason}".splitlines()[0]
            report(f"{provider} {row['status']}")
    seconds = max((effort.seconds - (time.perf_counter() - begin)) / len(jobs), AT_LEAST)
    for provider, times in interleave(jobs, effort._replace(seconds=seconds)).items():
        row = rows[provider]
        low, middle, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row |= {"median_ms": middle, "p20_ms": low, "p80_ms": high, "samples": len(times)}
        row["min_ms"] = float(times.min())
    _roofline(rows, size, flops)
    if memory and on_gpu():
        for provider in providers.keys() & jobs.keys():
            rows[provider]["peak_mib"] = peak_mib_on_gpu(jobs[provider])
    elif memory and benchmark.headline(case):
        del data, exact
        timed = [p for p in benchmark.providers if "median_ms" in rows.get(p, ())]
        jobs.clear()
        with ThreadPoolExecutor(2) as pool:  # one at a time would take twice as long
            peaks = pool.map(lambda provider: peak_mib(name, case, provider), timed)
            for provider, peak in zip(timed, peaks, strict=True):
                rows[provider]["peak_mib"] = peak
    return [{"provider": provider, **row} for provider, row in rows.items()]


def _bounds(
    benchmark: Benchmark, data: Any
) -> tuple[dict[str, Job], dict[str, int], dict[str, int]]:
    """The jobs that bound an op; then the bytes and the flops: of each of them, of the op as ""."""
    jobs: dict[str, Job] = {}
    size: dict[str, int] = {}
    flops: dict[str, int] = {}
    if benchmark.bytes_moved:
        size[""] = benchmark.bytes_moved(data)
        jobs["copy"], size["copy"] = copy_of(size[""])
    if benchmark.flops:
        flops[""] = benchmark.flops(data)
        jobs["GEMM"], flops["GEMM"] = gemm()
    jobs |= {bound: prepare(data) for bound, prepare in benchmark.bounds.items()}
    return jobs, size, flops


def _roofline(
    rows: dict[str, dict[str, Any]], size: Mapping[str, int], flops: Mapping[str, int]
) -> None:
    """Adds the rates, and the time that the slower of memory and arithmetic needs at least."""
    needed = {}
    for bound, work in (("copy", size), ("GEMM", flops)):
        if bound in work:
            needed[bound] = work[""] * rows[bound]["median_ms"] / work[bound]
    if not needed:
        return
    bound = max(needed, key=needed.__getitem__)
    for provider, row in rows.items():
        if "median_ms" not in row:
            continue
        moved, counted = (
            work.get(provider, None if provider in ("copy", "GEMM") else work.get(""))
            for work in (size, flops)
        )
        if moved is not None:
            row["gb_per_s"] = moved / row["median_ms"] / 1e6
        if counted is not None:
            row["gflop_per_s"] = counted / row["median_ms"] / 1e6
        if provider not in ("copy", "GEMM"):
            row |= {"bound": bound, "pct_of_roofline": 100 * needed[bound] / row["median_ms"]}
