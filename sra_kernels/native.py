"""Loads the libraries built from csrc/ by ctypes. Each op's cpu.py and cuda.py fill its params.

Nothing here raises at import: a library that is missing leaves its reason in `problem`, or in
`cuda_problem`, and another backend serves.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

ABI = 5
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
OK, LAUNCH_FAILED = 0, 6
# Other builds of csrc/cpu and csrc/cuda: with a sanitizer, say, or the CUDA kernels on a CPU.
CPU_VARIABLE, CUDA_VARIABLE = "SRA_KERNELS_CPU_LIBRARY", "SRA_KERNELS_CUDA_LIBRARY"
COMPILERS = {"_cpu.so": "C++ compiler", "_cuda.so": "CUDA compiler"}


def _load(name: str, variable: str, version: str) -> tuple[ctypes.CDLL | None, str]:
    path = Path(os.environ.get(variable) or Path(__file__).with_name(name))
    if not path.exists():
        compiler = "g++" if name == "_cpu.so" else "the CUDA toolkit (nvcc)"
        return None, (
            f"{path.name} was not built: there was no {COMPILERS[name]} at install, or it failed, "
            f"or SRA_KERNELS_BUILD left it out. Install {compiler} and run `pip install .` again, "
            f"with SRA_KERNELS_BUILD={name[1:-3]} to see why it fails."
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, (
            f"{path.name} did not load: {error}. Run `pip install .` again on this machine."
        )
    if getattr(library, version)() != ABI:
        return None, f"{path.name} is of another version of sra_kernels. Run `pip install .` again."
    return library, ""


cpu, problem = _load("_cpu.so", CPU_VARIABLE, "sra_kernels_abi")


cuda, cuda_problem = _load("_cuda.so", CUDA_VARIABLE, "sra_cuda_abi")
# The CUDA kernels may be a build that runs on the CPU (tests/emulation).
emulated = cuda is not None and cuda.sra_cuda_emulated() == 1


def stream(x: Tensor) -> int:
    """The current stream of x's device; 0 in emulation."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def cuda_runs() -> str:
    """What the driver says against running the CUDA library on the current GPU; "" for nothing."""
    assert cuda is not None
    return "" if cuda.sra_cuda_runs() == OK else _cuda_error()


def _cuda_error() -> str:
    assert cuda is not None
    cuda.sra_cuda_error.restype = ctypes.c_char_p
    return cuda.sra_cuda_error().decode()


def cpu_call(function: str, params: ctypes.Structure) -> int:
    """Runs sra_<function>(params); gives its status."""
    assert cpu is not None
    return getattr(cpu, f"sra_{function}")(ctypes.byref(params))


def cuda_call(function: str, params: ctypes.Structure, like: Tensor, *more: int | None) -> None:
    """Launches sra_cuda_<function>(params, *more, workspace, stream) on the device of `like`.

    Kernels allocate nothing: what sra_cuda_<op>_workspace asks for comes from torch's allocator.
    """
    assert cuda is not None
    size = getattr(cuda, f"sra_cuda_{function.rpartition('_')[0]}_workspace", None)
    workspace = None
    if size is not None:
        size.restype = ctypes.c_int64
        workspace = like.new_empty(size(ctypes.byref(params)), dtype=torch.uint8)
    pointers = (*more, address(workspace), stream(like))
    status = getattr(cuda, f"sra_cuda_{function}")(
        ctypes.byref(params), *(ctypes.c_void_p(x) for x in pointers)
    )
    if status == LAUNCH_FAILED:
        raise RuntimeError(f"{function} did not start: {_cuda_error()}.")
    if status != OK:
        raise RuntimeError(f"{function} refused its arguments with status {status}.")


# Runs sra_<function>, or sra_cuda_<function>, on params, on the device of the tensor.
Launch: TypeAlias = Callable[[str, ctypes.Structure, Tensor], None]


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
