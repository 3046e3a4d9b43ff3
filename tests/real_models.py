"""The cached real checkpoints, for tests marked ``models``: fetched once, else skipped."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from sra.packages import fetch_model


@functools.cache
def checkpoint(name: str) -> Path:
    """The folder of a published model; skips the test, with the reason, if it cannot be had."""
    try:
        return fetch_model(name)
    except RuntimeError as error:
        if "could not download" not in str(error):  # a fault of ours, or a broken file
            raise
        pytest.skip(f"{name}: {error}")
