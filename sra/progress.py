"""What a person sees while a run goes on: the bar, its speed and its memory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback

SHOWN = (
    "loss", "ce", "cosine", "geometry", "logit", "likelihood", "bits_per_byte", "agreement",
    "coverage", "eval_bits_per_byte", "tokens_per_second", "peak_gib",
)  # fmt: skip
SHORT = {
    "bits_per_byte": "bpb", "eval_bits_per_byte": "held-out", "tokens_per_second": "tok/s",
    "peak_gib": "GiB", "agreement": "agree", "coverage": "cover",
}  # fmt: skip


class LiveTerms(ProgressCallback):
    """The progress bar, with the latest value of each term at its end."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            latest = {SHORT.get(k, k): f"{logs[k]:.3g}" for k in SHOWN if k in logs}
            if latest:
                self._latest = {**getattr(self, "_latest", {}), **latest}
                self.training_bar.set_postfix(self._latest)


class Speed:
    """Tokens a second since the last reading, padding left out."""

    def __init__(self) -> None:
        self.tokens: int | Tensor = 0
        self.since = time.perf_counter()

    def add(self, batch: Mapping[str, Any]) -> None:
        mask = batch.get("attention_mask")
        # Summed where it is: the device is waited for when the speed is read.
        self.tokens = self.tokens + (batch["input_ids"].numel() if mask is None else mask.sum())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The seconds in here do not count."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - begin

    def read(self) -> float:
        tokens, now = float(self.tokens), time.perf_counter()
        speed = tokens / max(now - self.since, 1e-9)
        self.tokens, self.since = 0, now
        return speed


def reset_peak() -> None:
    """Forget the highest memory so far, where the system allows it."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_gib() -> float | None:
    """Highest memory so far in GiB: the GPU's if it is used, else this process's (Linux)."""
    # A run on the CPU allocates nothing on a GPU that is there.
    if torch.cuda.is_initialized() and (used := torch.cuda.max_memory_allocated()):
        return used / 2**30
    peak = resident("VmHWM")
    return peak / 2**30 if peak else None


def resident(field: str) -> int:
    """Bytes of this process by a field of Linux's /proc/self/status: "VmRSS", now; "VmHWM", at
    most so far. 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = (
        re.search(rf"^{field}:\s*(\d+) kB", status.read_text(), re.M) if status.exists() else None
    )
    return 1024 * int(found[1]) if found else 0
