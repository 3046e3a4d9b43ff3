"""The pages of the documentation: their fenced blocks, links and the names that they mention."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^ *```(\w*)\s*$")
NOT_RUN = re.compile(r"^<!-- not run: *(.*?) *-->$")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


class Block(NamedTuple):
    """A fenced block. reason: why it does not run (None: it runs); line: of its first line."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    out: list[Block] = []
    language, begin, reason = None, 0, None
    body: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if language is None:
            if fence := FENCE.match(line):
                language, begin, body = fence[1], number + 1, []
            elif said := NOT_RUN.match(line.strip()):
                reason = said[1]
            elif line.strip():
                reason = None
        elif line.strip() == "```":
            text = textwrap.dedent("\n".join(body)) + "\n"
            out.append(Block(page, begin, language, text, reason))
            language, reason = None, None
        else:
            body.append(line)
    assert language is None, f"{page}: the block at line {begin} does not end"
    return out


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


def commands(block: str) -> list[str]:
    """The command lines of a bash block, whole: without comments, continuations joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words(command: str) -> list[str]:
    """A command line as words; environment variables in front of it are left out."""
    found = shlex.split(command, comments=True)
    while found and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", found[0]):
        found = found[1:]
    return found


def sra_lines() -> list[tuple[str, list[str]]]:
    """Each `sra ...` that a page tells, in a block or in a line, with its place."""
    out = []
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                out += [(block.place, words(line)) for line in commands(block.text)]
        for code in INLINE.findall(prose(page)):
            if code.startswith("sra ") and "'" not in code:
                out.append((str(page.relative_to(ROOT)), words(code)))
    return [(place, found) for place, found in out if found[:1] == ["sra"] and len(found) > 1]
