"""What a benchmark is, as data: cases, providers, exact answers, byte counts. Nothing runs here.

An op's file holds one `Benchmark`; `load` finds it by the op's name. The command line, the tests
and pytest-benchmark all walk through the same registry.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

NAMES = ("span_com", "alignment")


class Job(NamedTuple):
    """`run` is what is timed; it returns every output and gradient. `reset` is not timed."""

    run: Callable[[], Sequence[Tensor]]
    reset: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One op beside its rivals.

    Attributes:
        cases: frozen dataclasses; each field is a column of the CSV.
        small: cases of test size.
        inputs: makes the tensors of a case, the same each time.
        exact: what a job must return, in float64.
        tolerance: largest error, relative to each row's largest value, that still counts as right.
        providers: name -> prepares a job on the inputs; what it does there is not timed.
        bytes_moved: what any implementation has to read and write at least.
        copy: a plain copy on the inputs and its bytes (read and written), whose bandwidth is the
            roofline; None where memory is not what bounds the op.
        memory: the cases whose peak memory is measured, each provider in a fresh process (seconds).
    """

    name: str
    cases: Sequence[Any]
    small: Sequence[Any]
    inputs: Callable[[Any], Any]
    exact: Callable[[Any], Sequence[Tensor]]
    tolerance: Callable[[Any], float]
    providers: Mapping[str, Callable[[Any], Job]]
    bytes_moved: Callable[[Any], int] | None = None
    copy: Callable[[Any], tuple[Job, int]] | None = None
    memory: Callable[[Any], bool] = lambda case: True


def load(name: str) -> Benchmark:
    if name not in NAMES:
        raise ValueError(f"There is no benchmark {name!r}. Choose from {', '.join(NAMES)}.")
    return importlib.import_module(f"benchmarks.{name}").BENCHMARK


def columns(case: Any) -> dict[str, Any]:
    return dataclasses.asdict(case)


def label(case: Any) -> str:
    """A case in words, as `--only` and the test ids spell it."""
    return " ".join(f"{name}={value}" for name, value in columns(case).items())
