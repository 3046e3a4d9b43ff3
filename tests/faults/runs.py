"""A small run of `sra distill`, and what it leaves, for the tests of what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny

STEPS, EVERY = 8, 2
# Of the machine and the moment, not of the run.
MEASURED = ("tokens_per_second", "peak_gib")


class Folder:
    """Checkpoints of the tiny pair and data, to run in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pair = tiny.write_checkpoints(path)
        config = self.pair[0] / "config.json"
        # The random state is part of the result.
        config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))
        self.data = tiny.write_jsonl(path / "rows.jsonl", tiny.ROWS)

    def argv(self, output: Path, *more: Any) -> list[str]:
        """The command, with as many of its parts as resume must restore."""
        return [
            "distill", *map(str, self.pair), "--data", str(self.data), "--output", str(output),
            "--recipe", "paper", "--gamma", "1", "--batch-size", "2", "--max-steps", str(STEPS),
            "--save-steps", str(EVERY), "--learning-rate", "3e-3", "--cpu", "--dtype", "float32",
            "--disable-tqdm", *map(str, more),
        ]  # fmt: skip


def left(output: Path) -> dict[str, Any]:
    """All that a finished run left, by name: bytes of weights, the log, the files."""
    last = output / f"checkpoint-{STEPS}"
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {
        "student": (output / "student" / "model.safetensors").read_bytes(),
        "projector": (output / "student" / "projector.safetensors").read_bytes(),
        "log": [{k: v for k, v in log.items() if k not in MEASURED} for log in history],
        "optimizer": (last / "optimizer.pt").read_bytes(),
        "files": sorted(str(path.relative_to(output)) for path in output.rglob("*")),
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in theirs:
        if name == "files":
            differ = set(ours[name]) ^ set(theirs[name])
            assert not differ, sorted(differ)
        assert ours[name] == theirs[name], name
