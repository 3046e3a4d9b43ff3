"""What a compiled kernel takes and how it reaches memory, read from the compiler's output.

Registers and stack come from the binary itself. Triton's loads are read from PTX, where each is one
instruction of a fixed width that the assembler keeps (a test compares them with the machine code);
CUDA's are read from the machine code, because there the assembler may merge them.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDE = 128  # bits: the widest access that every target has


@dataclass(frozen=True)
class Usage:
    """Of one kernel, in registers and bytes a thread; shared memory in bytes a block. Loads and
    stores are those to global memory: how many instructions of each width in bits."""

    registers: int
    spills: int
    stack: int
    shared: int
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)

    @property
    def widest_load(self) -> int:
        return max(self.loads, default=0)

    @property
    def wide_percent(self) -> int:
        """The share of the loaded bits that come in wide accesses: a narrow stream beside a small
        table that is read in wide ones shows here."""
        bits = sum(width * count for width, count in self.loads.items())
        wide = sum(width * count for width, count in self.loads.items() if width >= WIDE)
        return 100 * wide // bits if bits else 0

    @property
    def loads_text(self) -> str:
        """ "16x2 128x4": two of 16 bits, four of 128."""
        return " ".join(f"{bits}x{count}" for bits, count in sorted(self.loads.items()))


def of_triton(compiled: Any) -> Usage:
    """Of a triton CompiledKernel."""
    assembly = compiled.asm
    if "amdgcn" in assembly:
        return of_amdgcn(assembly["amdgcn"], compiled.metadata.shared)
    registers, stack = _resources(assembly["cubin"])
    spills = _spills(assembly["ptx"]) if stack else 0  # a spilled register lies in the stack
    loads, stores = ptx_accesses(assembly["ptx"])
    return Usage(registers, spills, stack, compiled.metadata.shared, loads, stores)


def of_amdgcn(assembly: str, shared: int) -> Usage:
    """The assembly that the hsaco is made of ends with what the kernel takes."""

    def entry(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        assert found, f"no .{name} in the kernel's metadata"
        return int(found[1])

    loads, stores = amdgcn_accesses(assembly)
    spilled, stack = entry("vgpr_spill_count"), entry("private_segment_fixed_size")
    return Usage(entry("vgpr_count"), 4 * spilled, stack, shared, loads, stores)


def ptx_accesses(ptx: str) -> tuple[Counter[int], Counter[int]]:
    """(loads, stores) by width; a copy from global into shared memory is a load."""
    widths: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    access = r"\b(ld|st)\.(?:[\w:]+\.)*?global(?:\.[A-Za-z]\w*::\w+|\.nc|\.c[agvs]|\.wb|\.wt)*"
    for kind, vector, bits in re.findall(access + r"(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        widths[kind][int(vector or 1) * int(bits)] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global\S* \[.*?\], \[.*?\], (\w+)", ptx):
        widths["ld"][8 * int(size, 0)] += 1
    return widths["ld"], widths["st"]


def sass_accesses(sass: str) -> tuple[Counter[int], Counter[int]]:
    """(loads, stores) by width in NVIDIA's machine code."""
    widths: dict[str, Counter[int]] = {"LDG": Counter(), "LDGSTS": Counter(), "STG": Counter()}
    for kind, suffixes in re.findall(r"\b(LDGSTS|LDG|STG)((?:\.\w+)*) ", sass):
        names = suffixes.split(".")
        width = next((int(n.lstrip("US")) for n in names if re.fullmatch(r"[US]?\d+", n)), 32)
        widths[kind][width] += 1
    return widths["LDG"] + widths["LDGSTS"], widths["STG"]


def amdgcn_accesses(assembly: str) -> tuple[Counter[int], Counter[int]]:
    """(loads, stores) by width in AMD's machine code."""
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    access = r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?([su]?)(byte|short|dword)(?:x(\d))?"
    sizes = {"byte": 8, "short": 16, "dword": 32}
    for kind, _, unit, many in re.findall(access, assembly):
        widths[kind][sizes[unit] * int(many or 1)] += 1
    return widths["load"], widths["store"]


def disassembled(cubin: bytes | Path) -> dict[str, str]:
    """The machine code of each kernel in a cubin, by its (mangled) name."""
    code = _run("nvdisasm", "-ndf", "-c", cubin).stdout
    _, *parts = re.split(r"^//-+ \.text\.(\S+) +-+$", code, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@functools.cache
def tools() -> Path:
    """NVIDIA's tools, which come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel in a cubin."""
    said = _run("cuobjdump", "-res-usage", cubin).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, f"cuobjdump said: {said}"
    return int(found[1]), int(found[2])


def _spills(ptx: str) -> int:
    """Bytes that the assembler says it spills, when it assembles the kernel once more."""
    target = re.search(r"^\.target (sm_(\d+)\w*)", ptx, re.MULTILINE)
    assert target, "PTX without a target"
    assembler = "ptxas-blackwell" if int(target[2]) >= 100 else "ptxas"
    said = _run(assembler, "-v", f"--gpu-name={target[1]}", "-o", "/dev/null", ptx.encode()).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))


def _run(tool: str, *options: str | bytes | Path) -> subprocess.CompletedProcess[str]:
    """One of NVIDIA's tools; bytes among its options are given to it as a file."""
    with tempfile.TemporaryDirectory() as folder:

        def given(options: Iterable[str | bytes | Path]) -> Iterable[str]:
            for option in options:
                if isinstance(option, bytes):
                    path = Path(folder, "input")
                    path.write_bytes(option)
                    option = path
                yield str(option)

        command = [str(tools() / tool), *given(options)]
        return subprocess.run(command, capture_output=True, text=True, check=True)
