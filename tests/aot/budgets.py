"""What each GPU kernel may take on each target, checked in as budgets.csv.

`python -m tests.aot.budgets --update` compiles everything and writes the file anew: a little room
above what was measured, so that another compiler version passes and a regression does not. Spills
and narrow loads of a streaming kernel get no room: they are printed, and mended in the kernel.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.aot import compile_cuda, inspect_kernel
from tests.aot.rows import Row, read

PATH = Path(__file__).with_name("budgets.csv")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
Key = tuple[str, str, str]  # kernel, target, dtype

# The kernels that read the model's rows and their forms that do, by what their configuration says.
# Memory bounds them, so each loads 128 bits at a time wherever rows begin at multiples of 16 bytes.
STREAMING = {
    "attention_mass.row_scores_kernel": "",
    "attention_mass.statistics_kernel": "",
    "attention_mass.mass_kernel": "",
    "span_com.chunks_kernel": "",
    "span_com.spans_kernel": "",
    "span_com.grad_hidden_kernel": "",
    "span_com.grad_weights_kernel": "",
    "linear_span_kl.tile_statistics_kernel": "",
    "linear_span_kl.tile_divergence_kernel": "",
    "span_geometry.lengths_kernel": "",
    "span_geometry.samples_kernel": "",
    "span_geometry.pull_kernel": "",
    "span_geometry.gradient_kernel": "",
    "span_kl.span_kl_kernel": r"\bSTAGE=[012]\b",
    "attention_mass.cu.score_run": "",
    "linear_span_kl.cu.scale_rows": "",
    "span_com.cu.sum_spans": "",
    "span_com.cu.gather_rows": "",
    "span_com.cu.weigh_rows": "",
    "span_geometry.cu.geometry": "",
    "span_kl.cu.span_kl_rows": "",
}

# Shared memory of one block, in bytes.
LARGEST_BLOCK = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Budget:
    kernel: str
    target: str
    dtype: str
    registers: int
    spills: int  # bytes a thread, of the forms that may_spill
    shared: int  # bytes a block
    load: int  # bits that the widest load must have; 0: does not matter

    @property
    def key(self) -> Key:
        return self.kernel, self.target, self.dtype

    @property
    def of_cuda(self) -> bool:
        return ".cu." in self.kernel


def refusals(rows: Iterable[Row], budgets: Mapping[Key, Budget]) -> list[str]:
    """What is wrong with the kernels that were compiled, one line each; none if all is well."""
    wrong = []
    groups = by_key(rows)
    for key, group in groups.items():
        name = " ".join(key)
        if key not in budgets:
            wrong.append(f"{name}: no budget")
            continue
        budget = budgets[key]
        for row in group:
            what = f"{name} ({row.case}; {row.config})"
            for field in ("registers", "spills", "shared"):
                used, allowed = getattr(row, field), getattr(budget, field)
                if field == "spills" and not may_spill(row):
                    allowed = 0
                if used > allowed:
                    wrong.append(f"{what}: {used} {field}, {allowed} allowed")
            if row.shared > LARGEST_BLOCK[row.target]:
                wrong.append(f"{what}: {row.shared} shared, more than the hardware has")
            if row.overflows:
                wrong.append(f"{what}: an address needs 64 bits: {row.overflows}")
        for row in streams(group):
            if row.load < budget.load:
                what = f"{name} ({row.case}; {row.config})"
                wrong.append(f"{what}: loads {row.load} bits at most, {budget.load} required")
    wrong += [f"{' '.join(key)}: a budget, but no such kernel" for key in budgets.keys() - groups]
    return wrong


def may_spill(row: Row) -> bool:
    """Rows that begin at no multiple of 16 bytes take more addresses, float64 twice the registers,
    and softcaps on both sides of "jsd" a tangent and its slope for each: by so much, and in all
    other forms not at all."""
    capped = re.search(r"\bDIRECTION=2\b.*CAP=True", row.config) is not None
    return not row.aligned or row.dtype == "float64" or capped


def streams(group: Iterable[Row]) -> list[Row]:
    """The launches whose loads matter: those that read aligned rows of the model. A CUDA kernel
    chooses its loads as it runs, or has an instance for each way, so there the widest counts."""
    form = [r for r in group if r.aligned and re.search(STREAMING.get(r.kernel, ""), r.config)]
    return [max(form, key=lambda r: r.load)] if form and ".cu." in form[0].kernel else form


def by_key(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row.kernel, row.target, row.dtype].append(row)
    return dict(groups)


def measured(rows: Iterable[Row]) -> list[Budget]:
    """Budgets with a little room."""
    return [
        Budget(
            kernel, target, dtype,
            registers=-(-max(row.registers for row in group) // 8) * 8 + 8,
            spills=max((row.spills for row in group if may_spill(row)), default=0),
            shared=-(-max(row.shared for row in group) // 1024) * 1024,
            load=widest(kernel, target),
        )
        for (kernel, target, dtype), group in sorted(by_key(rows).items())
    ]  # fmt: skip


def widest(kernel: str, target: str) -> int:
    """A wave of AMD has 64 lanes: 64 bits of each are as many bytes at once as 128 of a warp's."""
    if kernel not in STREAMING:
        return 0
    return inspect_kernel.WIDE if target.startswith("sm_") else inspect_kernel.WIDE // 2


def read_budgets(path: Path = PATH) -> dict[Key, Budget]:
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    budgets = []
    for line in lines:
        sizes = (int(line[name] or 0) for name in ("registers", "spills", "shared", "load"))
        budgets.append(Budget(line["kernel"], line["target"], line["dtype"], *sizes))
    return {budget.key: budget for budget in budgets}


def write_budgets(budgets: Iterable[Budget], path: Path = PATH) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(Budget)])
        for budget in budgets:
            writer.writerow([*dataclasses.astuple(budget)[:-1], budget.load or ""])


def compile_all(folder: Path, runs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Runs each (program, target), two at a time, in a process of its own: what each complained of.
    Its rows lie in `rows_of(folder, program, target)`."""

    def complaint(run: tuple[str, str]) -> str:
        program, target = run
        command = [sys.executable, "-m", f"tests.aot.{program}", target]
        command += ["--csv", str(rows_of(folder, program, target))]
        done = subprocess.run(
            command, cwd=PATH.parents[2], env=environment(), capture_output=True, text=True
        )
        return (done.stderr or f"exit status {done.returncode}") if done.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(runs, pool.map(complaint, runs), strict=True))


def rows_of(folder: Path, program: str, target: str) -> Path:
    return folder / f"{program}.{target}.csv"


def environment() -> dict[str, str]:
    """One thread, and no interpreter: it and the compiler cannot live in one process."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "OMP_NUM_THREADS": "1"}


def programs() -> list[tuple[str, str]]:
    """The long ones first, so that two workers end together."""
    triton = [("compile_triton", target) for target in TARGETS]
    cuda = [("compile_cuda", target) for target in compile_cuda.TARGETS]
    return triton + (cuda if compile_cuda.compiler() else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write budgets.csv anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        complaints = compile_all(Path(folder), programs())
        paths = [rows_of(Path(folder), *program) for program in programs()]
        rows = [row for path in paths if path.exists() for row in read(path)]
    unseen = {}  # without nvcc, what CUDA may take stays as it is
    if PATH.exists() and not compile_cuda.compiler():
        unseen = {key: budget for key, budget in read_budgets().items() if budget.of_cuda}
    if options.update:
        write_budgets(sorted([*measured(rows), *unseen.values()], key=lambda budget: budget.key))
    wrong = [text for text in complaints.values() if text]
    checked = {key: budget for key, budget in read_budgets().items() if key not in unseen}
    wrong += refusals(rows, checked)
    print(*wrong, f"{len(rows)} kernels compiled", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
