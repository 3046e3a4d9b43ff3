"""The messages in docs/troubleshooting.md are the ones that `sra` says."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^### `(.*)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@functools.cache
def strings():
    """Every string in the source, `...` where a value is put in."""
    found = []
    for path in sorted((ROOT / "sra").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (x.value if isinstance(x, ast.Constant) else "..." for x in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_heading_is_a_message():
    headings = re.findall(r"^### .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) == len(MESSAGES) > 25
    assert len({*MESSAGES}) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_source(message):
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    assert any(re.search(pattern, text, re.DOTALL) for text in strings())


def test_a_message_that_nobody_says_would_be_noticed():
    assert not any("The student is too small" in text for text in strings())
