"""No room for a file: what was whole stays whole, the message says so, and resume goes on."""

from __future__ import annotations

import pytest

from sra.run_record import checkpoints, is_whole, read_record, write_record
from tests.faults.children import FullDisk, sra
from tests.faults.runs import assert_same, left


@pytest.mark.parametrize(
    ("where", "size"),
    [
        ("checkpoint-4", 300),
        ("checkpoint-4", 30_000),
        ("checkpoint-4/tokenizer_config.json", 90_000),
        ("checkpoint-4/trainer_state.json", 500),
    ],
    ids=["configuration", "weights", "optimizer", "trainer state"],
)
def test_a_checkpoint_without_room(folder, finished, tmp_path, where, size):
    output, log = tmp_path / "run", tmp_path / "log"
    argv = folder.argv(output)
    assert sra(argv, log, FullDisk(where, size)) == 1
    said = log.read_text().rpartition("sra distill: ")[2]
    assert f"{output / 'checkpoint-4'} could not be written (" in said
    assert "was removed. checkpoint-2 is whole. Free some space (save_total_limit " in said
    assert "Traceback" not in log.read_text()
    assert checkpoints(output) == [output / "checkpoint-2"]
    assert is_whole(output / "checkpoint-2")
    assert sra([*argv, "--resume"], log) == 0, log.read_text()
    assert_same(left(output), finished[1])


def test_no_room_for_the_first_checkpoint(folder, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    assert sra(folder.argv(output), log, FullDisk("checkpoint-2", 30_000)) == 1
    assert "was removed. There is no earlier checkpoint. Free some space" in log.read_text()
    assert not checkpoints(output)


def test_no_room_for_the_student(folder, finished, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    argv = folder.argv(output)
    assert sra(argv, log, FullDisk("student.part", 30_000)) == 1
    said = log.read_text().rpartition("sra distill: ")[2]
    assert f"{output / 'student'} could not be written (" in said
    assert "go on with --resume, which only writes the student" in said
    assert not [*output.glob("student*")]
    assert sra([*argv, "--resume"], log) == 0, log.read_text()
    assert_same(left(output), finished[1])


def test_no_room_for_the_record(folder, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    assert sra(folder.argv(output), log, FullDisk("run.json.tmp", 50)) == 1
    said = log.read_text().rpartition("sra distill: ")[2]
    assert f"{output / 'run.json'} could not be written (File too large). Free some" in said
    assert not [*output.iterdir()]


def test_a_record_that_cannot_grow_stays(tmp_path, monkeypatch):
    write_record(tmp_path, student="a")
    monkeypatch.setattr("os.replace", _no_room)
    with pytest.raises(OSError, match=r"run\.json could not be written \(No space left"):
        write_record(tmp_path, student="b")
    assert read_record(tmp_path) == {"student": "a"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def _no_room(*_):
    raise OSError(28, "No space left on device")
