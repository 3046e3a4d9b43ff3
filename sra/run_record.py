"""What a run leaves: run.json, which says what it was made of, and checkpoints to go on from."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sra.whole_file import write_whole

RECORD_FILE = "run.json"
PACKAGES = ("sra", "torch", "transformers", "tokenizers", "accelerate", "triton")
LOGGED = ("loss", "grad_norm", "ce", "cosine", "geometry", "logit", "likelihood")
MEND_NAN = (
    "The last checkpoint is untouched. Lower learning_rate or max_grad_norm, or train in float32 "
    "or bfloat16 instead of float16, in another output_dir."
)
TRAINER_STATE = "trainer_state.json"
# Another value of one of these, and the resumed run is no longer the run that was begun.
DECISIVE = (
    "method", "recipe", "alpha", "gamma", "power", "temperature", "cosine", "logit",
    "logit_state", "outside", "normaliser", "pooling", "likelihood", "likelihood_temperature",
    "direction", "beta", "layers", "vocabulary_match", "granularity", "max_length",
    "teacher_max_length", "train_turns", "teacher_weights", "projector_learning_rate",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "num_train_epochs", "max_steps", "seed",
    "data_seed", "bf16", "fp16",
)  # fmt: skip


def write_record(folder: str | Path, **entries: Any) -> None:
    """Add entries to a run's record; written whole or not at all.

    Raises:
        OSError: it cannot be written, with how to go on; the record that was there stays.
    """
    path = Path(folder) / RECORD_FILE
    record = {**read_record(folder), **entries}
    try:
        write_whole(path, json.dumps(record, indent=1, ensure_ascii=False, default=str))
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror}). Free some space, or choose another "
            "--output."
        ) from error


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `write_record` wrote; empty where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(folder) / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        record = error
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} is damaged: {record!s:.80}. Delete it: the checkpoints do not need it, but "
            "`--resume` cannot compare the settings then."
        )
    return record


def check_settings(
    folder: str | Path, config: Mapping[str, Any], inputs: Mapping[str, Any]
) -> None:
    """Compare what decides a run's result with its record.

    Args:
        config: as `SRAConfig.to_dict` gives it.
        inputs: models and data, as the record's entry "inputs" holds them.

    Raises:
        ValueError: each setting that differs, what it was and what it is.
    """
    record = read_record(folder)
    held = {**_mapping(record, "inputs"), **_mapping(record, "config")}
    given = {**inputs, **{name: config.get(name) for name in DECISIVE}}
    given = json.loads(json.dumps(given, default=str))  # as it comes back: lists for tuples
    changed = [
        f"{name}: was {held[name]!r}, now {given[name]!r}"
        for name in given
        if name in held and held[name] != given[name]
    ]
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings. {'; '.join(changed)}. Pass the old values to "
            "go on, or begin anew in another --output. (Where a file has only moved, correct its "
            f"path in {RECORD_FILE}.)"
        )


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end; None if there is none.

    A run that is killed while it saves leaves a checkpoint without its last file.
    """
    return next((path for path in reversed(checkpoints(folder)) if is_whole(path)), None)


def resumable(folder: str | Path) -> Path:
    """`last_checkpoint`, or ValueError if there is none."""
    last = last_checkpoint(folder)
    if last is None:
        raise ValueError(
            f"{folder} holds no whole checkpoint. Train without resume_from_checkpoint."
        )
    return last


def checkpoints(folder: str | Path) -> list[Path]:
    """A run's, whole or not, the oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def _mapping(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    entry = record.get(name)
    return entry if isinstance(entry, dict) else {}


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end: its last file is there, and complete."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def check_weights(model: torch.nn.Module, step: int, logged: Mapping[str, Any]) -> None:
    """Raises RuntimeError, with what was logged last, if trained weights are not finite."""
    for name, p in model.named_parameters():
        if p.requires_grad and not getattr(p, "_local_tensor", p).isfinite().all():
            terms = ", ".join(f"{k} {v:.4g}" for k, v in logged.items() if k in LOGGED)
            raise RuntimeError(
                f"Step {step} left weights that are not finite ({name}; last logged: "
                f"{terms or 'nothing'}). {MEND_NAN}"
            )


def remove_half(checkpoint: Path, error: Exception) -> str:
    """Remove a checkpoint that could not be written; returns what happened, and how to go on."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    whole = last_checkpoint(checkpoint.parent)
    return (
        f"{checkpoint} could not be written ({error}) and was removed. "
        + (f"{whole.name} is whole. " if whole else "There is no earlier checkpoint. ")
        + "Free some space (save_total_limit keeps fewer checkpoints) and resume."
    )


def remove_halves(folder: Path) -> None:
    """Remove the checkpoints of a run that were not written to their end: they count, and whole
    ones would be removed before them."""
    for path in checkpoints(folder):
        if not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def check_checkpoint(checkpoint: str | Path, needed: Iterable[str] = ()) -> int:
    """The step of a checkpoint, once none of its files was found damaged.

    Args:
        needed: names of files that must be there.

    Raises:
        ValueError: one that is missing or cut off, with its name and how to go on.
    """
    folder = Path(checkpoint)
    paths = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    paths |= {name: folder / name for name in (TRAINER_STATE, *needed)}
    for _, path in sorted(paths.items()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                zipfile.ZipFile(path).close()
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, SafetensorError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}). Delete the folder {folder.name} and "
                "resume: the run goes on from the checkpoint before it."
            ) from error
    return json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]


def worker_failure(error: Exception) -> str | None:
    """What went wrong in a data worker, in a sentence; None if an error is not of one."""
    said = str(error)
    if re.match(r"Caught \w+ in DataLoader worker", said):
        tail = said.rpartition("Traceback (most recent call last):\n")[2]
        last = re.search(r"^\S.*", tail, re.DOTALL | re.MULTILINE)
        return re.sub(r"^[\w.]+: ", "", last[0]).strip() if last else said
    # One that dies while it hands over a batch cuts the connection.
    if isinstance(error, (EOFError, ConnectionError)) or said.startswith("DataLoader worker (pid"):
        return (
            f"A data worker died ({said.strip().rstrip('.') or type(error).__name__}). Most often "
            "main memory has run out: lower dataloader_num_workers. The last checkpoint is "
            "untouched; resume."
        )
    return None


def describe_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that every run has: how it was started, and where it runs."""
    return {
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": dict(config),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
