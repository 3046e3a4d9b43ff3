"""`--base REV`: ours at another commit beside ours in the working tree, in alternating processes.

Both run the working tree's benchmarks: only `sra_kernels` and `sra` come from the other commit, out
of a temporary folder with its own build.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Effort, Refused, interleave, verify
from benchmarks.plot import number, table
from benchmarks.registry import Absent, label, load

ROOT = Path(__file__).parents[1]
PACKAGES = ("sra_kernels", "sra")
ROUNDS = 3  # processes of each side
EFFORT = Effort(most=15, least=3, seconds=0.5)

Times = dict[tuple[str, str], float | str]  # (op, case) -> milliseconds, or why there are none


def compare(revision: str, chosen: dict[str, list[Any]]) -> str:
    """A Markdown table: medians of both sides over all processes, and base over working tree."""
    wanted = [(name, label(case)) for name, cases in chosen.items() for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        _check_out(revision, tree)
        _build(tree)
        sides = {revision: tree, "working tree": ROOT}
        paths = {side: _path(Path(folder), i, at) for i, (side, at) in enumerate(sides.items())}
        rounds: dict[str, list[Times]] = {side: [] for side in sides}
        for _ in range(ROUNDS):
            for side, path in paths.items():
                rounds[side].append(_measured(path, wanted))
    lines = []
    for at in wanted:
        found = [[times[at] for times in rounds[side]] for side in sides]
        reasons = [x for side in found for x in side if isinstance(x, str)]
        if reasons:
            lines.append([*at, reasons[0], "", "", ""])
            continue
        base, here = ([float(x) for x in side] for side in found)
        ratios = [b / h for b, h in zip(base, here, strict=True)]
        lines.append(
            [
                *at,
                *(number(statistics.median(side)) for side in (base, here)),
                f"{statistics.median(ratios):.2f}×",
                f"{min(ratios):.2f} – {max(ratios):.2f}",
            ]
        )
    head = ["op", "case", f"{revision}, ms", "working tree, ms", "as fast", "over the rounds"]
    return "\n".join(table(head, lines, 2))


def _check_out(revision: str, tree: Path) -> None:
    """Its files alone: unlike a `git worktree`, a run that is killed leaves nothing in .git."""
    done = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"git has no {revision!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        files.extractall(tree, filter="data")


def _build(tree: Path) -> None:
    """In place; without a compiler that commit runs on its torch backend, as it would elsewhere."""
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The other commit does not build: {done.stderr.strip()[-500:]}")


def _path(folder: Path, i: int, packages: Path) -> Path:
    """A folder that offers one side's packages and the working tree's benchmarks."""
    path = folder / f"path{i}"
    path.mkdir()
    for name in PACKAGES:
        (path / name).symlink_to(packages / name)
    (path / "benchmarks").symlink_to(ROOT / "benchmarks")
    return path


def _measured(path: Path, wanted: list[tuple[str, str]]) -> Times:
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(path), inherited])),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare"],
        cwd=path, env=environment, input=json.dumps(wanted), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"A process of the comparison failed: {done.stderr.strip()[-500:]}")
    return {(op, case): time for op, case, time in json.loads(done.stdout.splitlines()[-1])}


def _time(op: str, wanted: str) -> float | str:
    """Of ours here, verified first."""
    try:
        benchmark = load(op)
    except ImportError as reason:
        return f"not in that commit: {reason}"
    case = next(c for c in (*benchmark.cases, *benchmark.small) if label(c) == wanted)
    try:
        data = benchmark.inputs(case)
        job = benchmark.providers["ours"](data)
        exact = benchmark.exact(data) if benchmark.exact else None
        verify(job, exact, benchmark.tolerance(case))
    except (Refused, Absent, RuntimeError) as reason:
        return f"not timed: {reason}".splitlines()[0]
    return float(interleave({"ours": job}, EFFORT)["ours"].median())


if __name__ == "__main__":
    print(json.dumps([[op, case, _time(op, case)] for op, case in json.load(sys.stdin)]))
