"""Compiles every kernel of csrc/cuda for one GPU, without one, and with warnings as errors.

`python -m tests.aot.compile_cuda sm_90` prints a row for each instance of each kernel, as
compile_triton does. Where the sources choose between wide and narrow loads as they run, both are
in the same kernel.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.aot import inspect_kernel
from tests.aot.rows import Row, show, write

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90", "sm_100")
FLAGS = (
    "-O3", "-std=c++17", f"-I{ROOT / 'csrc' / 'include'}",
    "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v",
)  # fmt: skip
DTYPES = {
    "float": "float32",
    "double": "float64",
    "__nv_bfloat16": "bfloat16",
    "__half": "float16",
}


def compiler() -> str | None:
    """nvcc: from NVCC, or the PATH, or where its installer puts it."""
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")


def compiled(source: Path, target: str) -> Iterator[Row]:
    nvcc = compiler()
    assert nvcc, "no nvcc: set NVCC"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, *FLAGS, f"-arch={target}", "-cubin", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} for {target}:\n{done.stderr}")
        if "Compiling entry function" not in done.stderr:
            return  # no kernel in it
        code = inspect_kernel.disassembled(cubin)
    mangled = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    names = dict(zip(mangled, demangled(mangled), strict=True))
    # The assembler first says what it compiles, then what that takes.
    for part in done.stderr.split("Compiling entry function '")[1:]:
        symbol = part.partition("'")[0]
        loads, _ = inspect_kernel.sass_accesses(code[symbol])
        usage = inspect_kernel.Usage(
            registers=_number(r"Used (\d+) registers", part),
            spills=_number(r"(\d+) bytes spill stores", part)
            + _number(r"(\d+) bytes spill loads", part),
            stack=_number(r"(\d+) bytes stack frame", part),
            shared=_number(r"(\d+) bytes smem", part),
            loads=loads,
        )
        name, instance = split_name(names[symbol])
        yield Row(
            target=target,
            kernel=f"{source.stem}.cu.{name}",
            dtype=next((DTYPES[t] for t in instance.split(", ") if t in DTYPES), "any"),
            case="",
            config=instance,
            registers=usage.registers,
            spills=usage.spills,
            stack=usage.stack,
            shared=usage.shared,
            aligned=True,
            load=usage.widest_load,
            wide_percent=usage.wide_percent,
            loads=usage.loads_text,
            overflows="",
        )


def demangled(names: list[str]) -> list[str]:
    said = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    return said.splitlines()


def split_name(signature: str) -> tuple[str, str]:
    """("score_run", "float, 4") of "void sra::score_run<float, 4>(sra_attention_mass)"."""
    signature = signature.replace("(anonymous namespace)::", "")
    found = re.search(r"(\w+)(?:<(.*?)>)?\(", signature)
    assert found, signature
    instance = re.sub(r"\((?:int|bool|long)\)", "", found[2] or "")
    return found[1], instance


def kernels_in(source: str) -> set[str]:
    """The names of the __global__ functions of a source file."""
    bounds = r"(?:__launch_bounds__\s*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*)?"
    return set(re.findall(rf"__global__\s+(?:void\s+{bounds}|{bounds}void\s+)(\w+)\s*\(", source))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--csv", help="write the rows there instead of printing a table")
    options = parser.parse_args()
    rows: list[Row] = []
    failed = False
    for source in sorted(SOURCES.glob("*.cu")):
        try:
            rows += compiled(source, options.target)
        except RuntimeError as error:
            failed = True
            print(error, file=sys.stderr)
    if options.csv:
        write(options.csv, rows)
    else:
        show(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
