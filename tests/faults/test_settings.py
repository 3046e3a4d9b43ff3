"""`--resume` with other settings than the run was begun with."""

from __future__ import annotations

import shutil

import pytest

from sra.run_record import check_settings, write_record
from tests import tiny
from tests.faults.children import sra
from tests.faults.runs import assert_same, left


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (("--recipe", "boundary"), ["recipe: was 'paper', now 'boundary'"]),
        (
            ("--learning-rate", "1e-3", "--gamma", "2"),
            ["learning_rate: was 0.003, now 0.001", "gamma: was 1.0, now 2.0"],
        ),
        (("--temperature", "1"), ["temperature: was None, now 1.0"]),
        (("--batch-size", "4"), ["rows_per_step: was 2, now 4"]),
        (("--accumulate", "2"), ["rows_per_step: was 2, now 4"]),
        (("--seed", "7"), ["seed: was 0, now 7"]),
        (("--max-length", "64"), ["max_length: was 512, now 64"]),
        (("--max-steps", "20"), ["max_steps: was 8, now 20", "warmup_steps: was 1, now 2"]),
        (("--dataset-streaming",), ["dataset_streaming: was False, now True"]),
        (("--use-peft",), ["use_peft: was False, now True"]),
        (("--bf16", "True"), ["bf16: was False, now True"]),
        (("--layers", "-1:-1"), ["layers: was None, now ['-1:-1']"]),
    ],
)
def test_a_changed_setting_is_refused(folder, copied, tmp_path, options, changes):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    assert sra([*folder.argv(copied, *options), "--resume"], tmp_path / "log") == 1
    said = (tmp_path / "log").read_text().rpartition("sra distill: ")[2]
    assert said.startswith(f"{copied} was begun with other settings. ")
    for change in changes:
        assert change in said
    assert "Pass the old values to go on, or begin anew in another --output." in said
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_other_models_and_data_are_refused(folder, copied, tmp_path):
    data = tiny.write_jsonl(tmp_path / "other.jsonl", tiny.ROWS)
    student = tmp_path / "student"
    shutil.copytree(folder.pair[0], student)
    argv = folder.argv(copied, "--data", data, "--resume")
    argv[1] = str(student)
    assert sra(argv, tmp_path / "log") == 1
    said = (tmp_path / "log").read_text()
    assert f"student: was '{folder.pair[0]}', now '{student}'" in said
    assert f"data: was '{folder.data}', now '{data}'" in said


def test_what_does_not_change_the_result_may_change(folder, finished, copied, tmp_path):
    shutil.rmtree(copied / "checkpoint-8")
    options = ("--logging-steps", "1", "--save-total-limit", "3", "--dataloader-num-workers", "1")
    argv = folder.argv(copied, *options, "--batch-size", "1", "--accumulate", "2", "--resume")
    assert sra(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert left(copied)["log"][-1]["loss"] == pytest.approx(finished[1]["log"][-1]["loss"], 1e-2)


def test_the_dtype_is_that_of_the_start(folder, finished, copied, tmp_path):
    """Which is faster is tried out, and a busy machine may answer otherwise the second time."""
    shutil.rmtree(copied / "checkpoint-8")
    argv = folder.argv(copied, "--dtype", "auto", "--resume")
    assert sra(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same(left(copied), finished[1])


def test_resume_from_checkpoint_is_not_passed_over(folder, tmp_path):
    argv = folder.argv(tmp_path / "run", "--resume-from-checkpoint", "../other/checkpoint-2")
    assert sra(argv, tmp_path / "log") == 1
    said = (tmp_path / "log").read_text()
    assert "sra distill: resume_from_checkpoint is for loops of your own." in said
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_begun_elsewhere_is_compared_in_what_it_says(tmp_path):
    write_record(tmp_path, config={"seed": 1, "save_steps": 3})
    check_settings(tmp_path, {"seed": 1, "save_steps": 9}, {"data": "x"})
    with pytest.raises(ValueError, match="seed: was 1, now 2"):
        check_settings(tmp_path, {"seed": 2}, {"data": "x"})
    check_settings(tmp_path / "nowhere", {"seed": 2}, {})
