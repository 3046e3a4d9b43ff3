"""Every block of the README and of docs/ runs, with tiny models in the place of real ones."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from sra import SpanDistiller, arguments, packages, precision
from tests import tiny
from tests.docs.pages import PAGES, ROOT, blocks
from tests.docs.running import Missing, Runner

ALL = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"python", "bash", "yaml", "json", "jsonl", "", "text"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tiny.write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def preamble(checkpoints):
    """What a block may take as given: a pair, as names and loaded, rows, and some states."""

    def names():
        student, teacher = map(str, checkpoints)
        return {
            "torch": torch,
            "student_name": student,
            "teacher_name": teacher,
            "student": tiny.student_model(),
            "teacher": tiny.teacher_model(),
            "student_tokenizer": tiny.student_tokenizer(),
            "teacher_tokenizer": tiny.teacher_tokenizer(),
            "model": tiny.student_model(),
            "tokenizer": tiny.student_tokenizer(),
            "rows": copy.deepcopy(tiny.ROWS),
            "collator": tiny.collator(),
            "distiller": SpanDistiller(
                tiny.student_model(), tiny.teacher_model(), vocabulary=tiny.vocabulary()
            ),
            "hidden": torch.randn(6, 8, requires_grad=True),
            "weights": torch.rand(6),
        }

    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("rows.jsonl", "train.jsonl", "held_out.jsonl"):
        tiny.write_jsonl(tmp_path / name, tiny.ROWS)
    tiny.write_jsonl(tmp_path / "test.jsonl", tiny.ROWS[:1])  # is answered by sampling
    (tmp_path / "text.txt").write_text("The Nile flows through Egypt.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(packages, "fetch_instructions", lambda language: tiny.ROWS * 5)
    for module in (arguments, precision):  # it takes seconds, for each command that asks
        monkeypatch.setattr(module, "faster_dtype", lambda device: torch.float32)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page, folder, checkpoints, preamble):
    runner = Runner(folder, *checkpoints, preamble)
    missing = []
    for block in blocks(page):
        if block.reason is not None:
            continue
        try:
            runner.run(block)
        except Missing as error:
            missing.append(f"{block.place} needs {error}")
    if missing:
        pytest.skip("all other blocks ran; " + "; ".join(missing))


def test_a_block_that_is_not_run_says_why():
    reasons = [block.reason for block in ALL if block.reason is not None]
    assert all(len(reason.split()) >= 3 for reason in reasons), reasons
    assert len(reasons) <= 4, "blocks that run are what the pages are trusted for"


def test_every_block_has_a_language_that_is_known():
    for block in ALL:
        assert block.language in LANGUAGES, f"{block.place}: {block.language}"
        if block.language in ("", "text"):  # nothing in it is a command that should have run
            command = re.search(r"^\s*(sra|make|pip|python3?|accelerate) .*", block.text, re.M)
            assert command is None, f"{block.place}: tag it ```bash: {command[0]}"


def test_a_broken_block_fails(folder, checkpoints, preamble):
    page = folder / "page.md"
    runner = Runner(folder, *checkpoints, preamble)
    good = "```python\nx = len(rows)\n```\n```python\nassert x == 8\n```\n"
    page.write_text(good)
    for block in blocks(page):
        runner.run(block._replace(page=ROOT / "README.md"))
    for text in (
        "```python\nfrom sra import SpanCollater\n```\n",
        "```bash\nsra align STUDENT TEACHER --txt x\n```\n",
        "```bash\nsra distill STUDENT TEACHER --data missing.jsonl\n```\n",
        "```bash\nmake coffee\n```\n",
        "```bash\npip install 'sra[coffee]'\n```\n",
        "```bash\npython -m benchmarks.coffee\n```\n",
        "```bash\ncurl nothing\n```\n",
    ):
        page.write_text(text)
        (block,) = blocks(page)
        with pytest.raises(AssertionError):
            runner.run(block._replace(page=ROOT / "README.md"))


def test_the_comment_before_a_block_keeps_it_from_running(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs two GPUs -->\n\n```bash\nx\n```\n\n  ```bash\n  y\n  ```\n"
    )
    assert [block.reason for block in blocks(page)] == ["needs two GPUs", None]
    assert [block.line for block in blocks(page)] == [4, 8]
    assert [block.text for block in blocks(page)] == ["x\n", "y\n"]
