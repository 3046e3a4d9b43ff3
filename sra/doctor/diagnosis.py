"""`sra doctor`: whether a student can learn from a teacher on this data, before a run.

>>> diagnosis = diagnose(student_tokenizer, teacher_tokenizer, rows,
...     student_config=student_config, teacher_config=teacher_config)
>>> print(diagnosis.report())
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from sra.alignment import SpanAligner
from sra.collator import SpanCollator
from sra.data import IGNORED
from sra.doctor import checks, model_checks, vocabulary_checks
from sra.doctor.checks import Finding, Sample, Side
from sra.doctor.planner import Machine, Plan, predict
from sra.objective import DEFAULT, RECIPES, Objective

LEVELS = ("error", "warning", "note", "ok")
COLORS = {"error": "31", "warning": "33", "note": "36", "ok": "32"}
GIB = 2**30


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    student, teacher: how the report calls them.
    rows: how many were looked at.
    findings: see `Finding`; in the order of the checks.
    plan: the predicted memory of the widest batch and seconds of a step; None if not asked for, or
        not to be had (a finding says why).
    """

    student: str
    teacher: str
    rows: int
    findings: tuple[Finding, ...]
    plan: Plan | None = None

    @property
    def exit_code(self) -> int:
        """0 good, 1 it cannot run, 2 it will hurt."""
        levels = {finding.level for finding in self.findings}
        return 1 if "error" in levels else 2 if "warning" in levels else 0

    @property
    def verdict(self) -> str:
        """In a few words."""
        count = sum(f.level == "warning" for f in self.findings)
        plural = "s" if count > 1 else ""
        return (
            "good",
            "this cannot run",
            f"this runs, but {count} warning{plural} will hurt",
        )[self.exit_code]

    def with_findings(self, *more: Finding) -> Diagnosis:
        """A copy with more findings at the end."""
        return replace(self, findings=(*self.findings, *more))

    def to_dict(self) -> dict[str, Any]:
        """What `sra doctor --json` prints."""
        out: dict[str, Any] = {
            "student": self.student,
            "teacher": self.teacher,
            "rows": self.rows,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "findings": [vars(finding) for finding in self.findings],
            "plan": None,
        }
        if self.plan is not None:
            out["plan"] = {
                "peak_bytes": self.plan.peak,
                "memory_bytes": self.plan.memory,
                "moment": self.plan.moment,
                "step_seconds": self.plan.step_seconds,
                "seconds": self.plan.seconds,
                "student_parameters": self.plan.student_parameters,
                "teacher_parameters": self.plan.teacher_parameters,
            }
        return out

    def report(self, *, width: int | None = None, color: bool = False) -> str:
        """A page to read: what is wrong first, each with what to do about it.

        Args:
            width: columns (None: the terminal's, at most 110).
        """
        width = width or min(110, shutil.get_terminal_size().columns)
        topics = max((len(f.topic) for f in self.findings), default=0)
        indent = " " * (11 + topics)

        def paint(text: str, code: str) -> str:
            return f"\033[{code}m{text}\033[0m" if color else text

        lines = [
            f"{self.student} \u2190 {self.teacher}, {self.rows} rows: "
            + paint(self.verdict, COLORS[("ok", "error", "warning")[self.exit_code]]),
            "",
        ]
        for finding in sorted(self.findings, key=lambda f: LEVELS.index(f.level)):
            head = f"{finding.level:<9}{finding.topic:<{topics}}  "
            text = textwrap.fill(
                finding.text, width, initial_indent=head, subsequent_indent=indent,
                break_on_hyphens=False,
            )  # fmt: skip
            level = text[: len(finding.level)]
            lines.append(paint(level, COLORS[finding.level]) + text[len(level) :])
            if finding.remedy:
                lines.append(
                    textwrap.fill(
                        finding.remedy, width, initial_indent=f"{indent}\u2192 ",
                        subsequent_indent=f"{indent}  ", break_on_hyphens=False,
                    )
                )  # fmt: skip
        return "\n".join(lines)


def diagnose(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    numbers: Sequence[int] | None = None,
    student_config: Any,
    teacher_config: Any,
    student_name: str = "student",
    teacher_name: str = "teacher",
    objective: Objective = RECIPES[DEFAULT],
    vocabulary_match: Literal["raw", "normalised"] = "normalised",
    granularity: Literal["token", "word", "sentence"] = "token",
    max_length: int = 512,
    batch_size: int = 4,
    min_coverage: float = 0.9,
    resources: bool = True,
    memory: float | None = None,
    dtype: torch.dtype = torch.float32,
    cached: bool = False,
    gradient_checkpointing: bool = False,
    machine: Machine | None = None,
    device: torch.device | str = "cpu",
) -> Diagnosis:
    """Look at a pair and at data, without weights.

    Args:
        student_tokenizer, teacher_tokenizer: fast tokenizers of `transformers`.
        rows: a sample of the data, checked (`sra.data.load_rows`).
        numbers: where they stand in the data, for the report (None: 0, 1, ...).
        student_config, teacher_config: configurations of `transformers`.
        objective, vocabulary_match, granularity, max_length, batch_size, min_coverage: as the run
            will have them.
        resources: predict memory and time, which takes a few seconds.
        memory: GiB that the run may take; None: no opinion.
        dtype, cached, gradient_checkpointing, machine, device: see `sra.doctor.planner.predict`.

    Raises:
        TypeError: a tokenizer is not a fast one.
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("There are no rows to look at. Pass a sample of the data.")
    aligner = SpanAligner(student_tokenizer, teacher_tokenizer, granularity=granularity)
    student = Side("student", student_tokenizer, student_config, aligner.student)
    teacher = Side("teacher", teacher_tokenizer, teacher_config, aligner.teacher)
    sample = checks.sampled(aligner, student, teacher, rows, numbers or range(len(rows)))
    findings: list[Finding] = []
    vocabularies = vocabulary_checks.shared_vocabularies(student, teacher)
    if sample.rows:
        findings += checks.alignment(sample, min_coverage)
        findings += checks.lengths(sample, max_length)
        findings += [checks.round_trip(side, sample) for side in (student, teacher)]
        findings += checks.normalisers(student, teacher, sample)
        findings += vocabulary_checks.vocabularies(
            vocabularies, vocabulary_match, student, sample.tables, objective.outside
        )
        shared = vocabularies.get(vocabulary_match)
        if shared is not None and objective.logit and objective.outside == "respell":
            findings.append(vocabulary_checks.targets(shared, sample.tables))
    findings += model_checks.templates(student, teacher, sample)
    for side in (student, teacher):
        findings += model_checks.control_tokens(side)
        findings += model_checks.heads(side)
        if objective.needs_teacher and objective.compares_centres:
            findings.append(model_checks.attention(side))
    plan = None
    if resources and sample.rows and not any(f.level == "error" for f in findings):
        try:
            options = {
                "objective": objective,
                "dtype": dtype,
                "device": device,
                "cached": cached,
                "gradient_checkpointing": gradient_checkpointing,
            }
            collator = SpanCollator(aligner, max_length=max_length)
            entries = None
            if vocabularies:
                if shared is None:
                    raise ValueError(
                        f"the vocabularies share no token by --vocabulary-match {vocabulary_match}."
                    )
                entries = len(shared)
            plan = _plan(student, teacher, collator, sample, entries, batch_size, machine, options)
            findings += needs(plan, memory, batch_size, cached, gradient_checkpointing)
        except ValueError as error:
            findings.append(Finding("note", "resources", str(error), "Try a few: --measure 2."))
    return Diagnosis(student_name, teacher_name, len(rows), tuple(findings), plan)


class _Sizes(NamedTuple):
    """Of a batch: widths of both sides; spans and labels of one sequence."""

    student_tokens: int
    teacher_tokens: int
    spans: float
    labels: float


def _plan(
    student: Side,
    teacher: Side,
    collator: SpanCollator,
    sample: Sample,
    shared: int | None,
    batch_size: int,
    machine: Machine | None,
    options: dict[str, Any],
) -> Plan:
    """Memory of the widest batch that this sample can make, seconds of the typical one.

    shared: entries of the shared vocabulary; None for one and the same.
    """
    sizes = []
    for number, row in enumerate(sample.rows):
        example = collator.example(row, f"Row {number}")
        if example.left_out:  # which is reported
            continue
        spans = example.tables[0]
        labels = int((example.labels != IGNORED).sum())
        sizes.append((len(example.input_ids), len(spans.teacher_ids), len(spans), labels))
    if not sizes:
        raise ValueError("no row has anything to learn within max_length.")
    table = np.array(sizes)
    largest = np.sort(table, axis=0)[::-1][:batch_size]
    batches = [table[i : i + batch_size] for i in range(0, len(table), batch_size)]
    widths = np.mean([batch.max(0) for batch in batches], axis=0)
    widest = _Sizes(*largest[0, :2].tolist(), *largest[:, 2:].mean(0).tolist())
    typical = _Sizes(*widths[:2].round().astype(int).tolist(), *table[:, 2:].mean(0).tolist())
    common: dict[str, Any] = {"batch_size": batch_size, "shared": shared, **options}
    models = student.config, teacher.config
    most = predict(*models, **{**widest._asdict(), **common}, machine=Machine.unmeasured())
    usual = predict(*models, **{**typical._asdict(), **common}, machine=machine)
    return replace(most, seconds=usual.seconds)


def needs(
    plan: Plan, memory: float | None, batch_size: int, cached: bool, checkpointing: bool
) -> list[Finding]:
    """The plan in words, against what there is."""
    parts = sorted(plan.memory.items(), key=lambda item: -item[1])
    text = (
        f"{plan.peak / GIB:.1f} GiB with the widest batch of {batch_size}, at {plan.moment}: "
        + ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    )
    level: Literal["ok", "warning"] = "ok"
    remedy = ""
    if memory is not None and plan.peak > memory * GIB:
        level = "warning"
        text = f"needs {text}; there are {memory:.1f}"
        ways = ["--batch-size 1 with --accumulate"] if batch_size > 1 else []
        if not checkpointing and plan.memory.get("activations", 0) > plan.peak / 4:
            ways.append("gradient checkpointing")
        if not cached and plan.memory.get("teacher", 0) > plan.peak / 4:
            ways.append("a cached teacher (`sra cache`), of which only the head stays in memory")
        remedy = f"Try {', '.join(ways)}, or a shorter --max-length." if ways else (
            "Try a shorter --max-length, or a smaller student."
        )  # fmt: skip
    elif memory is not None:
        text += f"; there are {memory:.1f}"
    seconds = sorted(plan.seconds.items(), key=lambda item: -item[1])
    total = plan.step_seconds
    shares = ", ".join(f"{name} {part / total:.0%}" for name, part in seconds)
    return [
        Finding(level, "memory", text, remedy),
        Finding("ok", "time", f"{_seconds(total)} a step with a typical batch: {shares}"),
    ]


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"
