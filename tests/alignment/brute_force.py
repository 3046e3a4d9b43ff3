"""Alignment by definition, with loops and sets: what `sra.alignment` must equal.

Shares nothing with the implementation: tokens are spelt here anew from the vocabulary, a boundary
is tested position by position, and spans are read off the intersection of two sets.
"""

from __future__ import annotations

import re
from itertools import pairwise

from real_tokenizers import BYTE_CHARS
from tokenizers import Tokenizer

CHAR_BYTES = {char: byte for byte, char in BYTE_CHARS.items()}
SENTENCEPIECE = {"gemma3", "mistral-v1", "mistral-v3", "unigram-en", "unigram-ja"}


def spell(name: str, tokenizer: Tokenizer, token: int) -> bytes:
    added = tokenizer.get_added_tokens_decoder()
    if token in added:
        return added[token].content.encode()
    piece = tokenizer.id_to_token(token)
    if name == "bert":
        return (piece[2:] if piece.startswith("##") else piece).encode()
    if name in SENTENCEPIECE:
        if not name.startswith("unigram") and re.fullmatch("<0x..>", piece):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()
    if name == "clip" and piece.endswith("</w>"):
        piece = piece[:-4]
    return bytes(CHAR_BYTES[char] for char in piece)


def token_ranges(name: str, tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """Byte range of every token; equal ranges where a run of tokens cannot be divided."""
    raw = text.encode()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    pieces = [spell(name, tokenizer, token) for token in encoding.ids]

    def walk(indices: list[int], start: int, end: int) -> list[tuple[int, int]] | None:
        joined = b"".join(pieces[i] for i in indices)
        if joined == raw[start:end]:
            at = start
        elif joined == b" " + raw[start:end]:
            at = start - 1
        else:
            return None
        ranges = []
        for i in indices:
            ranges.append((max(at, start), max(at + len(pieces[i]), start)))
            at += len(pieces[i])
        return ranges

    whole = walk(list(range(len(pieces))), 0, len(raw))
    if whole is not None:
        return whole

    byte_at = [len(text[:i].encode()) for i in range(len(text) + 1)]
    offsets = encoding.offsets
    ranges: list[tuple[int, int]] = [(0, 0)] * len(pieces)
    run: list[int] = []
    runs = []
    tokens = [i for i, (low, high) in enumerate(offsets) if high > low]
    for place, i in enumerate(tokens):
        run.append(i)
        reached = max(offsets[j][1] for j in tokens[: place + 1])
        if all(offsets[j][0] >= reached for j in tokens[place + 1 :]):
            runs.append(run)
            run = []
    for place, run in enumerate(runs):
        low = min(offsets[i][0] for i in run)
        high = max(offsets[i][1] for i in run)
        following = min(offsets[i][0] for i in runs[place + 1]) if runs[place + 1 :] else len(text)
        inner = walk(run, byte_at[low], byte_at[high])
        while high < following and not re.match(r"\s", text[high]):
            high += 1
        if inner is None or len(run) == 1:
            inner = [(byte_at[low], byte_at[high])] * len(run)
        else:
            inner[-1] = (inner[-1][0], byte_at[high])
        for i, token_range in zip(run, inner, strict=True):
            ranges[i] = token_range
    return ranges


Span = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def boundaries(ranges: list[tuple[int, int]], start: int, stop: int) -> set[int]:
    """Where a span may begin or end, relative to `start`."""
    wide = [(low, high) for low, high in ranges if high > low]
    return {
        at - start
        for at in {start, *(high for _, high in wide)}
        if start <= at <= stop and not any(low < at < high for low, high in wide)
    }


def shared_spans(
    student: list[tuple[int, int]],
    teacher: list[tuple[int, int]],
    length: int,
    student_start: int = 0,
    teacher_start: int = 0,
) -> list[Span]:
    """(student tokens, teacher tokens, bytes) of every span."""
    shared = sorted(
        boundaries(student, student_start, student_start + length)
        & boundaries(teacher, teacher_start, teacher_start + length)
    )

    def inside(ranges: list[tuple[int, int]], low: int, high: int) -> tuple[int, int]:
        indices = [
            i for i, (first, last) in enumerate(ranges) if low <= first < last and last <= high
        ]
        return indices[0], indices[-1] + 1

    return [
        (
            inside(student, student_start + low, student_start + high),
            inside(teacher, teacher_start + low, teacher_start + high),
            (low, high),
        )
        for low, high in pairwise(shared)
    ]
