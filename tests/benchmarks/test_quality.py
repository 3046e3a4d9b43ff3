"""The sweep of methods: what it runs next, what it keeps, and what the page says of it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks.quality import page
from benchmarks.quality.__main__ import bounds, cases, timings
from benchmarks.quality.gradients import Pull
from benchmarks.quality.grid import at_chosen, best, chosen
from benchmarks.quality.means import by_share
from benchmarks.quality.pictures import draw_shares
from benchmarks.quality.settings import (
    ABLATED,
    ABLATIONS,
    BOUNDS,
    FINER,
    MAIN,
    PARENTS,
    REGIMES,
    SEEDS,
    SETTINGS,
    SHARES,
    TRIES,
    VARIANTS,
)
from benchmarks.quality.table import Run, append, read
from benchmarks.quality.verdicts import claim, verdicts
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
    while case := next(cases(done, ["prune-qwen"], [REGIMES["fresh"]], variants, **options), None):
        done.append(made(case, score(case)))
        assert len(done) < 100
    return done


def test_rates_then_shares_then_seeds():
    """The two rates in the middle, the one beyond the better of them, and shares at the best."""

    def score(case):
        return abs(case[4] - 1e-3) + abs(case[5] - 0.8)

    done = sweep(score, ["paper"])
    dev = [(run.learning_rate, run.alpha) for run in done if run.split == "dev"]
    rates = SETTINGS["prune-qwen"].rates[1:]
    assert dev == [*((rate, 0.5) for rate in rates), *((1e-3, share) for share in SHARES)]
    test = [(run.learning_rate, run.alpha, run.seed) for run in done if run.split == "test"]
    assert test == [(1e-3, 0.8, seed) for seed in SEEDS]


@pytest.mark.parametrize("variant", MAIN)
def test_every_method_is_tried_as_often(variant):
    done = sweep(lambda case: case[4], [variant])
    dev = [run for run in done if run.split == "dev"]
    assert len(dev) == len({(run.learning_rate, run.alpha) for run in dev}) == TRIES


def test_cross_entropy_has_more_rates_instead_of_shares():
    rates = [run.learning_rate for run in sweep(lambda case: case[4], ["cross-entropy"])]
    assert rates[:TRIES] == [3e-4, 1e-3, 1e-4, *(round(1e-4 * x, 8) for x in FINER)]
    assert set(rates[TRIES:]) == {min(rates)}


def test_a_run_that_diverged_is_never_the_best():
    done = sweep(lambda case: math.nan if case[4] == 1e-4 else case[4], ["alm"])
    assert best(done).learning_rate == 3e-4
    assert all(run.learning_rate == 3e-4 for run in done if run.split == "test")


def test_an_ablation_takes_what_was_chosen_for_its_recipe():
    done = sweep(lambda case: case[4], ["paper: logit"])
    assert [run.variant for run in done] == ["paper"] * TRIES + ["paper: logit"] * 3
    assert {(run.learning_rate, run.alpha) for run in done[TRIES:]} == {(1e-4, 0.5)}
    assert [*cases([], ["prune-gemma"], [REGIMES["fresh"]], ["paper: logit"])] == []
    assert set(PARENTS) == set(ABLATIONS)
    assert set(PARENTS.values()) <= set(MAIN)
    own = {"paper: normalised vocabulary", *(x for x in ABLATED if x.startswith("respell"))}
    assert set(ABLATED) == {*PARENTS.values(), *own} <= {*MAIN, *ABLATIONS}
    elsewhere = [*cases(done, ["prune-qwen"], [REGIMES["fresh"]], ["paper: normalised vocabulary"])]
    assert elsewhere == []


def test_the_control_takes_what_was_chosen_on_the_first_pair():
    done = sweep(lambda case: case[4], ["uld"])
    more = [*cases(done, ["same"], [REGIMES["fresh"]], ["uld"])]
    assert [(case[0], case[3]) for case in more] == [("same", "test")] * len(SEEDS)
    assert {case[4] for case in more} == {1e-4}
    for setting in SETTINGS.values():
        other = SETTINGS[setting.tuned_on]
        assert (other.student, other.layers, other.language) == (
            setting.student, setting.layers, setting.language,
        )  # fmt: skip


def test_tests_at_other_options_than_dev_chose_are_left_out():
    done = sweep(lambda case: abs(case[4] - 1e-3) + abs(case[5] - 0.8), ["paper", "paper: bucket"])
    assert at_chosen(done) == done
    other = [dataclasses.replace(run, alpha=0.5) for run in done if run.split == "test"]
    between = [made(case) for case in bounds([], ["prune-qwen"])]
    assert at_chosen([*other, *done, *between]) == [*done, *between]
    assert at_chosen(done[1:]) == done[1:TRIES]  # a try is missing: nothing is chosen yet
    stray = dataclasses.replace(done[0], learning_rate=5e-3, bits_per_byte=0.0)  # of another grid
    assert at_chosen([stray, *done]) == [stray, *done]
    tried = [run for run in done if run.split == "dev"]
    assert chosen("paper", SETTINGS["prune-qwen"].rates, [stray, *tried]) == (1e-3, 0.8)
    assert chosen("paper", SETTINGS["prune-qwen"].rates, [stray, *tried[1:]]) is None


def test_small_runs_one_seed_of_each_method_at_what_was_chosen():
    tuned = sweep(lambda case: abs(case[4] - 1e-4) + abs(case[5] - 0.8), ["uld"])
    done = sweep(lambda case: 1.0, ["cross-entropy", "uld"], tuned=tuned, seeds=(1,))
    assert [(run.variant, run.split, run.learning_rate, run.alpha, run.seed) for run in done] == [
        ("uld", "test", 1e-4, 0.8, 1),  # of the other, nothing is known
    ]


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


def test_the_verdict_asks_for_two_standard_errors_of_every_other():
    runs = runs_of({
        "respell": [1.4, 1.42, 1.41], "cross-entropy": [1.5, 1.52, 1.51], "uld": [math.nan] * 3,
    })  # fmt: skip
    start = f"| Pruned, from Qwen: one pass over fresh data | 2 of {len(MAIN) - 1} | "
    assert verdicts(runs).endswith(
        f"{start}0.1000 ± 0.0000 | cross-entropy | 0.1000 ± 0.0000 | yes |"
    )
    runs += runs_of({"paper": [1.44, 1.40, 1.42]})
    assert verdicts(runs).endswith("| paper | 0.0100 ± 0.0173 | no: level with paper |")
    runs += runs_of({"dskd": [1.3, 1.32, 1.31], "alm": [1.0]})  # one seed says nothing
    assert verdicts(runs).endswith("| no: behind dskd; level with paper |")
    lost = runs_of({"respell": [math.nan] * 3, "dskd": [1.3] * 3, "uld": [math.nan] * 3})
    assert verdicts(lost).endswith("| – | dskd | – | no: behind dskd; level with uld |")
    assert "measured beside another method yet" in verdicts(runs_of({"respell": [1.0] * 3}))


def test_the_claim_is_what_the_runs_say():
    assert claim([]) == "`respell` has not been measured beside cross-entropy yet"
    runs = runs_of({"respell": [1.4, 1.42, 1.41], "cross-entropy": [1.5, 1.52, 1.51]})
    assert claim(runs) == (
        "In 1 comparisons on 1 pairs of models, each beside 1 other methods and recipes, `respell` "
        "ends 0.10 to 0.10 bits per byte below cross-entropy alone; it is ahead of all that were "
        "measured there in 1 (by more than two standard errors)"
    )
    chinese = [dataclasses.replace(run, setting="chinese") for run in runs]
    more = chinese + runs + runs_of({"uld": [1.41, 1.40, 1.42]})
    assert "In 2 comparisons on 2 pairs of models, each beside 1 to 2 other" in claim(more)
    assert claim(more).endswith("in 1 (by more than two standard errors), level with some in 1")
    worse = [*chinese, *runs, *runs_of({"uld": [1.2] * 3, "mined": [1.0] * 3})]
    assert claim(worse).endswith("standard errors), behind mined, uld in 1")


def test_the_table_is_in_order_and_marks_what_diverged():
    table = page.tables(
        runs_of({"uld": [math.nan] * 3, "paper": [1.3] * 3, "cross-entropy": [1.2] * 3}),
        ["prune-qwen"], ["fresh"],
    ).splitlines()  # fmt: skip
    assert [line.split(" | ")[0] for line in table[-3:]] == ["| cross-entropy", "| paper", "| uld"]
    assert "| -0.1000 ± 0.0000 |" in table[-2]
    assert table[-1].startswith("| uld | – |")


def test_an_ablation_stands_below_its_recipe_with_its_difference():
    runs = runs_of({"cross-entropy": [1.2] * 3, "boundary": [1.4, 1.5, 1.6], "paper": [2.0] * 3,
                    "paper: bucket": [1.5, 1.6, 1.7], "paper: logit": [2.5] * 3})  # fmt: skip
    lines = page.tables(runs, ["prune-qwen"], ["fresh"]).split("#### Ablations")[1].splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        "| **paper**", "| paper: logit", "| paper: bucket",
    ]  # fmt: skip
    assert lines[4].endswith("|  | 3 |")
    assert lines[5].endswith("| -0.5000 ± 0.0000 | 3 |")
    assert lines[6].endswith("| 0.4000 ± 0.0577 | 3 |")


def test_the_overview_has_a_column_for_each_setting_and_marks_its_best():
    runs = runs_of({"cross-entropy": [1.5, 1.6, 1.55], "uld": [1.4, 1.42, 1.41]})
    lines = page.overview(runs).splitlines()
    assert lines[0].count("|") == 3  # none for settings without a run
    assert lines[2:] == [
        "| cross-entropy | 1.550 ± 0.029 |",
        "| uld | **1.410** ± 0.006 |",
    ]
    lost = page.overview(runs_of({"uld": [math.nan] * 3}))
    assert lost.splitlines()[2:] == []
    assert page.overview([]) == "*Nothing has been measured yet.*"


def test_the_student_before_and_its_teacher_stand_below_the_methods():
    runs = runs_of({"cross-entropy": [1.5, 1.6, 1.55]})
    while case := next(bounds(runs, ["prune-qwen", "same"]), None):
        runs.append(made(case, {"start": 4.0, "teacher": 0.5}[case[2]]))
    assert [(run.setting, run.variant) for run in runs[3:]] == [
        (setting, name) for setting in ("prune-qwen", "same") for name in BOUNDS
    ]
    assert page.overview(runs).splitlines()[2:] == [
        "| cross-entropy | **1.550** ± 0.029 |",
        "| *the student before* | 4.000 |",
        "| *its teacher* | 0.500 |",
    ]
    below = page.tables(runs, ["prune-qwen"], ["fresh"]).splitlines()[-2:]
    assert below[0].startswith("| *the student before* | 4.0000 | 0.500 | 10.0 | 2.000 |  |")
    assert below[1].startswith("| *its teacher* | 0.5000 |")
    verdict = verdicts([*runs, *runs_of({"respell": [1.4, 1.42, 1.41]})])  # a teacher is no rival
    assert f"| 1 of {len(MAIN) - 1} | " in verdict


def test_what_a_step_costs_is_timed_alone_once_all_is_done():
    settings, variants = [*SETTINGS], ["cross-entropy", "seqkd", "uld", "paper: bucket"]
    done = []
    while case := next(timings(done, settings, variants), None):
        done.append(dataclasses.replace(made(case), seconds_a_step=1.0 + len(done)))
    assert [(run.setting, run.variant) for run in done] == [
        (setting, variant) for setting in SETTINGS for variant in ("cross-entropy", "uld")
    ]
    lines = page.costs(done).splitlines()
    assert lines[0].startswith("| method | Pruned, from Qwen: s | Pruned, from Qwen: GiB |")
    assert lines[2].startswith("| cross-entropy | 1.00 | 3.0 | 3.00 | 3.0 |")
    assert page.costs([]) == "*Not measured yet.*"
    assert page.overview(done) == "*Nothing has been measured yet.*"


def test_the_table_of_pulls():
    pulls = [
        Pull("prune-qwen", "start", "respell", 12.34, 0.5),
        Pull("chinese", "start", "cross-entropy", 1e3, 1),
    ]
    assert page.pulls_table(pulls).splitlines()[2:] == [
        "| cross-entropy | – | 1,000; 1.00 |", "| respell | 12.34; 0.50 | – |",
    ]  # fmt: skip
    assert page.pulls_table([]) == "*Not measured yet.*"


def test_the_curves_of_the_shares_are_of_the_dev_split(tmp_path):
    done = sweep(lambda case: 1 + case[4] + abs(case[5] - 0.8), ["paper", "boundary"])
    assert by_share(done, "paper") == pytest.approx({0.2: 1.6001, 0.5: 1.3001, 0.8: 1.0001})
    assert draw_shares(done, tmp_path / "shares.svg")
    assert (tmp_path / "shares.svg").stat().st_size > 1000


def test_shares_of_two_settings_are_no_curve(tmp_path):
    shares = {"prune-qwen": (0.2, 0.5), "chinese": (0.8,)}
    runs = [
        made((setting, REGIMES["fresh"], "paper", "dev", 1e-3, share, 0))
        for setting, found in shares.items()
        for share in found
    ]
    assert not draw_shares(runs, tmp_path / "shares.svg")


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(page, "README", tmp_path / "README.md")
    page.README.write_text("before\n<!-- evidence -->\nold\n<!-- /evidence -->\nafter\n")
    scores = {"cross-entropy": 1.5, "paper: bucket": 1.4, "paper": 2.0}
    runs = sweep(lambda case: scores[case[2]] + case[4] + case[6] / 100, [*scores])
    stray = dataclasses.replace(runs[-1], alpha=0.3, seed=9)
    page.write([*runs, stray])
    text = (tmp_path / "evidence.md").read_text()
    assert "{" not in text
    assert f"holds {len(runs) + 1} runs so far" in text
    assert page.overview(runs) in text
    assert "#### Ablations" in text
    assert page.README.read_text() == (
        f"before\n<!-- evidence -->\n{claim(runs)} ([docs/evidence.md](docs/evidence.md)).\n"
        "<!-- /evidence -->\nafter\n"
    )
    for picture in ("prune-qwen", "ablations"):
        assert (tmp_path / f"evidence-{picture}.svg").stat().st_size > 1000
    before = text, (tmp_path / "evidence-prune-qwen.svg").read_bytes()
    page.write([*runs, stray])
    assert before == (
        (tmp_path / "evidence.md").read_text(), (tmp_path / "evidence-prune-qwen.svg").read_bytes(),
    )  # fmt: skip


def test_settings_name_themselves():
    assert all(setting.name == name for name, setting in SETTINGS.items())
