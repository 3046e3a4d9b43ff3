"""What a benchmark is, as data: cases, providers, exact answers, counts. Nothing runs here.

An op's file holds one `Benchmark`; `load` finds it by the op's name. The command line, the tests
and pytest-benchmark all walk through the same registry.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

NAMES = (
    "span_com",
    "span_kl",
    "linear_span_kl",
    "attention_mass",
    "span_geometry",
    "alignment",
    "sra_loss",
    "training_step",
)


class Job(NamedTuple):
    """`run` is what is timed; it returns every output and gradient. `reset` is not timed.

    `package` is the distribution that the code comes from, if neither we nor torch wrote it.
    """

    run: Callable[[], Sequence[Tensor]]
    reset: Callable[[], None] = lambda: None
    package: str = ""


class Absent(Exception):
    """A provider that has no part in a case; the message, its status, says why."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One op beside its rivals.

    Attributes:
        cases: frozen dataclasses; each field is a column of the CSV, `case` names the shape.
        small: cases of test size.
        gpu: cases for `--device cuda`, which has no others.
        gpu_providers: providers that take part there, beside the rest.
        inputs: makes the tensors of a case, the same each time.
        exact: what a job must return, in float64. None where the providers have different
            objectives: then their results need only be finite.
        tolerance: largest error, relative to each row's largest value, that still counts as right.
        providers: name -> prepares a job on the inputs; what it does there is not timed. Raises
            `Absent`. Names that begin with "ours" are ours.
        bounds: the same for what no implementation can beat: not verified, and no rival.
        headline: the cases that are quoted: under both malloc settings, with peak memory (each
            provider in a fresh process) and with every provider.
        headline_only: providers that take part in those alone, because they take seconds.
        tuned: whether the headline cases run under the tuned malloc too.
        bytes_moved: what any implementation has to read and write at least.
        flops: what any implementation has to multiply and add; causal products count half.
        seconds: the time that the op may take in the default pass, memory included. When it runs
            out, cases get fewer samples, but never less than `Effort.least`.
    """

    name: str
    cases: Sequence[Any]
    small: Sequence[Any]
    inputs: Callable[[Any], Any]
    exact: Callable[[Any], Sequence[Tensor]] | None
    tolerance: Callable[[Any], float]
    providers: Mapping[str, Callable[[Any], Job]]
    bounds: Mapping[str, Callable[[Any], Job]] = dataclasses.field(default_factory=dict)
    headline: Callable[[Any], bool] = lambda case: True
    headline_only: Sequence[str] = ()
    tuned: bool = True
    bytes_moved: Callable[[Any], int] | None = None
    flops: Callable[[Any], int] | None = None
    seconds: float = 60
    gpu: Sequence[Any] = ()
    gpu_providers: Mapping[str, Callable[[Any], Job]] = dataclasses.field(default_factory=dict)


def load(name: str) -> Benchmark:
    if name not in NAMES:
        raise ValueError(f"There is no benchmark {name!r}. Choose from {', '.join(NAMES)}.")
    return importlib.import_module(f"benchmarks.{name}").BENCHMARK


def columns(case: Any) -> dict[str, Any]:
    return dataclasses.asdict(case)


def label(case: Any) -> str:
    """A case in words, as `--only` and the test ids spell it."""
    return " ".join(f"{name}={value}" for name, value in columns(case).items())
