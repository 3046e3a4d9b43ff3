"""Which implementation runs: chosen for each call from the device, overridden by `use_backend`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sra_kernels import interpreter, native

NAMES = ("auto", "cpu", "torch", "triton", "cuda", "interpreter", "reference")
VARIABLE = "SRA_KERNELS_BACKEND"

OLDEST = 8, 0  # compute capability: before it there is too little shared memory for the tiles

# In each op's folder, the module that holds a backend. Each has a `plan` for `explain`.
MODULES = {
    "cpu": "cpu",
    "torch": "portable",
    "triton": "triton",
    "cuda": "cuda",
    "interpreter": "triton",
}


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"There is no backend {name!r}. Choose one of {', '.join(NAMES)}.")
    return name


_current = _checked(os.environ.get(VARIABLE, "auto"))


def current() -> str:
    """The name given to the innermost `use_backend`, or in SRA_KERNELS_BACKEND, or "auto"."""
    return _current


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside on one backend, in every thread of the process.

    "auto" picks the fastest that is available for the tensors' device. "cpu" is the C++ library,
    "triton" and "cuda" are the GPU kernels, "torch" is made of torch operations and runs on any
    device. "interpreter" runs the Triton kernels on CPU tensors, very slowly, and "reference" is
    the eager code that the tests compare with, differentiated by torch itself. A backend that
    cannot serve a call raises, with the reason: nothing falls back silently.
    """
    global _current
    before, _current = _current, _checked(name)
    try:
        yield
    finally:
        _current = before


@dataclass(frozen=True)
class Availability:
    available: bool
    reason: str

    def __str__(self) -> str:
        return ("yes: " if self.available else "no: ") + self.reason


SERVES = {
    "cpu": "C++ for tensors on the CPU",
    "triton": "Triton for tensors on a GPU",
    "cuda": "CUDA for tensors on a GPU",
    "torch": "torch operations, any device",
    "interpreter": "the Triton kernels in Python for tensors on the CPU, for tests",
    "reference": "eager code for comparison, any device",
}
DEVICES = {"cpu": "cpu", "interpreter": "cpu", "triton": "cuda", "cuda": "cuda"}


def backends() -> dict[str, Availability]:
    """What is available in this installation and, if not, why."""
    return {
        name: Availability(not missing(name), missing(name) or serves)
        for name, serves in SERVES.items()
    }


def missing(name: str) -> str:
    """Why a backend is not available in this installation; "" if it is."""
    if name == "cpu":
        return native.problem
    if name == "triton":
        return _no_triton() or _no_gpu()
    if name == "cuda":
        return native.cuda_problem or ("" if native.emulated else _no_gpu() or _no_code())
    return _no_triton() if name == "interpreter" else ""


@functools.cache
def _no_triton() -> str:
    found = importlib.util.find_spec("triton")
    return "" if found else "Triton is not installed. A torch for GPUs brings it along"


@functools.cache
def _no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine"
    # AMD's count otherwise.
    capability = OLDEST if torch.version.hip else torch.cuda.get_device_capability()
    if capability >= OLDEST:
        return ""
    found, needed = (".".join(map(str, x)) for x in (capability, OLDEST))
    name = torch.cuda.get_device_name()
    return f"{name} has compute capability {found}, and the kernels need {needed}"


@functools.cache
def _no_code() -> str:
    said = native.cuda_runs()
    return said and (
        f"_cuda.so holds no code that this GPU and its driver run ({said}). Run `pip install .` "
        "again with a CUDA toolkit that knows both"
    )


def select(op: str, device: torch.device) -> tuple[str, str]:
    """The backend that serves `op` on `device`, and why; raises when the chosen one cannot."""
    wanted = current()
    if wanted == "auto":
        return _fastest(device)
    why = missing(wanted) or _elsewhere(wanted, device)
    if wanted == "interpreter" and not why:
        why = interpreter.problem()
    if not why:
        return wanted, f"use_backend({wanted!r}) or {VARIABLE}"
    mend = "Use use_backend('auto')"
    if wanted == "triton" and device.type == "cpu":
        mend += ", or 'interpreter' to run the same kernels on a CPU, very slowly"
    raise RuntimeError(f"The backend {wanted!r} was asked for {op}, but {why.rstrip('.')}. {mend}.")


def _fastest(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        if native.cpu is not None:
            return "cpu", "tensors on the CPU, and the C++ library is loaded"
        return "torch", native.problem
    why = missing("triton") or _elsewhere("triton", device)
    return ("torch", why) if why else ("triton", "tensors on a GPU")


def _elsewhere(name: str, device: torch.device) -> str:
    serves = "cpu" if name == "cuda" and native.emulated else DEVICES.get(name, device.type)
    return "" if device.type == serves else f"the tensors are on {device.type}, not on {serves}"


@dataclass(frozen=True)
class Plan:
    """How a call would run. `peak_bytes` is the prediction above inputs, gradients included."""

    op: str
    backend: str
    reason: str
    chunk: str
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.op}: {self.backend} ({self.reason}); {self.chunk}; "
            f"peak {self.peak_bytes / 2**20:.1f} MiB above the inputs"
        )


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """Say how `op(*args, **kwargs)` would run, without running it.

    The tensors may live on the "meta" device: only shapes and dtypes are read.

    >>> print(explain(span_com, torch.empty(8192, 2048, device="meta"), spans))
    """
    name = op.__name__
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    chosen, reason = select(name, torch.device("cpu") if device.type == "meta" else device)
    serving = MODULES.get(chosen, "portable")
    module: ModuleType = importlib.import_module(f"sra_kernels.{name}.{serving}")
    chunk, peak = module.plan(*args, **kwargs)
    return Plan(name, chosen, reason, chunk, peak)
