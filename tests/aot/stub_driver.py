"""A Triton driver with no GPU behind it: launches are compiled for a target, and none of them runs.

The library's own functions run on tensors of the "meta" device: they have shapes of any size and no
memory, and they raise at whatever would make the host wait for a value. What Triton's JIT makes of
each launch, with its specialisation of these arguments, is kept as a `Launch`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    function: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]  # num_warps and the like
    compiled: Any  # triton's CompiledKernel

    @property
    def name(self) -> str:
        return self.function.__name__


class StubDriver(DriverBase):
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise RuntimeError("nothing can be timed without a GPU")


def install(target: str, record: Callable[[Launch], None]) -> None:
    """From here on, in this process, every launch is compiled for `target` and handed to `record`.

    One target a process: Triton keeps what it compiled by device, not by target.
    """
    driver.set_active(StubDriver(TARGETS[target]))
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        size = tuple(grid(arguments)) if callable(grid) else tuple(grid)
        record(Launch(self, size, arguments, options, compiled))
        return compiled

    JITFunction.run = compile_only
