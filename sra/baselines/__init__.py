"""The methods that SRA is compared with, behind the same distiller, trainer and data."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from sra.baselines.alm import ALM
from sra.baselines.baseline import Baseline
from sra.baselines.dskd import DSKD
from sra.baselines.dskdv2 import DSKDv2
from sra.baselines.gold import GOLDBayesian, GOLDObserved
from sra.baselines.mined import MinED
from sra.baselines.multilevel_ot import MultiLevelOT
from sra.baselines.sft import SFT
from sra.baselines.simple_ctkd import SimpleCTKD
from sra.baselines.uld import ULD

METHODS: dict[str, type[Baseline]] = {
    method.name: method
    for method in (
        SFT, ULD, MinED, DSKD, DSKDv2, MultiLevelOT, SimpleCTKD, GOLDObserved, GOLDBayesian, ALM,
    )
}  # fmt: skip

__all__ = ["METHODS", "Baseline", "baseline"]


def baseline(name: str, **changes: Any) -> Baseline:
    """A method by its name, with the options that are given.

    >>> baseline("uld", alpha=0.3)

    Raises:
        ValueError: no such method, or a value out of its range.
        TypeError: the method has no such option.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        raise ValueError(
            f"There is no method {name!r}. "
            + (f"Did you mean {close[0]!r}?" if close else f"Choose one of {', '.join(METHODS)}.")
        )
    known = [field.name for field in fields(METHODS[name])]
    for key in changes:
        if key not in known:
            raise TypeError(f"The method {name!r} has no {key!r}. It has {', '.join(known)}.")
    return METHODS[name](**changes)
