"""How a benchmark is measured: verified first, then timed in turns, memory in a fresh process."""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import NAMES, Job, load

WARM_UP = 1  # beside the run that verifies


class Refused(Exception):
    """A provider that does not compute what the benchmark asks for; it is not timed."""


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference in float64, relative to the largest value of its row (its last axis).

    Relative to the row, so that a long span, whose mean is small, cannot hide behind short ones.
    """
    if actual.shape != exact.shape:
        raise Refused(f"shape {[*actual.shape]} instead of {[*exact.shape]}")
    if not actual.numel():
        return 0.0
    difference = (actual.detach().double() - exact.double()).abs().amax(dim=-1)
    relative = difference / exact.double().abs().amax(dim=-1)
    relative[difference == 0] = 0  # a row of zeros, met exactly
    return float(torch.where(relative.isnan(), torch.inf, relative).max())


def verify(job: Job, exact: Sequence[Tensor], tolerance: float) -> float:
    """The job's error against float64; raises `Refused` where it is above the tolerance."""
    try:
        outputs = job.run()
    except Exception as problem:  # a rival may fail in its own way; the suite goes on without it
        raise Refused(f"{type(problem).__name__}: {problem}") from problem
    finally:
        job.reset()
    if len(outputs) != len(exact):
        raise Refused(f"{len(outputs)} results instead of {len(exact)}")
    worst = max(error(a, e) for a, e in zip(outputs, exact, strict=True))
    if not worst <= tolerance:
        raise Refused(f"error {worst:.1e} against float64, more than {tolerance:.1e}")
    return worst


class Effort(NamedTuple):
    """Samples of each provider: `most`, fewer when `seconds` are used up, but at least `least`."""

    most: int = 30
    least: int = 5
    seconds: float = 0.2


def interleave(jobs: Mapping[str, Job], effort: Effort) -> dict[str, Tensor]:
    """Milliseconds of each run of each job, in turns A B A B: a busy moment hits all of them."""
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        for _ in range(WARM_UP):
            _timed(job)
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
    begin = time.perf_counter()
    outputs = job.run()
    end = time.perf_counter()
    del outputs
    job.reset()
    return 1e3 * (end - begin)


def peak_mib(name: str, case: Any, provider: str) -> float | None:
    """Peak resident memory of one run above its inputs, outputs and gradients included.

    Measured in a fresh process, forked from a server that has imported the suite and nothing more.
    None where the system cannot tell (it is not Linux).
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=_server()) as process:
        return process.submit(_peak_here, name, case, provider).result()


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


def measure(
    name: str, case: Any, effort: Effort, memory: bool, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row for each provider of a case, the copy first. A refused provider has no times."""
    benchmark = load(name)
    data = benchmark.inputs(case)
    exact, tolerance = benchmark.exact(data), benchmark.tolerance(case)
    jobs: dict[str, Job] = {}
    rows: dict[str, dict[str, Any]] = {}
    moved: dict[str, int] = {}
    if benchmark.copy:
        jobs["copy"], moved["copy"] = benchmark.copy(data)
        rows["copy"] = {"status": "ok"}
    for provider, prepare in benchmark.providers.items():
        try:
            job = prepare(data)
            rows[provider] = {"status": "ok", "error_vs_float64": verify(job, exact, tolerance)}
            jobs[provider] = job
        except Refused as reason:
            rows[provider] = {"status": f"refused: {reason}".splitlines()[0]}
            report(f"{provider} {rows[provider]['status']}")
        if benchmark.bytes_moved:
            moved[provider] = benchmark.bytes_moved(data)
    for provider, times in interleave(jobs, effort).items():
        row = rows[provider]
        low, middle, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row |= {"median_ms": middle, "p20_ms": low, "p80_ms": high, "samples": len(times)}
        row["min_ms"] = float(times.min())
        if provider in moved:
            row["gb_per_s"] = moved[provider] / middle / 1e6
            row["pct_of_copy"] = 100 * row["gb_per_s"] / rows["copy"]["gb_per_s"]
        if memory and benchmark.memory(case) and provider != "copy":
            row["peak_mib"] = peak_mib(name, case, provider)
    return [{"provider": provider, **row} for provider, row in rows.items()]
