"""What a command writes into the README, between two markers."""

from __future__ import annotations

from pathlib import Path


def replace_block(path: Path, name: str, block: str) -> None:
    """Replaces what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{path} has no block between {begin} and {end}.")
    head, rest = text.split(begin, 1)
    _, tail = rest.split(end, 1)
    path.write_text(f"{head}{begin}\n{block}\n{end}{tail}")
