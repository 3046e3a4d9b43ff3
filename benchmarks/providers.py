"""How providers are made: a differentiated job, one backend of ours, torch.compile, a rival."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Absent, Job
from sra_kernels import backend, use_backend


def differentiated(
    forward: Callable[[], Tensor],
    upstream: Tensor | None = None,
    leaves: Sequence[Tensor] = (),
    package: str = "",
) -> Job:
    """Returns the result and the gradients of `leaves`; without leaves, nothing is recorded."""
    if not leaves:

        def run_forward() -> list[Tensor]:
            with torch.no_grad():
                return [forward()]

        return Job(run_forward, package=package)

    def run() -> list[Tensor]:
        out = forward()
        out.backward(upstream)
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Job(run, reset, package)


def on_backend(name: str, provider: Callable[[Any], Job]) -> Callable[[Any], Job]:
    def prepare(x: Any) -> Job:
        missing = backend.missing(name)
        if missing:
            raise Absent(f"not here: {missing}")
        inner = provider(x)

        def run() -> Sequence[Tensor]:
            with use_backend(name):
                return inner.run()

        return inner._replace(run=run)

    return prepare


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For one shape, its best setting; the first call, which compiles, is not timed."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def rival(module: str, package: str) -> Any:
    """Import a rival, or say how to install it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as reason:  # OSError: a library that does not load
        missing = isinstance(reason, ModuleNotFoundError)
        why = f"pip install {package}" if missing else str(reason).splitlines()[0]
        raise Absent(f"not installed: {why}") from reason
