"""One whole run of the sweep, on tiny models."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.quality import __main__ as sweep
from benchmarks.quality import accidents, gradients, run
from benchmarks.quality.settings import (
    ACCIDENTS,
    BOUNDS,
    REGIMES,
    SETTINGS,
    TRIES,
    UNTRAINED,
    Regime,
    Setting,
)
from benchmarks.quality.table import append, read
from sra.progress import peak_gib
from tests import tiny

REGIME = Regime("fresh", "one pass", rows=8, steps=5)


@pytest.fixture
def setting(tmp_path, monkeypatch):
    student, teacher = tiny.write_checkpoints(tmp_path)
    rows = [{**row, "prompt": f"{row['prompt']} {i}"} for i in range(5) for row in tiny.ROWS]
    monkeypatch.setattr(run, "fetch_instructions", lambda language: list(rows))
    monkeypatch.setattr(run, "SPLITS", {"dev": slice(0, 4), "test": slice(4, 10)})
    monkeypatch.setattr(run, "DEV", 4)
    monkeypatch.setattr(run, "TEST", 6)
    monkeypatch.setattr(run, "ANSWERED", 2)
    monkeypatch.setattr(run, "MAX_TOKENS", 100)
    return Setting("tiny", "A tiny pair", str(student), str(teacher), 2, "en", "zh", "tiny")


@pytest.mark.parametrize(
    "variant", ["cross-entropy", "seqkd", "dskd", "respell + likelihood", ACCIDENTS]
)
def test_a_run_is_measured(setting, tmp_path, variant):
    bench = run.Bench(setting, tmp_path / "runs")
    made = bench.run(variant, REGIME, "test", rate=1e-3, alpha=0.5, seed=1)
    assert (made.setting, made.regime, made.variant, made.split) == (
        "tiny", "fresh", variant, "test",
    )  # fmt: skip
    assert (made.learning_rate, made.alpha, made.seed, made.steps) == (1e-3, 0.5, 1, 5)
    assert 0 < made.bits_per_byte < 20
    assert 0 <= made.agreement <= 1
    assert made.rouge_l >= 0
    assert made.other_bits_per_byte > 0
    assert made.seconds_a_step > 0
    again = bench.run(variant, REGIME, "dev", rate=1e-3, alpha=0.5, seed=1)
    assert math.isnan(again.agreement)
    if variant == "seqkd":
        file = tmp_path / "runs" / "tiny" / "answers.jsonl"
        answered = [json.loads(line) for line in file.read_text().splitlines()]
        asked = {row["prompt"]: row["completion"] for row in bench.rows}
        assert answered
        assert all(row["completion"] != asked[row["prompt"]] for row in answered)


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_answers_without_an_end_are_kept_of_a_base_model_alone(
    setting, tmp_path, monkeypatch, template
):
    bench = run.Bench(setting, tmp_path / "runs")
    bench.tokenizers[1].chat_template = template
    monkeypatch.setattr(run, "MAX_TOKENS", 1)  # in which nothing ends
    assert bool(bench.answered()) == (template is None)


@pytest.mark.parametrize("name", BOUNDS)
def test_what_is_not_trained_is_measured_on_the_same_rows(setting, tmp_path, name):
    bench = run.Bench(setting, tmp_path / "runs")
    made = bench.run(name, UNTRAINED, "test", rate=0.0, alpha=0.0, seed=0)
    model, tokenizer = (
        (bench.untrained(), bench.tokenizers[0])
        if name == "start"
        else (run.load_model(setting.teacher), bench.tokenizers[1])
    )
    want = run.bits_per_byte(model, tokenizer, bench.rows[4:10], max_length=1024)
    assert made.bits_per_byte == pytest.approx(want, rel=1e-2)  # teachers are in bf16 on some
    assert made.other_bits_per_byte > 0
    assert math.isnan(made.agreement) == (name == "teacher")
    assert made.seconds_a_step == 0


def test_a_run_that_is_timed_is_not_measured(setting, tmp_path):
    bench = run.Bench(setting, tmp_path / "runs")
    made = bench.run("respell", REGIME, "speed", rate=1e-3, alpha=0.5, seed=0)
    assert made.seconds_a_step > 0
    assert math.isnan(made.bits_per_byte)
    assert math.isnan(made.rouge_l)


@pytest.mark.models
def test_timed_alone(tmp_path):
    """In a process of its own, whose peak of memory is not this one's."""
    student, teacher = tiny.write_checkpoints(tmp_path)
    setting = Setting("tiny", "A tiny pair", str(student), str(teacher), 2, "en", "zh", "tiny")
    mine = torch.zeros(1 << 28)  # 1 GiB
    made = run.timed(setting, tmp_path, "uld", REGIME, rate=1e-4, alpha=0.5, seed=0)
    assert mine.sum() == 0
    assert (made.variant, made.split) == ("uld", "speed")
    assert made.seconds_a_step > 0
    assert made.peak_gib < peak_gib() - 0.5


def test_gradients_of_every_term(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "SETTINGS", {"tiny": setting})
    monkeypatch.setattr(gradients, "REGIMES", {"fresh": REGIME})
    monkeypatch.setattr(gradients, "RATES", {"tiny": 1e-3})
    file = tmp_path / "gradients.csv"
    command = ["--settings", "tiny", "--csv", str(file), "--folder", str(tmp_path / "runs")]
    gradients.main(command)
    found = read(file, gradients.Pull)
    assert [(x.student, x.term) for x in found] == [
        (student, term) for student in ("start", "trained") for term in gradients.TERMS
    ]
    assert all(x.norm > 0 and -1 <= x.cosine <= 1 for x in found)
    alone = {x.term: x.cosine for x in found if x.student == "start"}
    assert alone["cross-entropy"] > 0.5
    before = file.read_bytes()
    gradients.main(command)
    assert file.read_bytes() == before


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "rows"), [("prune-qwen", 256), ("prune-gemma", 256), ("chinese", 116), ("same", 256)]
)
def test_as_many_rows_fit_as_the_page_says(name, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda name: tiny.student_model())
    monkeypatch.setattr(run, "prune_layers", lambda model, layers: None)
    bench = run.Bench(SETTINGS[name], tmp_path)
    assert len(bench.train_rows(REGIMES["fresh"])) == rows
    assert len(bench.other) == run.OTHER


def test_every_method_sees_the_same_rows_in_the_same_order(setting, tmp_path, monkeypatch):
    seen = []
    original = run.SpanCollator.__call__

    def remember(self, rows):
        if self is not bench.collator:  # by which the teacher reads
            seen[-1].append([row["prompt"] for row in rows])
        return original(self, rows)

    bench = run.Bench(setting, tmp_path / "runs")

    def remember_questions(tokenizer, prompt):
        if not seen[-1] or len(seen[-1][-1]) == run.BATCH:
            seen[-1].append([])
        seen[-1][-1].append(prompt)
        return prompt

    monkeypatch.setattr(run.SpanCollator, "__call__", remember)
    monkeypatch.setattr(accidents, "question", remember_questions)
    for variant in ("cross-entropy", "uld", "paper", ACCIDENTS):
        seen.append([])
        bench.run(variant, REGIME, "dev", rate=1e-3, alpha=0.5, seed=2)
    assert [batches[: REGIME.steps] for batches in seen] == [seen[0][: REGIME.steps]] * 4


def test_a_run_that_diverges_is_kept_as_one_that_did(setting, tmp_path):
    bench = run.Bench(setting, tmp_path / "runs")
    made = bench.run("cross-entropy", REGIME, "dev", rate=1e30, alpha=0.5, seed=1)
    assert math.isnan(made.bits_per_byte)


def test_two_commands_at_once_write_a_run_once(setting, tmp_path, monkeypatch):
    file = tmp_path / "quality.csv"

    class Beside(run.Bench):
        def run(self, *what, **options):
            found = super().run(*what, **options)
            append(file, found)  # the other command was faster
            return found

    monkeypatch.setattr(sweep, "SETTINGS", {"tiny": setting})
    monkeypatch.setattr(sweep, "REGIMES", {"fresh": REGIME})
    monkeypatch.setattr(sweep, "Bench", Beside)
    sweep.main(["--csv", str(file), "--folder", str(tmp_path), "--settings", "tiny", "--variants"])
    assert [one.variant for one in read(file)] == [*BOUNDS]


def test_a_stopped_sweep_goes_on(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "SETTINGS", {"tiny": setting})
    monkeypatch.setattr(sweep, "REGIMES", {"fresh": REGIME})
    monkeypatch.setattr(sweep.page, "write", lambda *found: written.append(found))
    monkeypatch.setattr(  # in this process, which knows the tiny rows
        sweep, "timed",
        lambda setting, folder, variant, regime, **options: run.Bench(setting, folder).run(
            variant, regime, "speed", **options
        ),
    )  # fmt: skip
    written = []
    file = tmp_path / "quality.csv"
    command = ["--csv", str(file), "--folder", str(tmp_path / "runs"), "--variants", "boundary"]
    sweep.main([*command, "--minutes", "0.001"])
    assert len(read(file)) == 1
    assert "The same command goes on" in capsys.readouterr().out
    sweep.main(command)
    done = read(file)
    assert [one.variant for one in done[:2]] == [*BOUNDS]
    assert [one.split for one in done[2:]] == ["dev"] * TRIES + ["test"] * 3 + ["speed"]
    before = file.read_bytes()
    sweep.main(command)
    assert file.read_bytes() == before
    assert not written  # docs/evidence.md is of the committed CSV
    monkeypatch.setattr(sweep, "CSV", file)
    sweep.main(command)
    assert len(written) == 1
