"""Links, files, options and dotted names in the documentation exist."""

from __future__ import annotations

import importlib
import re

import pytest

from sra.arguments import SHORT, _parser
from sra.cli import parser
from tests.docs.pages import INLINE, PAGES, ROOT, blocks, prose, sra_lines

LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?:csrc|docs|examples|sra|sra_kernels|tests|benchmarks)/[\w./-]+")
DOTTED = re.compile(r"(?<![\w/.-])(?:sra|sra_kernels)(?:\.[A-Za-z_]\w*)+(?![\w/]|\.\w)")
OPTION = re.compile(r"(?<![\w-])--([a-z][\w-]+)")
# Options of other programs, and of `sra bench`, which hands them on.
FOREIGN_OPTIONS = {"base"}
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def options() -> dict[str, set[str]]:
    """The options of each command, with - for _."""
    known = {}
    (choices,) = (a.choices for a in parser()._actions if a.dest == "command")
    for name, command in choices.items():
        strings = {s for action in command._actions for s in action.option_strings}
        known[name] = {s.removeprefix("--") for s in strings}
    distill = {action.dest for action in _parser()._actions} | {*SHORT, "help", "help-all"}
    known["distill"] = {name.replace("_", "-") for name in distill}
    return known


OPTIONS = options()


@by_page
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in slugs, f"{page}: {link} ({sorted(slugs)})"


@by_page
def test_files_that_are_named_exist(page):
    for code in INLINE.findall(prose(page)):
        if PATH.fullmatch(code):
            built = code == "benchmarks/results/gpu"  # made by `make gpu`
            assert built or (ROOT / code).exists(), f"{page}: {code}"


@pytest.mark.parametrize(("place", "line"), sra_lines())
def test_a_command_takes_its_options(place, line):
    command = line[1]
    assert command in OPTIONS, f"{place}: sra {command}"
    for word in line[2:]:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and command != "bench":
            assert name in OPTIONS[command], f"{place}: sra {command} {word}"


@by_page
def test_options_in_a_line_belong_to_some_command(page):
    every = set.union(*OPTIONS.values()) | FOREIGN_OPTIONS
    for code in INLINE.findall(prose(page)):
        if code.startswith(("pip ", "accelerate ", "torchrun ")):
            continue
        for name in OPTION.findall(code):
            assert name.replace("_", "-") in every, f"{page}: --{name}"


@by_page
def test_dotted_names_resolve(page):
    texts = [block.text for block in blocks(page) if block.language == "python"]
    texts += [*INLINE.findall(prose(page))]
    for name in (name for text in texts for name in DOTTED.findall(text)):
        assert resolves(name), f"{page}: {name}"


def resolves(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_a_name_that_is_not_there_is_found():
    assert resolves("sra.doctor.planner.predict")
    assert resolves("sra_kernels.span_com")
    assert not resolves("sra.doctor.planner.predicted")
    assert not resolves("sra.plan")


def test_the_index_leads_to_every_page():
    docs = ROOT / "docs"
    index = set(LINK.findall((docs / "README.md").read_text()))
    assert {str(p.relative_to(docs)) for p in PAGES if docs in p.parents} - {"README.md"} == index
