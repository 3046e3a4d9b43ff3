"""`sra report`: what it reads of a run's folder, and what it says."""

from __future__ import annotations

import json
import math
import re

import pytest

from sra.report.charts import Curve, draw, number, smoothed, thinned
from sra.report.page import heat, page
from sra.report.run import curves, read_run, verdict, write_report
from sra.run_record import write_record
from tests.report import made
from tests.report.reader import Reader

# --- the folder ---


def test_a_whole_run(tmp_path):
    report = read_run(made.write_run(tmp_path / "run"))
    assert report.finished
    assert report.figures["after"] == {"bits_per_byte": 1.4378}
    assert report.missing == []
    level, said = verdict(report)
    assert level == "good"
    assert "1.4378 bits" in said
    assert "4.4812 (−67.9%)" in said
    # (4.4812 − 1.4378) / (4.4812 − 0.9211)
    assert "closes 85% of the distance to the teacher (0.9211)" in said
    shown = Reader(page(report)).text
    assert "sra distill SmolLM2 Qwen2.5 --data 'my file.jsonl'" in shown
    assert "2.13.0" in shown
    assert "Linux-6.1-x86_64" in shown
    assert "What is not here" not in shown


def test_the_newest_state_counts_even_beside_a_torn_one(tmp_path):
    folder = made.write_run(tmp_path / "run", steps=20, max_steps=60)
    made.write_run(folder, steps=40, max_steps=60, record=False)
    torn = folder / "checkpoint-60"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 60, "log_hist')
    report = read_run(folder)
    assert report.step == 40
    assert not report.finished
    level, said = verdict(report)
    assert level == "warning"
    assert "as of step 40 of 60" in said


def test_a_run_without_a_checkpoint_yet(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"student": "s", "command": ["sra", "distill"]}))
    report = read_run(tmp_path)
    assert verdict(report) == ("warning", "Nothing was logged yet.")
    shown = Reader(page(report)).text
    assert "has not written a checkpoint yet" in shown
    assert "sra distill" in shown


def test_a_run_without_a_record(tmp_path):
    report = read_run(made.write_run(tmp_path / "run", record=False))
    assert report.figures["before"] == {"bits_per_byte": 4.48}
    shown = Reader(page(report)).text
    assert "there is no run.json" in shown
    assert "Loss" in shown


@pytest.mark.parametrize("key", ["before", "after", "teacher", "config", "versions", "command"])
def test_every_entry_of_the_record_may_be_missing(tmp_path, key):
    report = read_run(made.write_run(tmp_path / "run", **{key: None}))
    assert verdict(report)[1]
    assert "</html>" in page(report)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run: there is neither"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_run(tmp_path / "nowhere")


# --- the verdict ---


def test_verdicts(tmp_path):
    def said(**sides):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        figures = {k: v and {"bits_per_byte": v} for k, v in sides.items()}
        return verdict(read_run(made.write_run(folder, **figures)))

    assert said(before=2.0, after=2.0, teacher=1.0)[0] == "bad"
    assert "did not get better" in said(before=2.0, after=2.1, teacher=1.0)[1]
    assert "better than the teacher" in said(before=2.0, after=0.9, teacher=1.0)[1]
    assert "more than the student did at the start" in said(before=2.0, after=1.9, teacher=3.0)[1]
    level, text = said(before=None, after=None, teacher=None)
    assert level == "good"  # from the evaluations that were logged
    assert "(−6" in text


def test_a_loss_that_is_no_number(tmp_path):
    folder = made.write_run(tmp_path / "run")
    path = folder / "checkpoint-60" / "trainer_state.json"
    state = json.loads(path.read_text())
    for log in state["log_history"]:
        if log["step"] >= 31 and "loss" in log:
            log["loss"] = math.nan
    path.write_text(json.dumps(state))
    report = read_run(folder)
    level, said = verdict(report)
    assert level == "bad"
    assert "no number from step 31" in said
    assert "NaN" not in page(report)


def test_overfitting_is_said(tmp_path):
    folder = made.write_run(tmp_path / "run")
    path = folder / "checkpoint-60" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"].append({"step": 60, "eval_bits_per_byte": 3.0})
    path.write_text(json.dumps(state))
    write_record(folder, after={"bits_per_byte": 2.9})
    level, said = verdict(read_run(folder))
    assert level == "warning"
    assert "was best at step 60 (1.4849) and got worse from there: overfitting" in said
    write_record(folder, after={"bits_per_byte": 1.4849})  # as with --load_best_model_at_end
    level, said = verdict(read_run(folder))
    assert level == "good"
    assert "was best at step 60 (1.4849), and that is the student that was kept" in said


# --- curves ---


def test_curves_are_what_was_logged(tmp_path):
    report = read_run(made.write_run(tmp_path / "run"))
    drawn = {curve.title: curve for curve in curves(report)}
    assert list(drawn)[:3] == ["Loss", "Cross-entropy", "Cosine"]
    assert "Geometry" not in drawn  # was not logged
    logged = [(log["step"], log["loss"]) for log in report.history if "loss" in log]
    assert drawn["Loss"].points == logged
    assert drawn["Held-out bits per byte"].levels == [("teacher", 0.9211)]
    assert {"Tokens a second", "Memory", "Coverage", "Agreement"} <= drawn.keys()


def test_an_unknown_quantity_has_a_curve_too(tmp_path):
    folder = made.write_run(tmp_path / "run")
    path = folder / "checkpoint-60" / "trainer_state.json"
    state = json.loads(path.read_text())
    for log in state["log_history"]:
        log["my_own_<metric>"] = log["step"] * 2.0
    path.write_text(json.dumps(state))
    report = read_run(folder)
    assert curves(report)[-1].title == "My own <metric>"
    assert "My own &lt;metric&gt;" in page(report)


def test_a_chart_puts_points_where_they_belong():
    svg = draw(Curve("Title <", "", [(0, 1.0), (50, 3.0), (100, 2.0)], [("level", 1.5)]))
    line = re.search(r'class="line" points="([^"]+)"', svg)[1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in line.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 > y2 > y1  # up is more
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.11)
    level = float(re.search(r'class="level level0"[^>]* y1="([\d.]+)"', svg)[1])
    assert level == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert "Title &lt;" in svg


@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.0), (2, 0.0)],
        [(5, -1e-12), (6, 1e12)],
        [(1, 1e-300), (2, 2e-300)],
        [(i, math.sin(i)) for i in range(5000)],
        [(7, 3.0)] * 2,
    ],
    ids=["constant", "huge", "tiny", "long", "one step"],
)
def test_any_curve_can_be_drawn(points):
    svg = draw(Curve("x", "", points))
    assert "nan" not in svg
    assert "inf" not in svg
    assert len(svg) < 60_000


def test_thinning_keeps_the_extremes():
    points = [(i, 0.0) for i in range(10_000)]
    points[4321] = (4321, 9.0)
    points[6000] = (6000, -9.0)
    kept = thinned(points)
    assert len(kept) <= 320
    assert {points[0], points[4321], points[6000], points[-1]} <= set(kept)
    assert kept == sorted(kept)


def test_smoothing_has_no_lag():
    values = [2.0 - 0.01 * i for i in range(100)]
    assert smoothed(values) == pytest.approx(values)
    noisy = [(-1) ** i + 5.0 for i in range(200)]
    assert all(abs(value - 5) < 0.2 for value in smoothed(noisy)[20:-20])


def test_numbers_as_a_person_writes_them():
    assert [number(x) for x in (0, 1.4378, 12.345, 1234.5, 0.0312, 3e-4, 2.5e9, -0.5)] == [
        "0", "1.44", "12.3", "1,234", "0.0312", "3e-4", "2.5e9", "-0.5"
    ]  # fmt: skip


# --- the page ---


def test_texts_are_never_markup(tmp_path):
    report = read_run(
        made.write_run(
            tmp_path / "run", student=made.HOSTILE, teachers=[made.HOSTILE],
            command=["sra", made.HOSTILE], config={made.HOSTILE: made.HOSTILE},
            machine={made.HOSTILE: [made.HOSTILE]},
        )
    )  # fmt: skip
    report.samples = made.samples(8)
    report.missing = [made.HOSTILE]
    report.source = made.HOSTILE
    text = page(report)
    tags = Reader(text).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [tag for tag, _ in tags if tag == "img"]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    for _, attributes in tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:"))
    assert made.HOSTILE in Reader(text).text.replace("\n", " ")


def test_every_link_leads_somewhere(tmp_path):
    report = read_run(made.write_run(tmp_path / "run"))
    report.samples = made.samples(8)
    tags = Reader(page(report)).tags
    places = [attributes["id"] for _, attributes in tags if "id" in attributes]
    links = [attributes["href"][1:] for tag, attributes in tags if tag == "a"]
    assert set(links) <= set(places)
    assert links[:5] == [place for place in places if place.startswith("row")][:5]


def test_colours():
    assert [heat(bits) for bits in (0, 0.49, 0.5, 1, 1.9, 2, 4, 7.9, 8, 50)] == [
        0, 0, 1, 2, 2, 3, 4, 4, 5, 5
    ]  # fmt: skip


def test_the_page_is_written_whole(tmp_path):
    report = read_run(made.write_run(tmp_path / "run"))
    path = write_report(report, tmp_path / "deep" / "page.html")
    assert path.read_text().endswith("</html>\n")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
