"""Which implementation runs: chosen for each call from the device, overridden by `use_backend`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sra_kernels import native

NAMES = ("auto", "cpu", "torch", "triton", "cuda", "reference")
VARIABLE = "SRA_KERNELS_BACKEND"

# In each op's folder, the module that holds a backend. Each has a `plan` for `explain`.
MODULES = {"cpu": "cpu", "torch": "portable"}


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

    "auto" picks the fastest that is available for the tensors' device; "cpu" is the C++ library;
    "torch" is made of torch operations and runs on any device; "reference" is the eager code that
    the tests compare with, differentiated by torch itself. A backend that cannot serve a call
    raises, with the reason: nothing falls back silently.
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


def backends() -> dict[str, Availability]:
    """What is available in this installation and, if not, why."""
    pending = "this release has no GPU kernels yet; on a GPU the torch backend serves"
    return {
        "cpu": Availability(native.cpu is not None, native.problem or "C++ for tensors on the CPU"),
        "triton": Availability(False, pending),
        "cuda": Availability(False, pending),
        "torch": Availability(True, "torch operations, any device"),
        "reference": Availability(True, "eager code for comparison, any device"),
    }


def select(op: str, device: torch.device) -> tuple[str, str]:
    """The backend that serves `op` on `device`, and why; raises when the chosen one cannot."""
    wanted = current()
    in_cpp = native.cpu is not None and device.type == "cpu"
    if wanted == "auto":
        if in_cpp:
            return "cpu", "tensors on the CPU, and the C++ library is loaded"
        if device.type != "cpu":
            return "torch", f"no kernel of ours for {device.type} yet"
        return "torch", native.problem
    if wanted in ("torch", "reference") or (wanted == "cpu" and in_cpp):
        return wanted, f"use_backend({wanted!r}) or {VARIABLE}"
    status = backends()[wanted]
    why = status.reason if not status.available else f"it does not serve {op} on {device.type}"
    raise RuntimeError(
        f"The backend {wanted!r} was asked for {op}, but {why}. Use use_backend('auto')."
    )


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
    import importlib

    name = op.__name__
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    chosen, reason = select(name, torch.device("cpu") if device.type == "meta" else device)
    serving = MODULES.get(chosen, "portable")
    module: ModuleType = importlib.import_module(f"sra_kernels.{name}.{serving}")
    chunk, peak = module.plan(*args, **kwargs)
    return Plan(name, chosen, reason, chunk, peak)
