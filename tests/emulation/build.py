"""`python -m tests.emulation.build`: the CUDA kernels as a library for the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "build" / "emulation" / "_cuda.so"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = [
    "-x", "c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-I", ROOT / "csrc/include", "-include", ROOT / "tests/emulation/cuda_emulation.h",
]  # fmt: skip
PLAIN = ["-O2"]


def compile_emulated(target: Path, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Each file on its own, two at a time: the kernels are mostly templates."""
    objects = [target.with_name(f"{target.stem}-{source.stem}.o") for source in sources]
    waiting = list(zip(sources, objects, strict=True))
    while waiting:
        batch, waiting = waiting[:2], waiting[2:]
        running = [
            subprocess.Popen([COMPILER, *FLAGS, *flags, "-fPIC", "-c", source, "-o", out])
            for source, out in batch
        ]
        assert [process.wait(timeout=300) for process in running] == [0] * len(running)
    kind = [] if target.suffix == "" else ["-shared"]
    subprocess.run([COMPILER, *flags, *kind, *objects, "-o", target], check=True, timeout=300)
    return target


def library() -> Path:
    """The one in build/, made anew where a source is younger."""
    read = [
        *ROOT.glob("csrc/cuda/*"),
        *ROOT.glob("csrc/include/*"),
        *ROOT.glob("tests/emulation/*"),
    ]
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > max(p.stat().st_mtime for p in read):
        return LIBRARY
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LIBRARY.parent) as folder:  # two may build at once
        return compile_emulated(Path(folder) / LIBRARY.name, KERNELS, PLAIN).replace(LIBRARY)


if __name__ == "__main__":
    print(library())
