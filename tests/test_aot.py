"""Every GPU kernel, compiled for real targets without a GPU and held to checked-in budgets.

Each target is compiled in a process of its own (tests/aot), and these tests read what they wrote.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it brings the compilers")

from tests.aot import budgets, compile_cuda
from tests.aot.rows import Row, read

ROOT = Path(__file__).parents[1]
MEASURED_WITH = "3.8."  # another compiler takes other registers
needs_nvcc = pytest.mark.skipif(
    compile_cuda.compiler() is None, reason="no nvcc: set NVCC, or put it on the PATH"
)
# All targets take nine minutes of a core: `make test` compiles for some, `make aot` for all.
CHOSEN = os.environ.get("SRA_TEST_TARGETS", " ".join(budgets.TARGETS)).split()
TRITON = [target for target in budgets.TARGETS if target in CHOSEN]
CUDA = [target for target in compile_cuda.TARGETS if target in CHOSEN]
PROGRAMS = [
    pytest.param(*program, marks=needs_nvcc if program[0] == "compile_cuda" else ())
    for program in budgets.programs()
    if program[1] in CHOSEN
]


class Compiled:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        wanted = [program for program in budgets.programs() if program[1] in CHOSEN]
        self.complaints = budgets.compile_all(folder, wanted)

    def rows(self, program: str, target: str) -> list[Row]:
        complaint = self.complaints[program, target]
        assert not complaint, complaint
        return read(budgets.rows_of(self.folder, program, target))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("aot"))


@pytest.mark.parametrize(("program", "target"), PROGRAMS)
def test_every_kernel_keeps_within_its_budget(compiled, program, target):
    if program == "compile_triton" and not metadata.version("triton").startswith(MEASURED_WITH):
        pytest.skip(f"the budgets are those of Triton {MEASURED_WITH}x alone")
    rows = compiled.rows(program, target)
    own = {
        key: budget
        for key, budget in budgets.read_budgets().items()
        if budget.target == target and budget.of_cuda == (program == "compile_cuda")
    }
    wrong = budgets.refusals(rows, own)
    assert not wrong, "\n".join(wrong)
    print(f"{target}: {len(rows)} kernels compiled by {program}")


@pytest.mark.parametrize("target", TRITON)
def test_no_triton_kernel_is_forgotten(compiled, target):
    kernels = {row.kernel for row in compiled.rows("compile_triton", target)}
    assert kernels == launched_kernels(ROOT / "sra_kernels")


@needs_nvcc
@pytest.mark.parametrize("target", CUDA)
def test_no_cuda_kernel_is_forgotten(compiled, target):
    kernels = {row.kernel.rpartition(".")[2] for row in compiled.rows("compile_cuda", target)}
    files = [*compile_cuda.SOURCES.glob("*.cu*"), *compile_cuda.SOURCES.glob("*.h")]
    assert kernels == set().union(*(compile_cuda.kernels_in(path.read_text()) for path in files))


def launched_kernels(package: Path) -> set[str]:
    """The `@triton.jit` functions that no other one uses: they are launched, or dead."""
    kernels: dict[str, set[str]] = {}  # by op
    used: set[str] = set()
    for path in package.rglob("*.py"):
        op = path.relative_to(package).parts[0]
        for function in ast.parse(path.read_text()).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            if any("triton.jit" in ast.unparse(d) for d in function.decorator_list):
                kernels.setdefault(op, set()).add(function.name)
                used |= {x.id for x in ast.walk(function) if isinstance(x, ast.Name)}
                used |= {x.attr for x in ast.walk(function) if isinstance(x, ast.Attribute)}
    return {f"{op}.{name}" for op, names in kernels.items() for name in names - used}


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> list[Row]:
    path = tmp_path_factory.mktemp("planted") / "rows.csv"
    subprocess.run(
        [sys.executable, "-m", "tests.aot.planted", "sm_90", str(path)],
        cwd=ROOT, env=budgets.environment(), check=True,
    )  # fmt: skip
    return read(path)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("right", None),
        ("right, far apart", None),
        ("few rows", None),  # in 32 bits, but of so few rows that these suffice
        ("far apart", None),  # the stride itself is of 64 bits, and so is its product
        ("narrow", "loads 16 bits at most"),
        ("overflowing", "an address needs 64 bits"),
        ("widened late", "an address needs 64 bits"),
        ("spilling", "spills"),
    ],
)
def test_a_planted_fault_is_refused(planted, case, said):
    rows = [row for row in planted if row.case == case]
    (row,) = rows
    budget = budgets.Budget(row.kernel, row.target, row.dtype, 255, spills=0, shared=0, load=128)
    wrong = budgets.refusals(rows, {budget.key: budget})
    assert len(wrong) == (said is not None), wrong
    assert said is None or said in wrong[0]


def test_budgets_are_neither_missing_nor_stale(planted):
    rows = [row for row in planted if row.case == "right"]
    assert "no budget" in budgets.refusals(rows, {})[0]
    stale = {budget.key: budget for budget in budgets.measured(rows)}
    assert "no such kernel" in budgets.refusals([], stale)[0]
    assert not budgets.refusals(rows, stale)


def test_every_streaming_kernel_has_a_budget():
    assert {budget.kernel for budget in budgets.read_budgets().values()} >= {*budgets.STREAMING}


@needs_nvcc
def test_a_spill_in_cuda_is_refused(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) centred(const float* x, float* out) {\n"
        "  float row[64], sum = 0;  // of at most 32 registers\n"
        "  for (int i = 0; i < 64; ++i) sum += row[i] = x[i * 1024 + threadIdx.x];\n"
        "  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = row[i] - sum;\n"
        "}\n"
    )
    (row,) = compile_cuda.compiled(source, "sm_90")
    assert row.spills > 0
    assert row.registers == 32
    (budget,) = budgets.measured([row])
    assert "spills, 0 allowed" in budgets.refusals([row], {budget.key: budget})[0]


@needs_nvcc
def test_a_warning_in_cuda_is_an_error(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text("__global__ void unused(float* out) { int never; out[0] = 1; }\n")
    with pytest.raises(RuntimeError, match="never"):
        list(compile_cuda.compiled(source, "sm_90"))
