"""Loads the libraries built from csrc/ by ctypes. Each op's cpu.py fills its params struct.

Nothing here raises at import: a library that is missing leaves its reason in `problem`, and the
torch backend serves.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

ABI = 3
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
OK = 0
VARIABLE = "SRA_KERNELS_CPU_LIBRARY"  # another build of csrc/cpu: with a sanitizer, say


def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    if not path.exists():
        return None, (
            f"{path.name} was not built: there was no C++ compiler at install, or "
            "SRA_KERNELS_BUILD=none. Install g++ and run `pip install .` again."
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, (
            f"{path.name} did not load: {error}. Run `pip install .` again on this machine."
        )
    if library.sra_kernels_abi() != ABI:
        return None, f"{path.name} is of another version of sra_kernels. Run `pip install .` again."
    return library, ""


cpu, problem = _load(Path(os.environ.get(VARIABLE) or Path(__file__).with_name("_cpu.so")))


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def rows(x: Tensor) -> Tensor:
    """x itself where its rows lie contiguous, at whatever stride from each other."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def prefer_huge_pages(x: Tensor) -> Tensor:
    """x, for whose memory the system is asked for huge pages: the first touch of fresh memory costs
    more than most arithmetic. Advice alone, and none where x is not on a CPU."""
    if cpu is not None and x.device.type == "cpu":
        cpu.sra_prefer_huge_pages(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.nbytes))
    return x
