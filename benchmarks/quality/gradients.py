"""Where each term of the objective pulls the student, beside what would lower held-out loss.

    python -m benchmarks.quality.gradients

Of every term alone, with its own weight: the norm of the gradient that a batch gives, which is
clipped to 1 in training; and the cosine of the mean gradient with that of cross-entropy on other
rows. At the start, and after training by cross-entropy, on the test rows. Into
benchmarks/results/gradients.csv, what it lacks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks.quality.run import SPLITS, Bench
from benchmarks.quality.settings import BATCH, DEV_SEED, REGIMES, SETTINGS
from benchmarks.quality.table import append, read
from sra import SpanDistiller, recipe
from sra.allocator import keep_freed_memory
from sra.baselines import baseline
from sra.demo import remember

CSV = Path(__file__).parents[1] / "results" / "gradients.csv"
# Of cross-entropy, as quality.csv chose it; and the settings that are looked at.
RATES = {"prune-qwen": 1e-3, "chinese": 1e-4}

TERMS: dict[str, Any] = {
    "cross-entropy": recipe("cross-entropy"),
    "paper: cosine": recipe("paper", alpha=0.0, gamma=0.0, logit=0.0),
    "paper: 50 × geometry": recipe("paper", alpha=0.0, cosine=0.0, logit=0.0),
    "paper: logit": recipe("paper", alpha=0.0, cosine=0.0, gamma=0.0),
    "paper: logit, mean over spans": recipe(
        "paper", alpha=0.0, cosine=0.0, gamma=0.0, normaliser="spans"
    ),
    "paper: logit, at span ends": recipe(
        "paper", alpha=0.0, cosine=0.0, gamma=0.0, logit_state="end"
    ),
    "paper: logit, weighted by shared mass": recipe(
        "paper", alpha=0.0, cosine=0.0, gamma=0.0, outside="weight"
    ),
    "paper: logit, temperature 1": recipe(
        "paper", alpha=0.0, cosine=0.0, gamma=0.0, temperature=1.0
    ),
    "boundary: logit": recipe("boundary", alpha=0.0, cosine=0.0),
    "respell": recipe("respell", alpha=0.0),
    "alm": baseline("alm", alpha=0.0),
}


@dataclass(frozen=True)
class Pull:
    """norm: mean over batches; cosine: of the mean over batches, with other rows' cross-entropy."""

    setting: str
    student: str  # "start" or "trained"
    term: str
    norm: float
    cosine: float


def pulls(bench: Bench, student: Any, name: str, terms: Sequence[str]) -> Iterator[Pull]:
    """Each of these terms on one student."""
    rows, others = bench.rows[SPLITS["test"]], bench.rows[SPLITS["dev"]]
    aim, _ = gradient(bench, student, TERMS["cross-entropy"], others)
    for term in terms:
        mean, norm = gradient(bench, student, TERMS[term], rows)
        cosine = float(torch.dot(mean, aim) / mean.norm() / aim.norm())
        yield Pull(bench.setting.name, name, term, norm, cosine)


def gradient(bench: Bench, student: Any, objective: Any, rows: list[Any]) -> tuple[Tensor, float]:
    """Of the student's parameters: the mean over batches, and the mean of the batches' norms."""
    teacher = vocabulary = None
    if objective.needs_teacher:
        teacher, vocabulary = bench.teacher, bench.vocabulary(student)
        remember(teacher, bench.collator, rows)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    module = SpanDistiller(student, teacher, objective, vocabulary=vocabulary).to(device)
    parameters = [*student.parameters()]
    total, norms = torch.zeros(sum(p.numel() for p in parameters), device=device), []
    for first in range(0, len(rows), BATCH):
        batch = bench.collator(rows[first : first + BATCH])
        batch = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items()}
        student.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bench.dtype == torch.bfloat16):
            module(**batch).loss.backward()
        flat = torch.cat([p.grad.flatten() for p in parameters])
        norms.append(float(flat.norm()))
        total += flat
    student.zero_grad()
    return total / len(norms), sum(norms) / len(norms)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=[*RATES])
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="for models")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    keep_freed_memory()
    for setting in args.settings:
        bench = Bench(SETTINGS[setting], args.folder)
        for name in ("start", "trained"):
            known = {
                x.term for x in read(args.csv, Pull) if (x.setting, x.student) == (setting, name)
            }
            missing = [term for term in TERMS if term not in known]
            if not missing:
                continue
            student = bench.untrained()
            if name == "trained":
                student = bench.trained(
                    "cross-entropy", REGIMES["fresh"], rate=RATES[setting], alpha=0.5,
                    seed=DEV_SEED,
                )  # fmt: skip
            for pull in pulls(bench, student, name, missing):
                append(args.csv, pull)
                print(
                    f"{setting}, {name}, {pull.term}: norm {pull.norm:.2f}, cosine "
                    f"{pull.cosine:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
