"""Memory that is freed stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from sra.allocator import give_back_memory, keep_freed_memory
from sra.progress import resident
from sra import allocator
allocator.PLENTY = 1 << 60 if sys.argv[1] == "little" else 0
if sys.argv[1] != "leave":
    keep_freed_memory()
import torch
parts = [torch.ones(1 << 20) for _ in range(50)]
before = resident("VmRSS")
del parts
print(before - resident("VmRSS"))
give_back_memory()
print(before - resident("VmRSS"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is a library of Linux")
def test_what_is_freed_is_kept():
    (kept, given), (left, _), (little, _) = (
        map(int, subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True,
                                text=True, check=True).stdout.split())
        for how in ("keep", "leave", "little")
    )  # fmt: skip
    assert kept < 20 << 20
    assert left > 100 << 20
    assert little > 100 << 20  # of a machine that has none to spare
    assert given > 100 << 20
