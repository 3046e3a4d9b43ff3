"""`sra doctor` as a command, on checkpoints small enough to train here."""

from __future__ import annotations

import argparse
import json

import pytest

import sra.doctor
from sra import objective
from sra.commands import doctor
from tests import tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tuple(map(str, tiny.write_checkpoints(tmp_path_factory.mktemp("checkpoints"))))


@pytest.fixture
def data(tmp_path):
    return str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.ROWS))


def run(*argv):
    parser = argparse.ArgumentParser()
    doctor.add(parser.add_subparsers())
    args = parser.parse_args(["doctor", *map(str, argv), "--cpu", "--dtype", "float32"])
    return args.run(args)


def test_a_report_to_read(pair, data, capsys):
    assert run(*pair, "--data", data) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny-student ← tiny-teacher, 8 rows: good")
    for topic in ("coverage", "student head", "teacher head", "memory", "time"):
        assert f" {topic} " in said


def test_a_report_for_programs(pair, data, capsys):
    assert run(*pair, "--data", data, "--json", "--rows", "3", "--memory", "0.0001") == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["exit_code"]) == (3, 2)
    assert told["plan"]["memory_bytes"]
    memory = next(f for f in told["findings"] if f["topic"] == "memory")
    assert memory["level"] == "warning"
    assert memory["remedy"]


def test_measured_steps(pair, data, capsys):
    assert run(*pair, "--data", data, "--measure", "2") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "measured" in said
    assert "bits per byte" in said
    assert "the teacher gives what the student can spell" in said


def test_the_recipes_are_those_of_the_objective():
    parser = argparse.ArgumentParser()
    doctor.add(parser.add_subparsers())
    args = parser.parse_args(["doctor", "a", "b", "--data", "c"])
    assert args.recipe == objective.DEFAULT
    assert {*doctor.RECIPES} == {*objective.RECIPES}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([], "normalised"),
        (["--recipe", "paper"], "raw"),
        (["--recipe", "paper", "--vocabulary-match", "normalised"], "normalised"),
    ],
)
def test_vocabularies_are_paired_as_the_recipe_does(pair, data, monkeypatch, options, match):
    asked = []
    look = sra.doctor.diagnose
    monkeypatch.setattr(sra.doctor, "diagnose", lambda *a, **k: asked.append(k) or look(*a, **k))
    assert run(*pair, "--data", data, *options) in (0, 2)
    assert [k["vocabulary_match"] for k in asked] == [match]


def test_a_count_that_is_none(pair, data):
    with pytest.raises(ValueError, match="--rows 0: it must be at least 1"):
        run(*pair, "--data", data, "--rows", "0")
