"""Which dtype multiplies faster on this machine."""

from __future__ import annotations

import time

import torch


def faster_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32.

    CPUs without bf16 instructions emulate it (measured on AVX2: 8 times slower than float32), so
    it is tried out: one product of a transformer's size, a few milliseconds.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _seconds(torch.bfloat16) < _seconds(torch.float32) else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
    times = []
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return min(times[1:])
