"""What `sra report` measures with the run's models, and the command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from sra import SpanAligner, SpanCollator, bits_per_byte
from sra.commands import report as command
from sra.evaluation.span_comparison import ComparedRow, span_agreement
from sra.loading import load_model, load_tokenizer
from sra.report import models
from sra.report.models import measure, sample, trained_student
from sra.report.page import page
from sra.report.run import read_run
from tests import tiny
from tests.report import made
from tests.report.reader import Reader


def run(*argv):
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    args = parser.parse_args(["report", *map(str, argv)])
    return args.run(args)


@pytest.fixture(scope="module")
def run_with_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny.write_checkpoints(folder)
    run = made.write_run(folder / "run", student=str(student), teachers=[str(teacher)])
    tiny.student_model(seed=7).save_pretrained(run / "student")
    tiny.student_tokenizer().save_pretrained(run / "student")
    return run


def test_before_after_and_teacher_are_measured(run_with_models):
    report = read_run(run_with_models)
    measure(report, tiny.ROWS, "rows.jsonl")
    folders = {
        "before": report.run["student"],
        "after": run_with_models / "student",
        "teacher": report.run["teachers"][0],
    }
    # As they are loaded: transformers takes a model's own tokenizer class for a generic one.
    pairs = {side: (load_model(f), load_tokenizer(f)) for side, f in folders.items()}
    for side, pair in pairs.items():
        want = bits_per_byte(*pair, tiny.ROWS)
        assert report.figures[side]["bits_per_byte"] == pytest.approx(want, rel=1e-6)
    for side in ("before", "after"):
        collator = SpanCollator(SpanAligner(pairs[side][1], pairs["teacher"][1]))
        want = span_agreement(
            pairs[side][0], pairs["teacher"][0], tiny.ROWS, collator, tiny.vocabulary()
        )
        assert report.figures[side]["agreement"] == want
    assert "8 rows of rows.jsonl" in report.source
    assert len(report.samples) == len(tiny.ROWS)
    worst = [one.divergence for one in report.samples]
    assert worst == sorted(worst, reverse=True)
    for one in report.samples:
        shown = "".join(piece[0] for piece in one.pieces).removesuffix("</s>")
        assert shown == tiny.ROWS[one.row]["completion"]
        assert one.context == tiny.ROWS[one.row]["prompt"]
    shown = Reader(page(report)).text
    assert f"{report.figures['teacher']['bits_per_byte']:.4f}" in shown
    assert "Agreement with the teacher" in shown


def test_revisions_of_the_run_are_measured(run_with_models, monkeypatch):
    """Not what the hub's branch holds by now."""
    seen = {}

    def recorded(name, *, revision=None, **options):
        seen[Path(name).name] = revision
        return load_model(name, **options)

    monkeypatch.setattr(models, "load_model", recorded)
    monkeypatch.setattr(models, "load_tokenizer", lambda name, **_: load_tokenizer(name))
    report = read_run(run_with_models)
    report.run["inputs"] = {"model_revision": "abc", "teacher_model_revision": "def"}
    measure(report, tiny.ROWS[:2], "rows.jsonl")
    assert seen == {"tiny-student": "abc", "tiny-teacher": "def", "student": None}


def test_a_model_that_is_gone_is_left_out(run_with_models, tmp_path):
    record = json.loads((run_with_models / "run.json").read_text())
    report = read_run(run_with_models)
    report.run = record | {"student": str(tmp_path / "gone"), "teachers": [str(tmp_path / "away")]}
    measure(report, tiny.ROWS[:2], "rows.jsonl")
    assert set(report.figures) == {"after"}
    shown = Reader(page(report)).text
    assert f"the student before training, {tmp_path / 'gone'}" in shown
    assert "Name it with --teacher" in shown
    with pytest.raises(ValueError, match="Cannot read the model"):
        measure(report, tiny.ROWS[:2], "rows.jsonl", teacher=str(tmp_path / "typo"))


def test_characters_that_a_border_divides(run_with_models):
    tokenizer = tiny.student_tokenizer()
    ids = tokenizer("🐸a", add_special_tokens=False).input_ids
    assert len(ids) > 3  # the frog is several tokens
    spans = [(i, i + 1) for i in range(len(ids))]
    bits = [float(i) for i in range(len(ids))]
    row = ComparedRow(ids, [True] * len(ids), spans, bits, ids, ids)
    pieces = sample(0, {"text": "🐸a"}, row, tokenizer).pieces
    assert [piece[0] for piece in pieces] == ["🐸", "a"]
    assert pieces[0][1] == len(ids) - 2  # the piece that completes it


def test_text_that_no_span_holds(run_with_models):
    """Before the spans, between them and behind them; a prompt and the end are left out."""
    tokenizer = tiny.student_tokenizer()
    ids = tokenizer("abcdefg", add_special_tokens=False).input_ids
    assert len(ids) > 5
    learnt = [False] + [True] * len(ids)
    row = ComparedRow(
        [*ids, tokenizer.eos_token_id], learnt, [(2, 3), (4, 5)], [1.0, 2.0], ids[:2], ids[:2]
    )
    pieces = sample(0, {"text": "abcdefg"}, row, tokenizer).pieces
    assert "".join(piece[0] for piece in pieces) == tokenizer.decode(ids[1:])
    assert [piece[1] for piece in pieces] == [None, 1.0, None, 2.0, None]


def test_the_newest_checkpoint_stands_in_for_the_student(run_with_models, tmp_path):
    assert trained_student(run_with_models) == run_with_models / "student"
    for step in (5, 30, 200):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if step < 200:  # an adapter's has no config.json either
            (folder / "trainer_state.json").write_text("{}")
    assert trained_student(tmp_path).name == "checkpoint-30"
    with pytest.raises(ValueError, match="holds no student yet"):
        trained_student(tmp_path / "nothing")


def test_the_command(run_with_models, tmp_path, capsys):
    data = tiny.write_jsonl(tmp_path / "held out.jsonl", tiny.ROWS)
    output = tmp_path / "report.html"
    assert run(run_with_models, "--data", data, "--limit", 3, "--output", output, "--cpu") == 0
    assert f"The report is {output}" in capsys.readouterr().out
    assert "3 rows of held out.jsonl" in Reader(output.read_text()).text
    assert run(run_with_models) == 0
    assert (run_with_models / "report.html").exists()
    with pytest.raises(ValueError, match=r"is a folder\. Give --output the name of the page"):
        run(run_with_models, "--data", data, "--output", tmp_path)
    with pytest.raises(ValueError, match="give --data as well"):
        run(run_with_models, "--teacher", "x")
    with pytest.raises(ValueError, match="holds no run"):
        run(tmp_path)
