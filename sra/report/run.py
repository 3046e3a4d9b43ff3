"""`sra report`: what a run did, from the files that it left, as one HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sra.report.charts import Curve, number
from sra.run_record import RECORD_FILE
from sra.whole_file import write_whole

STATE_FILE = "trainer_state.json"
SIDES = ("before", "after", "teacher")
CURVES = {  # what the trainer logs: title, note
    "loss": ("Loss", "what is minimised"),
    "ce": ("Cross-entropy", "nats a token"),
    "cosine": ("Cosine", "direction of the spans' states"),
    "geometry": ("Geometry", "similarities between spans"),
    "logit": ("Logits", "divergence at the spans"),
    "likelihood": ("Likelihood", "divergence of the probabilities of the spans' texts"),
    "eval_bits_per_byte": ("Held-out bits per byte", "lower is better"),
    "bits_per_byte": ("Training bits per byte", "of the batches"),
    "eval_agreement": ("Held-out agreement", "share of spans with the same top token"),
    "agreement": ("Agreement", "share of spans with the same top token"),
    "coverage": ("Coverage", "share of bytes inside spans"),
    "shared_mass": ("Shared mass", "teacher's probability of shared tokens"),
    "tokens_per_second": ("Tokens a second", ""),
    "peak_gib": ("Memory", "peak so far, GiB"),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
}
# Not quantities of a step: the Trainer's own count of them, and its summary at the end of a run.
NO_CURVES = {"step", "epoch", "total_flos", "train_loss"}


@dataclass(frozen=True)
class SampleSpans:
    """One held-out row, piece by piece.

    pieces: (text, bits of divergence after it, student's token, teacher's token); text that no span
        holds has None for the three.
    """

    row: int
    context: str
    pieces: Sequence[tuple[str, float | None, str | None, str | None]]
    divergence: float
    agreement: float


@dataclass
class Report:
    """Everything that the page shows.

    figures: for "before", "after" and "teacher": "bits_per_byte", "agreement" (share of spans),
        "divergence" (bits a span); whatever is known of them.
    source: where the figures come from, as a sentence.
    missing: what is not known, and how to get it.
    samples: rows ordered from the worst.
    """

    folder: Path
    run: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    step: int
    max_steps: int | None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    source: str = ""
    missing: list[str] = field(default_factory=list)
    samples: Sequence[SampleSpans] = ()

    @property
    def finished(self) -> bool:
        return self.max_steps is not None and self.step >= self.max_steps


def read_run(folder: str | Path) -> Report:
    """What a run's folder holds: of a finished run, one that goes on, or one that died.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Give the --output of sra distill.")
    run = _object(folder / RECORD_FILE)
    states = [folder / STATE_FILE, *folder.glob(f"checkpoint-[0-9]*/{STATE_FILE}")]
    state = max(
        (found for path in states if (found := _object(path)) is not None),
        key=lambda found: found.get("global_step", 0),
        default=None,
    )
    if run is None and state is None:
        raise ValueError(
            f"{folder} holds no run: there is neither {RECORD_FILE} nor a checkpoint's "
            f"{STATE_FILE} that can be read. Give the --output folder of sra distill."
        )
    report = Report(
        folder,
        run or {},
        (state or {}).get("log_history", []),
        (state or {}).get("global_step", 0),
        (state or {}).get("max_steps") or None,
    )
    measured = {
        side: {k: float(v) for k, v in known.items() if isinstance(v, int | float)}
        for side in SIDES
        if isinstance(known := report.run.get(side), Mapping)
    }
    report.figures = {**_figures_of(report.history), **measured}
    if measured:
        report.source = "Measured by the trainer on its held-out rows."
    elif report.figures:
        report.source = "From the run's last evaluation on its held-out rows."
    report.missing = _missing(report, run is None, state is None)
    return report


def curves(report: Report) -> list[Curve]:
    """Each quantity that was logged at two steps or more, the known ones first.

    One that is 0 throughout, such as a term whose weight is 0, is left out.
    """
    found: dict[str, dict[int, float]] = {}
    for log in report.history:
        for name, value in log.items():
            summary = name in NO_CURVES or "runtime" in name or name.endswith("_per_second")
            if (summary and name != "tokens_per_second") or isinstance(value, bool):
                continue
            if isinstance(value, int | float) and math.isfinite(value) and "step" in log:
                found.setdefault(name, {})[log["step"]] = float(value)
    order = [*CURVES, *sorted(found.keys() - CURVES.keys())]
    drawn = []
    for name in order:
        points = sorted(found.get(name, {}).items())
        if len(points) < 2 or not any(value for _, value in points):
            continue
        title, note = CURVES.get(name, (name.replace("_", " ").capitalize(), ""))
        levels = []
        if name == "eval_bits_per_byte":  # of the same rows, so not what was measured since
            of_teacher = (report.run.get("teacher") or {}).get("bits_per_byte")
            levels = [("teacher", float(of_teacher))] if of_teacher is not None else []
        drawn.append(Curve(title, note, points, levels))
    return drawn


def verdict(report: Report) -> tuple[str, str]:
    """("good" | "warning" | "bad", what came out of the run in a sentence or two)."""
    broken = next(
        (
            log["step"]
            for log in report.history
            if isinstance(log.get("loss"), float) and not math.isfinite(log["loss"])
        ),
        None,
    )
    if broken is not None:
        return "bad", (
            f"The loss is no number from step {broken} on, so what was trained after it is lost. "
            "Lower the learning rate, or train in float32."
        )
    before, after, teacher = (report.figures.get(side, {}).get("bits_per_byte") for side in SIDES)
    if before is not None and after is not None:
        level, said = _improvement(before, after, teacher)
    else:
        level, said = _loss_alone(report)
    evaluated = [
        (log["eval_bits_per_byte"], log["step"])
        for log in report.history
        if "eval_bits_per_byte" in log and "step" in log
    ]
    if evaluated and min(evaluated)[0] < 0.99 * evaluated[-1][0]:
        best, at = min(evaluated)
        kept = (report.run.get("after") or {}).get("bits_per_byte")
        if kept is not None and best > 0.99 * kept:
            said += (
                f" It was best at step {at} ({best:.4f}), and that is the student that was kept."
            )
        else:
            level = "warning" if level == "good" else level
            said += f" It was best at step {at} ({best:.4f}) and got worse from there: overfitting."
    if not report.finished and report.max_steps:
        level = "warning" if level == "good" else level
        said += (
            f" This is as of step {report.step:,} of {report.max_steps:,}: the run still goes on "
            "or was stopped."
        )
    return level, said


def write_report(report: Report, output: str | Path) -> Path:
    """Write the page; all of it or nothing."""
    from sra.report.page import page

    write_whole(output, page(report))
    return Path(output)


def _improvement(before: float, after: float, teacher: float | None) -> tuple[str, str]:
    change = (after - before) / before
    said = (
        f"The student needs {after:.4f} bits for a byte of held-out text; before training it "
        f"needed {before:.4f} ({'−' if change < 0 else '+'}{abs(change):.1%})."
    )
    if change > -0.001:
        return "bad", (
            "The student did not get better. " + said + " Look at the curves: a loss that rises "
            "asks for a lower learning rate, one that has not fallen for more steps."
        )
    if teacher is not None and teacher < before:
        closed = (before - after) / (before - teacher)
        said += (
            f" That closes {closed:.0%} of the distance to the teacher ({teacher:.4f})."
            if closed < 1
            else f" That is better than the teacher ({teacher:.4f})."
        )
    elif teacher is not None:
        said += f" The teacher needs {teacher:.4f}, more than the student did at the start."
    return "good", said


def _loss_alone(report: Report) -> tuple[str, str]:
    losses = [log["loss"] for log in report.history if "loss" in log]
    if not losses:
        return "warning", "Nothing was logged yet."
    tenth = max(1, len(losses) // 10)
    start, end = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    moved = "fell" if end < start else "rose"
    return "warning" if end < start else "bad", (
        f"The training loss {moved} from {number(start)} to {number(end)}. Whether the student "
        "predicts new text better was not measured."
    )


def _figures_of(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What the run's own evaluations say: one at step 0 is of the student as it was before."""
    evaluated = [log for log in history if "eval_bits_per_byte" in log]
    sides = {"before" if not log.get("step") else "after": log for log in evaluated}
    return {k: {"bits_per_byte": log["eval_bits_per_byte"]} for k, log in sides.items()}


def _missing(report: Report, no_run: bool, no_state: bool) -> list[str]:
    missing = []
    if no_state:
        missing.append(
            "Curves: the run has not written a checkpoint yet. Run sra report again after the "
            "next one; --save-steps says how often."
        )
    if no_run:
        missing.append(
            f"Command, configuration, versions and machine: there is no {RECORD_FILE}, which "
            "sra distill and SRATrainer write."
        )
    return missing


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none that can be read: a run may be writing it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
