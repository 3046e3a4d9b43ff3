"""What a person sees while a run goes on: the bar, its speed and its memory."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch
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
    """Tokens a second since the last reading."""

    def __init__(self) -> None:
        self.tokens = 0
        self.since = time.perf_counter()

    def read(self) -> float:
        now = time.perf_counter()
        speed = self.tokens / max(now - self.since, 1e-9)
        self.tokens, self.since = 0, now
        return speed


def reset_peak() -> None:
    """Forget the highest memory so far, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_gib() -> float | None:
    """Highest memory so far in GiB: the GPU's if there is one, else this process's (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
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
