"""`sra bench`, or `python -m benchmarks.run`: measures each op into a CSV, then plots them.

Each malloc setting gets a process of its own, because glibc reads its tunables at start only:

    default  what a user gets. glibc gives large blocks back to the system at once, so most of what
             an op returns is fresh memory, and first touching it costs more than the arithmetic.
    tuned    freed memory is kept and used again, as under jemalloc or in a long training run.
             The headline cases only.

`--device cuda` measures the GPU kernels instead, on cases of their own; `make gpu` does that, and
more.

Rivals are optional: `pip install 'sra[bench]'` brings those that run on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import plot
from benchmarks.measure import Effort, measure, on_gpu
from benchmarks.registry import NAMES, columns, label, load

TUNABLES = {
    "default": "",
    "tuned": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184",
}
RESULTS = Path(__file__).with_name("results")
PARTIAL = Path("build/benchmarks")
RECORDED = ":(top,exclude)benchmarks/results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sra bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", choices=NAMES, action="append", help="only this op (repeatable)")
    parser.add_argument("--only", default="", help="only cases whose label matches this regex")
    parser.add_argument("--quick", action="store_true", help="small sizes, few samples")
    parser.add_argument("--list", action="store_true", help="print the cases' labels and stop")
    parser.add_argument(
        "--base",
        metavar="REV",
        help="build this commit beside the working tree and compare ours of both, headline cases",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder for CSV, plot and table (default: {RESULTS.parent.name}/{RESULTS.name}, "
        f"and README.md, for a full run, {PARTIAL} for a part)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--malloc", choices=TUNABLES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    part = bool(args.only or args.quick)
    if args.device == "cuda":
        if args.quick or args.list or args.base:
            parser.error("--quick, --list and --base are of the CPU's cases")
        if not torch.cuda.is_available():
            parser.error("torch sees no GPU on this machine")
        return measure_on_gpu(args.op or NAMES, args.only, args.out or RESULTS / "gpu")
    out: Path = args.out or (PARTIAL if part else RESULTS)
    chosen = {
        name: [
            case
            for case in (load(name).small if args.quick else load(name).cases)
            if re.search(args.only, label(case))
        ]
        for name in args.op or NAMES
    }
    if args.list:
        print("\n".join(f"{name}: {label(case)}" for name in chosen for case in chosen[name]))
        return 0
    if args.base:
        from benchmarks.compare import compare

        quoted = {
            name: [case for case in cases if part or load(name).headline(case)]
            for name, cases in chosen.items()
        }
        print(compare(args.base, quoted))
        return 0
    if args.malloc:
        return _measure_here(chosen, args.malloc, args.quick, out)

    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        (out / f"{name}.csv").unlink(missing_ok=True)
    settings = list(TUNABLES) if platform.libc_ver()[0] == "glibc" else ["default"]
    status = 0
    for malloc in settings:
        again = [sys.executable, "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)]
        environment = {**os.environ, "GLIBC_TUNABLES": TUNABLES[malloc]}
        status |= subprocess.call([*again, "--malloc", malloc], env=environment)
    for name in chosen:
        if (out / f"{name}.csv").exists():
            print(*plot.write(out / f"{name}.csv"), sep="\n")
    if out == RESULTS:
        plot.rewrite_readme(plot.README, RESULTS)
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return status


def measure_on_gpu(names: Sequence[str], only: str, out: Path) -> int:
    """Each op's GPU cases on the current GPU; those that the CSV holds for this commit stand.

    1 where an implementation of ours was refused or failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    status = 0
    with torch.device("cuda"):
        for name in names:
            path = out / f"{name}.csv"
            cases = [case for case in load(name).gpu if re.search(only, label(case))]
            for case in cases:
                if _recorded(path, case):
                    continue
                print(f"{name}, {torch.cuda.get_device_name()}: {label(case)}", flush=True)
                rows = measure(name, case, GPU_EFFORT, True, lambda x: print("   ", x))
                for row in rows:  # all at once: a case that was cut off is measured again, whole
                    _append(path, name, case, "default", row)
                    if "median_ms" in row:
                        print(f"    {row['provider']:28}{row['median_ms']:9.3f} ms", flush=True)
                    elif row["kind"] == "ours" and not row["status"].startswith("not here"):
                        status = 1
                torch.cuda.empty_cache()
            if path.exists():
                print(*plot.write(path), sep="\n")
    return status


# Of the whole suite, a minute or two: the GPU may be lent for ten.
GPU_EFFORT = Effort(most=30, least=5, seconds=4)


def _recorded(path: Path, case: Any) -> bool:
    if not path.exists():
        return False
    here = {**columns(case), "commit": machine()["commit"], "gpu": machine()["gpu"]}
    return any(all(row.get(k) == str(v) for k, v in here.items()) for row in plot.read(path))


def _measure_here(chosen: dict[str, list[Any]], malloc: str, quick: bool, out: Path) -> int:
    """Measures under this process's malloc; 1 where an implementation of ours was refused."""
    status = 0
    for name, cases in chosen.items():
        benchmark, begin = load(name), time.perf_counter()
        if malloc != "default" and not quick:
            cases = [case for case in cases if benchmark.tuned and benchmark.headline(case)]
        # The share of the op's time that these cases have, were they all alike.
        budget = benchmark.seconds * len(cases) / len(benchmark.cases)
        for i, case in enumerate(cases):
            print(f"{name} {i + 1}/{len(cases)}, {malloc} malloc: {label(case)}", flush=True)
            left = budget - (time.perf_counter() - begin)
            effort = Effort(seconds=max(left, 0) / (len(cases) - i))
            if quick:
                effort = Effort(most=5, seconds=0.5)
            # Memory is a property of the allocator that people have.
            try:
                rows = measure(name, case, effort, malloc == "default", lambda x: print("   ", x))
            except RuntimeError as reason:  # its inputs cannot be had: no network, no cache
                print(f"    not measured: {reason}")
                status = 1
                continue
            for row in rows:
                _append(out / f"{name}.csv", name, case, malloc, row)
                if "median_ms" in row:
                    print(f"    {row['provider']:28}{row['median_ms']:9.3f} ms", flush=True)
                elif row["kind"] == "ours":
                    status = 1
        print(f"{name}, {malloc} malloc: {time.perf_counter() - begin:.0f} s", flush=True)
    return status


def _append(path: Path, op: str, case: Any, malloc: str, row: dict[str, Any]) -> None:
    """One line, at once, so that a run that is stopped leaves what it has measured."""
    measured = {name: row.get(name, "") for name in plot.MEASURED}
    measured |= {k: f"{v:.4g}" for k, v in measured.items() if isinstance(v, float)}
    line = {
        "op": op,
        "kind": row["kind"],
        "provider": row["provider"],
        **columns(case),
        "malloc": malloc,
        **measured,
        "package": _versioned(row.get("package", "")),
        **machine(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, line)
        if fresh:
            writer.writeheader()
        writer.writerow(line)


def _versioned(package: str) -> str:
    return f"{package} {metadata.version(package)}" if package else ""


@functools.cache
def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", RECORDED)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu[1] if cpu else platform.processor(),
        **_gpu(),
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": int(bool(changes)),
    }


def _gpu() -> dict[str, str]:
    """Empty on a CPU."""
    if not on_gpu():
        return {"gpu": "", "cuda": "", "triton": ""}
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "triton": metadata.version("triton"),
    }


def _git(*args: str) -> str:
    """Empty outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return found.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
