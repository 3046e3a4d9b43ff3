"""A run's folder as a trainer leaves it, without a trainer; and rows compared, without models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sra.report.run import SampleSpans

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&"


def history(steps: int, *, evaluate_every: int = 10) -> list[dict[str, Any]]:
    logs: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "eval_bits_per_byte": 4.48}]
    for step in range(1, steps + 1):
        wave = 0.06 * math.sin(7.3 * step) + 0.04 * math.sin(2.1 * step)
        fall = math.exp(-step / (steps / 4))
        logs.append(
            {
                "step": step,
                "epoch": step / steps,
                "loss": 1.4 + 2.2 * fall + wave,
                "grad_norm": 1.1 + 3 * fall + abs(wave),
                "learning_rate": 3e-4 * (1 - step / steps),
                "ce": 1.9 + 2.4 * fall + wave,
                "cosine": 0.4 + 0.5 * fall + wave / 4,
                "logit": 0.6 + 1.7 * fall + wave,
                "bits_per_byte": 0.9 + 1.2 * fall + wave / 2,
                "shared_mass": 0.81 + wave / 10,
                "coverage": 0.998,
                "agreement": 0.62 - 0.4 * fall + wave / 5,
                "tokens_per_second": 812.0 + 90 * wave,
                "peak_gib": 3.1 + 0.2 * (1 - fall),
            }
        )
        if step % evaluate_every == 0:
            logs.append(
                {"step": step, "epoch": step / steps, "eval_bits_per_byte": 1.43 + 3 * fall}
            )
    return logs


def write_run(
    folder: Path,
    *,
    steps: int = 60,
    max_steps: int = 60,
    record: bool = True,
    **changes: Any,
) -> Path:
    """A run's folder with a checkpoint at `steps` and, if asked for, its record."""
    checkpoint = folder / f"checkpoint-{steps}"
    checkpoint.mkdir(parents=True)
    state = {"global_step": steps, "max_steps": max_steps, "log_history": history(steps)}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    if record:
        known = {
            "command": ["/usr/bin/sra", "distill", "SmolLM2", "Qwen2.5", "--data", "my file.jsonl"],
            "student": "SmolLM2-135M-Instruct",
            "teachers": ["Qwen2.5-Coder-0.5B-Instruct"],
            "config": {"recipe": "boundary", "learning_rate": 3e-4, "max_length": 512, "seed": 0}
            | {f"setting_{i}": i for i in range(40)},
            "versions": {"sra": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "machine": {"system": "Linux-6.1-x86_64", "cores": 2, "gpu": None},
            "started": "2026-02-03T04:05:06+00:00",
            "coverage": 0.9981,
            "before": {"bits_per_byte": 4.4812},
            "after": {"bits_per_byte": 1.4378},
            "teacher": {"bits_per_byte": 0.9211},
        }
        (folder / "run.json").write_text(json.dumps(known | changes))
    return folder


def samples(count: int = 12) -> list[SampleSpans]:
    words = [
        "The",
        "Nile",
        "flows",
        "through",
        "eleven",
        "countries",
        "before",
        "it",
        "reaches",
        "the",
        "sea",
        "in",
        "Egypt",
        ",",
        "and",
        "most",
        "of",
        "its",
        "water",
        "comes",
        "from",
        "the",
        "Blue",
        "Nile",
        ".\n\nfor",
        "i",
        "in",
        "range",
        "(",
        "10",
        ")",
        ":",
        "print",
        "(",
        "i",
        ")",
        "你好",
        "schöne",
        "Grüße",
    ]
    made = []
    for number in range(count):
        pieces: list[tuple[str, float | None, str | None, str | None]] = []
        for index, word in enumerate(words * 2):
            bits = abs(math.sin(3.7 * index + number)) ** 4 * 12 / (1 + number / 3)
            other = "“·a”" if bits > 1 else "“·the”"
            pieces.append((f" {word}", bits, other, "“·the”"))
        pieces.insert(5, (HOSTILE, None, None, None))
        pieces.insert(6, (HOSTILE, 2.5, HOSTILE, HOSTILE))
        listed = [bits for _, bits, _, _ in pieces if bits is not None]
        made.append(
            SampleSpans(
                number,
                "Write about a river of Egypt, then count. " * 3,
                pieces,
                sum(listed) / len(listed),
                0.61,
            )
        )
    return made
