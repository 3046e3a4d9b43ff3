"""Main memory of this machine, or of the container in which this process is kept."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

# Limit, use and statistics, of control groups version 2 and 1.
GROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def total_bytes(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """What there is."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits(groups))])


def available_bytes(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """What is free of it now, or would be when asked for."""
    free = (limit - used for limit, used in _limits(groups))
    return max(0, min([psutil.virtual_memory().available, *free]))


def _limits(groups: Path) -> list[tuple[int, int]]:
    """Limits of a container and what is used of them, but for the files' pages that it can drop."""
    found = []
    for limit, used, stat in GROUPS:
        try:
            most, now = int((groups / limit).read_text()), int((groups / used).read_text())
            files = re.search(r"^(?:total_)?inactive_file (\d+)", (groups / stat).read_text(), re.M)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        found.append((most, now - int(files[1] if files else 0)))
    return found
