"""The sweep of methods: what it runs next, what it keeps, and what the page says of it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks.quality import page
from benchmarks.quality.__main__ import best, cases
from benchmarks.quality.settings import (
    MORE_RATES,
    RATES,
    REGIMES,
    SEEDS,
    SETTINGS,
    SHARES,
    VARIANTS,
)
from benchmarks.quality.table import Run, append, read
from sra import SRAConfig


def made(case, bits=1.0, **changes):
    setting, regime, variant, split, rate, alpha, seed = case
    run = Run(
        setting=setting, regime=regime.name, variant=variant, split=split, learning_rate=rate,
        alpha=alpha, seed=seed, steps=regime.steps, bits_per_byte=bits, agreement=0.5, rouge_l=10.0,
        other_bits_per_byte=2.0, seconds_a_step=1.0, peak_gib=3.0,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def sweep(score, variants, **options):
    """Every run of one setting and regime, in order, with the score that `score` gives each."""
    done = []
    given = {"small": False, **options}
    while case := next(cases(done, ["prune-qwen"], [REGIMES["fresh"]], variants, **given), None):
        done.append(made(case, score(case)))
        assert len(done) < 100
    return done


def test_rates_then_shares_then_seeds():
    def score(case):
        return abs(case[4] - 1e-3) + abs(case[5] - 0.8)

    done = sweep(score, ["paper"])
    dev = [(run.learning_rate, run.alpha) for run in done if run.split == "dev"]
    assert dev == [*((rate, 0.5) for rate in RATES), *((1e-3, share) for share in SHARES)]
    test = [(run.learning_rate, run.alpha, run.seed) for run in done if run.split == "test"]
    assert test == [(1e-3, 0.8, seed) for seed in SEEDS]


def test_every_method_is_tried_as_often():
    for variant in ("cross-entropy", "seqkd", "uld"):
        done = sweep(lambda case: case[4], [variant])
        assert sum(run.split == "dev" for run in done) == 6
    rates = {run.learning_rate for run in sweep(lambda case: case[4], ["cross-entropy"])}
    assert rates == {*RATES, *MORE_RATES}


def test_a_run_that_diverged_is_never_the_best():
    done = sweep(lambda case: math.nan if case[4] == 1e-4 else 1.0, ["alm"])
    assert best(done).learning_rate == 3e-4
    assert all(run.learning_rate == 3e-4 for run in done if run.split == "test")


def test_an_ablation_takes_what_was_chosen_for_its_recipe():
    done = sweep(lambda case: case[4], ["paper: logit"])
    assert [run.variant for run in done] == ["paper"] * 6 + ["paper: logit"] * 3
    assert {(run.learning_rate, run.alpha) for run in done[6:]} == {(1e-4, 0.5)}
    assert [*cases([], ["prune-gemma"], [REGIMES["fresh"]], ["paper: logit"], False)] == []


def test_small_runs_each_method_once():
    done = sweep(lambda case: 1.0, ["cross-entropy", "uld"], small=True)
    assert [(run.variant, run.split, run.learning_rate) for run in done] == [
        ("cross-entropy", "test", 3e-4), ("uld", "test", 3e-4),
    ]  # fmt: skip


def test_the_csv_gives_back_what_was_written(tmp_path):
    runs = sweep(lambda case: 1.23456, ["paper"])
    runs[0] = dataclasses.replace(runs[0], bits_per_byte=math.nan)
    for run in runs:
        append(tmp_path / "a" / "b.csv", run)
    kept = read(tmp_path / "a" / "b.csv")
    assert kept[1:] == runs[1:]
    assert math.isnan(kept[0].bits_per_byte)
    assert dataclasses.replace(kept[0], bits_per_byte=0) == dataclasses.replace(
        runs[0], bits_per_byte=0
    )
    assert read(tmp_path / "none.csv") == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_configuration(variant, tmp_path):
    objective = SRAConfig(output_dir=str(tmp_path), use_cpu=True, **VARIANTS[variant]).objective()
    assert objective.needs_teacher == (VARIANTS[variant].get("recipe") != "cross-entropy")


def runs_of(bits):
    """{variant: bits of each seed} as runs on the test split."""
    return [
        made(("prune-qwen", REGIMES["fresh"], variant, "test", 3e-4, 0.5, seed), value)
        for variant, values in bits.items()
        for seed, value in enumerate(values, start=1)
    ]


def test_the_verdict_asks_for_two_standard_errors():
    sure = runs_of({"cross-entropy": [1.5, 1.52, 1.51], "boundary": [1.4, 1.42, 1.41]})
    assert "| 2 of 14 | boundary | cross-entropy | 0.1000 ± 0.0000 | yes |" in page.verdicts(sure)
    unsure = runs_of({"cross-entropy": [1.5, 1.4, 1.6], "paper": [1.4, 1.5, 1.5]})
    assert page.verdicts(unsure).endswith("| no |")
    worse = runs_of({"uld": [1.0, 1.0, 1.0], "paper": [1.4, 1.4, 1.4]})
    assert page.verdicts(worse).endswith("| paper | uld | -0.4000 ± 0.0000 | no |")
    alone = runs_of({"cross-entropy": [1.5], "paper": [1.0]})
    assert page.verdicts(alone).endswith("| no |")


def test_the_table_is_in_order_and_marks_what_diverged():
    table = page.tables(
        runs_of({"uld": [math.nan] * 3, "paper": [1.3] * 3, "cross-entropy": [1.2] * 3}),
        ["prune-qwen"], ["fresh"],
    ).splitlines()  # fmt: skip
    assert [line.split(" | ")[0] for line in table[-3:]] == ["| cross-entropy", "| paper", "| uld"]
    assert "| -0.1000 ± 0.0000 |" in table[-2]
    assert table[-1].startswith("| uld | – |")


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "evidence.md")
    runs = runs_of(
        {"cross-entropy": [1.5, 1.52, 1.51], "paper: bucket": [1.4] * 3, "paper": [2] * 3}
    )
    page.write(runs)
    text = (tmp_path / "evidence.md").read_text()
    assert "{" not in text
    assert "holds 9 runs so far" in text
    assert "#### Ablations" in text
    assert (tmp_path / "evidence-prune-qwen.svg").stat().st_size > 1000
    before = text, (tmp_path / "evidence-prune-qwen.svg").read_bytes()
    page.write(runs)
    assert before == (
        (tmp_path / "evidence.md").read_text(), (tmp_path / "evidence-prune-qwen.svg").read_bytes(),
    )  # fmt: skip


def test_settings_name_themselves():
    assert all(setting.name == name for name, setting in SETTINGS.items())
