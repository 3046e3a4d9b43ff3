"""The report in a headless Chromium: no complaint, no request, no sideways scroll; it reacts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sra.report.run import read_run, write_report
from tests.report import browser, made


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = read_run(made.write_run(folder / "run", student=made.HOSTILE + "x" * 90))
    report.samples = made.samples()
    return write_report(report, folder / "report.html")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 420])
def test_it_opens(page, tab, width, dark, tmp_path):
    tab.problems.clear()
    tab.requests.clear()
    tab.open(page, width=width, dark=dark)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.problems == []
    assert {*tab.requests} == {page.resolve().as_uri()}
    paper = tab.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    picture = tmp_path / "page.png"
    kept = os.environ.get("SRA_KEEP_PICTURES")  # a folder, to look at them
    tab.picture(picture, whole=bool(kept))
    assert picture.stat().st_size > 20_000
    if kept:
        picture.replace(Path(kept) / f"report-{width}-{'dark' if dark else 'light'}.png")


def test_every_text_can_be_read(page, tab):
    """Contrast of what is written on each colour, at least 4.5 : 1 (WCAG AA)."""
    measure = """
      (() => {
        const light = (c) => {
          const [r, g, b] = c.match(/[\\d.]+/g).map((x) => x / 255)
            .map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const worst = {};
        for (const name of ["h0", "h1", "h2", "h3", "h4", "h5", "soft", "none", "verdict"]) {
          const one = document.querySelector("." + name);
          let under = one;
          while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)")
            under = under.parentElement || document.body;
          const pair = [getComputedStyle(one).color, getComputedStyle(under).backgroundColor];
          const [a, b] = pair.map(light).sort((x, y) => y - x);
          worst[name] = (a + 0.05) / (b + 0.05);
        }
        return worst;
      })()"""
    for dark in (False, True):
        tab.open(page, width=1200, dark=dark)
        found = tab.value(measure)
        assert len(found) == 9
        assert min(found.values()) >= 4.5, (dark, found)


def test_pointing_at_a_piece_and_at_a_curve(page, tab):
    tab.open(page, width=1200)
    tab.value("document.querySelector('[data-bits]').scrollIntoView({block: 'center'})")
    tab.settle()
    box = tab.value(
        "(({left, top, width, height}) => [left + width / 2, top + height / 2])"
        "(document.querySelector('[data-bits]').getBoundingClientRect())"
    )
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    shown = tab.value("document.getElementById('tip').innerText")
    assert "teacher: “·the”" in shown
    assert "bits apart" in shown
    tab.value("document.querySelector('svg').scrollIntoView({block: 'center'})")
    tab.settle()
    box = tab.value(
        "(({left, top, width, height}) => [left + width * 0.999, top + height / 2])"
        "(document.querySelector('svg').getBoundingClientRect())"
    )
    before = tab.value("document.querySelector('figure output').textContent")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert tab.value("document.querySelector('figure output').textContent").endswith("at step 60")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert tab.value("document.querySelector('figure output').textContent") == before
    assert tab.problems == []


def test_texts_are_shown_not_run(page, tab):
    tab.open(page, width=1200)
    assert tab.value("document.querySelectorAll('script').length") == 1
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert made.HOSTILE in tab.value("document.querySelector('h1').textContent")


def test_it_prints(page, tab, tmp_path):
    tab.open(page, width=1200, dark=True)
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
