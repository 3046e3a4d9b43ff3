"""`make gpu`, or `python -m benchmarks.gpu`: all that has to be seen on a GPU, in under 9 minutes.

Each step leaves its result in benchmarks/results/gpu: a step that has one, of this commit and this
GPU, is not run again, so a run that was cut off goes on where it stopped.

    machine    the GPU, its driver, what is installed, whether the CUDA library is built
    ops        every op on both backends against float64, in all dtypes
    tests      the tests that need a GPU, then those of the ops, on Triton and CUDA
    sanitizer  compute-sanitizer over the CUDA kernels on small shapes
    bench      `sra bench --device cuda`: every op beside its rivals
    step       the whole SRA loss against the training step of a student of 1B
    profile    where the time of the whole loss goes
    summary    each target beside what was measured
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_targets, run
from sra_kernels import backends

ROOT = Path(__file__).parents[1]
OPS = ("span_com", "span_kl", "linear_span_kl", "attention_mass", "span_geometry")
BACKENDS = ("triton", "cuda")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=run.RESULTS / "gpu", help="folder of results")
    parser.add_argument("--step", choices=STEPS, action="append", help="only this (repeatable)")
    parser.add_argument("--again", action="store_true", help="run steps that have a result, too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU on this machine. `make test` tests the kernels without one")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.step or STEPS:
        if not run_step(name, STEPS[name], args.out, args.again):
            failed.append(name)
    print(f"Failed: {', '.join(failed)}; see {args.out}" if failed else f"All done: {args.out}")
    return 1 if failed else 0


def run_step(name: str, step: Callable[[Path], bool], out: Path, again: bool) -> bool:
    """Whether it is right; a step that is right leaves a mark with commit and GPU."""
    mark = out / f"{name}.done.json"
    here = {"commit": run.machine()["commit"], "gpu": torch.cuda.get_device_name()}
    if not again and mark.exists() and json.loads(mark.read_text()).items() >= here.items():
        print(f"{name}: there already")
        return True
    begin = time.perf_counter()
    print(f"{name} ...", flush=True)
    right = step(out)
    seconds = round(time.perf_counter() - begin)
    print(f"{name}: {'done' if right else 'FAILED'}, {seconds} s", flush=True)
    if right:
        mark.write_text(json.dumps({**here, "seconds": seconds}))
    return right


def call(out: Path, log: str, argv: Sequence[object], limit: int, **environment: str) -> bool:
    """Runs a program into a log; its last line is printed. A program over its limit has failed."""
    path = out / f"{log}.txt"
    with path.open("w") as file:
        try:
            done = subprocess.run(
                [*map(str, argv)], cwd=ROOT, env={**os.environ, **environment}, stdout=file,
                stderr=subprocess.STDOUT, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {limit} s\n")
            done = None
    lines = path.read_text(errors="replace").strip().splitlines()
    print(f"    {log}: {lines[-1] if lines else 'nothing said'}", flush=True)
    return done is not None and done.returncode == 0


def machine(out: Path) -> bool:
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    with torch.device("cuda"):
        said = {**run.machine(), "driver": driver}
    said |= {f"backend {name}": str(status) for name, status in backends().items()}
    (out / "machine.json").write_text(json.dumps(said, indent=1))
    print(*(f"    {key}: {value}" for key, value in said.items()), sep="\n")
    return all(backends()[name].available for name in BACKENDS)


def ops(out: Path) -> bool:
    program = [sys.executable, "-m", "tests.every_op"]
    right = [call(out, f"ops-{name}", [*program, name], 150) for name in BACKENDS]
    return all(right)


def tests(out: Path) -> bool:
    """What needs a GPU first: if time runs out, that has been seen."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    folders = [f"tests/{op}" for op in OPS]
    right = call(out, "tests-gpu", [*pytest, "-m", "gpu", "tests/gpu", *folders], 120)
    for name in BACKENDS:
        # Some cases of each test: most compile kernels of their own.
        some = {"SRA_TEST_BACKENDS": name, "SRA_TEST_CASES": "5"}
        right &= call(out, f"tests-{name}", [*pytest, *folders], 90, **some)
    return right


def sanitizer(out: Path) -> bool:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("    left out: compute-sanitizer is not on the PATH")
        return True
    program = [sys.executable, "-m", "tests.every_op", "cuda"]
    # torch's caching allocator would hide an access beyond a tensor behind another tensor.
    return call(
        out, "sanitizer", [tool, "--error-exitcode", "1", *program], 120,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip


def bench(out: Path) -> bool:
    argv = [sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--out", str(out)]
    return subprocess.call(argv, cwd=ROOT) == 0


def step(out: Path) -> bool:
    from benchmarks.gpu_step import share_of_a_step

    with torch.device("cuda"):
        figures = share_of_a_step()
    (out / "step.json").write_text(json.dumps(figures, indent=1))
    print(*(f"    {key}: {value:.4g}" for key, value in figures.items()), sep="\n")
    return True


def profile(out: Path) -> bool:
    from benchmarks.registry import load

    with torch.device("cuda"):
        benchmark = load("sra_loss")
        job = benchmark.providers["ours"](benchmark.inputs(benchmark.gpu[0]))
        for _ in range(3):
            job.run()
            job.reset()
        with torch.profiler.profile(activities=[*torch.profiler.supported_activities()]) as found:
            job.run()
            torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="cuda_time_total", row_limit=25)
    (out / "profile.txt").write_text(table)
    return True


def summary(out: Path) -> bool:
    text = gpu_targets.summary(out)
    (out / "targets.md").write_text(text)
    print(text)
    return True


STEPS: dict[str, Callable[[Path], bool]] = {
    f.__name__: f for f in (machine, ops, tests, sanitizer, bench, step, profile, summary)
}

if __name__ == "__main__":
    raise SystemExit(main())
