"""Memory that is freed stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from sra.allocator import keep_freed_memory
from sra.progress import resident
keep = sys.argv[1] == "keep"
if keep:
    keep_freed_memory()
import torch
parts = [torch.ones(1 << 20) for _ in range(50)]
before = resident("VmRSS")
del parts
print(before - resident("VmRSS"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is a library of Linux")
def test_what_is_freed_is_kept():
    freed = [
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True,
                           check=True).stdout)
        for how in ("keep", "leave")
    ]  # fmt: skip
    assert freed[0] < 20 << 20
    assert freed[1] > 100 << 20
