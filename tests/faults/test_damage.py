"""Losses that are not finite, bad rows, dead data workers and damaged files: each says how to go
on, and the last whole checkpoint stays."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sra import SpanDistiller
from sra.run_record import checkpoints, last_checkpoint, worker_failure
from sra.trainer import SRAConfig, SRATrainer
from tests import tiny
from tests.faults.children import KillAtWrite, sra, start
from tests.faults.runs import assert_same, left


def said(log):
    """What the command says: one message, no traceback."""
    text = log.read_text()
    assert "Traceback" not in text, text
    return text.rpartition("sra distill: ")[2]


def contents(output):
    return {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


# --- a loss that is not finite ---


@pytest.mark.parametrize("recipe", ["paper", "cross-entropy"])
def test_weights_that_are_not_finite_get_into_no_checkpoint(folder, tmp_path, recipe):
    output, log = tmp_path / "run", tmp_path / "log"
    argv = folder.argv(output, "--save-steps", "1", "--max-grad-norm", "0", "--recipe", recipe)
    assert sra([*argv, "--learning-rate", "1e36"], log) == 1
    message = said(log)
    step = int(re.match(r"Step (\d+) left weights that are not finite \(student\.", message)[1])
    for term in ("loss", "ce", "cosine", "geometry", "logit")[: 5 if recipe == "paper" else 2]:
        assert f"{term} " in message
    assert "The last checkpoint is untouched. Lower learning_rate" in message
    assert 1 < step < 8
    assert last_checkpoint(output).name == f"checkpoint-{step - 1}"
    for file in ("model.safetensors", "optimizer.pt"):
        assert (output / f"checkpoint-{step - 1}" / file).exists()
    for name, value in load_file(output / f"checkpoint-{step - 1}/model.safetensors").items():
        assert value.isfinite().all(), name
    assert not (output / "student").exists()


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    """Of finite weights: a batch that overflows."""
    forward = SpanDistiller.forward

    def overflows(self, **batch):
        output = forward(self, **batch)
        if trainer.state.global_step == 2:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(SpanDistiller, "forward", overflows)
    trainer = SRATrainer(
        tiny.student_model(),
        tiny.teacher_model(),
        SRAConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="steps",
            save_steps=1, max_steps=4, per_device_train_batch_size=2, recipe="paper",
        ),
        train_dataset=tiny.ROWS,
        processing_class=tiny.student_tokenizer(),
        teacher_processing_class=tiny.teacher_tokenizer(),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"The loss of step 3 is not finite \(ce 5.*logit "):
        trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


# --- rows ---


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_of_a_stream(folder, tmp_path, workers):
    output, log, data = tmp_path / "run", tmp_path / "log", tmp_path / "rows.jsonl"
    tiny.write_jsonl(data, [*tiny.ROWS, {"prompt": "x"}, *tiny.ROWS])
    more = ("--dataset-streaming", "--data", data, "--dataloader-num-workers", workers)
    argv = folder.argv(output, *more)
    assert sra(argv, log) == 1
    assert said(log).startswith(f"{data}, line 9: there is no 'completion', only prompt.")
    assert last_checkpoint(output) is not None
    tiny.write_jsonl(data, [*tiny.ROWS, tiny.ROWS[0], *tiny.ROWS])
    assert sra([*argv, "--resume"], log) == 0, log.read_text()
    assert (output / "student" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ('{"prompt": "x"}\n', "line 9: there is no 'completion'"),
        ('{"prompt": "x", "compl', "line 9: not JSON ("),
    ],
    ids=["bad", "truncated"],
)
def test_a_bad_row_in_memory_is_found_before_anything_is_written(folder, tmp_path, tail, message):
    output, log, data = tmp_path / "run", tmp_path / "log", tmp_path / "rows.jsonl"
    data.write_text(folder.data.read_text() + tail)
    assert sra(folder.argv(output, "--data", data), log) == 1
    assert said(log).startswith(f"{data}, {message}")
    assert not output.exists()


# --- data workers ---


def test_a_dead_data_worker(folder, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    more = ("--dataset-streaming", "--dataloader-num-workers", 1, "--max-steps", 2000)
    argv = folder.argv(output, *more)
    child = start(argv, log)
    try:
        wait(lambda: last_checkpoint(output))
        os.kill(worker_of(child.process.pid), signal.SIGKILL)
        code = child.end()
    finally:
        child.process.kill()
    assert code == 1, log.read_text()[-3000:]
    message = said(log)
    assert message.startswith("A data worker died (")
    assert "lower dataloader_num_workers. The last checkpoint is untouched; resume." in message
    assert last_checkpoint(output) is not None


def wait(done):
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def worker_of(pid):
    """Linux: the first child of a process."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(listed[0])


def test_what_a_worker_says_is_its_last_words():
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "a.py", line 1, in f\n    g()\nKeyError: 1\n\nDuring handling, another:\n\n'
        'Traceback (most recent call last):\n  File "b.py", line 2\nValueError: rows.jsonl, line '
        "9: no\nRename it.\n"
    )
    assert worker_failure(ValueError(text)) == "rows.jsonl, line 9: no\nRename it."
    assert worker_failure(RuntimeError("The loss of step 3 is not finite")) is None


# --- damaged files ---


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "projector.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
     "config.json"],
)  # fmt: skip
def test_a_damaged_file_of_the_last_checkpoint(folder, finished, copied, tmp_path, name):
    log, path = tmp_path / "log", copied / "checkpoint-8" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = contents(copied)
    argv = [*folder.argv(copied), "--resume"]
    assert sra(argv, log) == 1
    message = said(log)
    assert message.startswith(f"{path} is missing or damaged (")
    assert "Delete the folder checkpoint-8 and resume: the run goes on from the chec" in message
    assert contents(copied) == before
    shutil.rmtree(path.parent)
    assert sra(argv, log) == 0, log.read_text()
    assert_same(left(copied), finished[1])


def test_a_missing_optimizer_is_no_fresh_one(folder, copied, tmp_path):
    path = copied / "checkpoint-8" / "optimizer.pt"
    path.unlink()
    assert sra([*folder.argv(copied), "--resume"], tmp_path / "log") == 1
    assert said(tmp_path / "log").startswith(f"{path} is missing or damaged (")


def test_a_half_written_checkpoint_does_not_count_among_those_that_are_kept(
    folder, finished, tmp_path
):
    output = tmp_path / "run"
    shutil.copytree(finished[0] / "checkpoint-8", output / "checkpoint-9")
    (output / "checkpoint-9" / "trainer_state.json").unlink()
    argv = folder.argv(output, "--save-total-limit", "1")
    assert sra(argv, tmp_path / "log", KillAtWrite(str(output / "checkpoint-6"), 1)) < 0
    assert checkpoints(output) == [output / "checkpoint-4"]


@pytest.mark.parametrize("record", ["{", "[1]", '{"config": 3, "inputs": []}'])
def test_a_damaged_record(folder, copied, tmp_path, record):
    log = tmp_path / "log"
    (copied / "run.json").write_text(record)
    argv = [*folder.argv(copied), "--resume"]
    if record.endswith("]}"):  # it says nothing to compare with
        assert sra(argv, log) == 0, log.read_text()
        return
    assert sra(argv, log) == 1
    assert said(log).startswith(f"{copied / 'run.json'} is damaged: ")
    (copied / "run.json").unlink()
    assert sra(argv, log) == 0, log.read_text()
    assert json.loads((copied / "run.json").read_text())["config"]["seed"] == 0
