"""Tile sizes and launch options of the Triton kernels: checked-in tables, tuning on demand.

A table maps a bucket of shapes to candidates, the best known first, and that one is used: the same
choice on every machine and run, and nothing to wait for. `SRA_KERNELS_TUNE=1` times all candidates
of a bucket when it first comes, once for each kind of GPU, and remembers the fastest in
`~/.cache/sra_kernels/tuned.json` (or under XDG_CACHE_HOME).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

VARIABLE = "SRA_KERNELS_TUNE"


@dataclass(frozen=True)
class Config:
    """`blocks` are the kernel's compile-time sizes by name."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def launch(self) -> dict[str, int]:
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


Configs = Mapping[str, Sequence[Config]]


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python: decided when it is imported."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache  # asking the driver takes longer than a small launch
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942" and so on, or "interpreter"."""
    if interpreted():
        return "interpreter"
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def chosen(
    kernel: str,
    configs: Configs,
    bucket: str,
    device: torch.device,
    launch: Callable[[Config], object] | None,
) -> Config:
    """The configuration of `kernel` for a bucket.

    An entry "bucket@sm_90" goes before "bucket" on that architecture, and "bucket@sm_80" on those
    of its kind. `launch` runs the kernel once and may be repeated; where it is None, the first
    candidate is taken without a trial.
    """
    arch = architecture(device)
    # An RTX has little more than half the H100's shared memory for a block.
    kind = "sm_80" if arch.startswith(("sm_8", "sm_12")) else arch
    candidates = configs.get(f"{bucket}@{arch}") or configs.get(f"{bucket}@{kind}")
    candidates = candidates or configs[bucket]
    if os.environ.get(VARIABLE, "0") != "1" or launch is None or device.type == "cpu":
        return candidates[0]
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]  # a trial waits for the GPU, which a capture forbids
    return _fastest(f"{kernel}/{bucket}", candidates, device, launch)


_found: dict[tuple[str, str], Config] = {}  # the file is read once for each


def _fastest(
    key: str,
    candidates: Sequence[Config],
    device: torch.device,
    launch: Callable[[Config], object],
) -> Config:
    gpu = torch.cuda.get_device_name(device)
    if (gpu, key) in _found:
        return _found[gpu, key]
    remembered = _read()
    known = remembered.get(gpu, {}).get(key)
    best = next((config for config in candidates if known == asdict(config)), None)
    if best is None:
        best = min(candidates, key=lambda config: _time(config, launch))
        remembered.setdefault(gpu, {})[key] = asdict(best)
        _write(remembered)
    _found[gpu, key] = best
    return best


def _time(config: Config, launch: Callable[[Config], object]) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: launch(config), return_mode="median")
    except OutOfResources:  # of another GPU's candidates, on this one
        return float("inf")


def _path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sra_kernels" / "tuned.json"


def _read() -> dict[str, Any]:
    try:
        return json.loads(_path().read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write(remembered: dict[str, Any]) -> None:
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(remembered, indent=1, sort_keys=True))
    part.replace(path)  # ranks tune at the same time: a file is whole or not there
