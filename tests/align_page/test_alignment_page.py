"""The page of `sra align --html`."""

from __future__ import annotations

import argparse
import re
from html.parser import HTMLParser

import pytest

from sra.alignment import SpanAligner
from sra.alignment_page import KINDS, alignment_page
from sra.commands import align
from tests import tiny

HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'> \"&amp;' \x00\x1b[31m"


class Page(HTMLParser):
    """Tags, attributes, and what stands in each span's two rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data

    @property
    def details(self) -> list[str]:
        return [value for name, value in self.attributes if name == "data-info"]


def table(text, teacher=None):
    return SpanAligner(tiny.student_tokenizer(), teacher or tiny.teacher_tokenizer())(text)


def test_every_token_is_in_one_cell():
    for text in (row["completion"] for row in tiny.ROWS):
        for teacher in (tiny.teacher_tokenizer(), tiny.lossy_tokenizer()):
            aligned = table(text, teacher)
            found = list(aligned.cells())
            for side, ids in (("student", aligned.student_ids), ("teacher", aligned.teacher_ids)):
                indices = [i for cell in found for i in getattr(cell, side)]
                assert indices == list(range(len(ids)))
            assert [cell.bytes for cell in found if cell.bytes] == [
                tuple(b) for b in aligned.bytes.tolist()
            ]


def test_the_kinds_are_counted():
    aligned = table("The Nile flows 🐸", tiny.lossy_tokenizer())
    page = Page(alignment_page(aligned))
    kinds = [cell.kind for cell in aligned.cells()]
    assert set(kinds) == set(KINDS)
    shown = [value for name, value in page.attributes if name == "class" and value in KINDS]
    assert shown == list(KINDS)  # the key
    cells_shown = [value[2:] for name, value in page.attributes
        if name == "class" and value.startswith("s ")]  # fmt: skip
    assert cells_shown == kinds


def test_ids_and_bytes_of_each_span_are_told():
    aligned = table("The Nile")
    details = Page(alignment_page(aligned)).details
    assert len(details) == len(list(aligned.cells()))
    everything = "\n".join(details)
    for i in (*aligned.student_ids, *aligned.teacher_ids):
        assert f"id {i} " in everything
    assert "20 4e 69" in everything
    assert details[0].startswith("bytes 0 to ")


def test_parts_of_a_character_are_shown_as_bytes():
    page = Page(alignment_page(table("🐸")))
    assert "f0" in page.text
    assert "\udcf0" not in page.text


def test_hostile_text_and_names_are_shown_and_never_run():
    page_text = alignment_page(table(HOSTILE), student=HOSTILE, teacher="<b>")
    page = Page(page_text)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "b" not in page.tags[: page.tags.index("ul")]
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "\x00" not in page_text.partition("<main>")[2]
    assert "\x1b" not in page_text.partition("<main>")[2]
    script = re.search(r"<script>(.*?)</script>", page_text, re.S)[1]
    assert "innerHTML" not in script


def test_nothing_is_loaded_from_elsewhere():
    page = Page(alignment_page(table("The Nile flows.")))
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_an_empty_text():
    assert "There is no text." in alignment_page(table(""))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tuple(map(str, tiny.write_checkpoints(tmp_path_factory.mktemp("checkpoints"))))


def run(*argv):
    parser = argparse.ArgumentParser()
    align.add(parser.add_subparsers())
    args = parser.parse_args(["align", *map(str, argv)])
    return args.run(args)


def test_the_command_writes_the_page(pair, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert run(*pair, "--text", "The Nile flows.", "--html", file) == 0
    assert str(file) in capsys.readouterr().out
    page = file.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "tiny-student" in page
    assert "tiny-teacher" in page


def test_a_folder_that_is_not_there(pair, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        run(*pair, "--text", "x", "--html", tmp_path / "nowhere" / "page.html")
