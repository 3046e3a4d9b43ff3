"""Spans: the pieces of a text on whose borders two tokenizers agree.

A student and a teacher cut the same text into different tokens. Every byte position at which both
cut is a boundary; the text between two neighbouring boundaries is a span, a few whole tokens of
each side (SRA, arXiv 2605.01205, finds them by the longest common subsequence of the two offset
sequences; offsets only grow, so that is the intersection of two sorted sets).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from sra.chat import Match, Piece, Rendering
from sra.span_table import SpanTable
from sra.token_bytes import TokenBytes, byte_offsets, byte_tokenizer, clean_text

__all__ = ["SpanAligner", "SpanTable", "shared_spans"]

Granularity = Literal["token", "word", "sentence"]


def shared_spans(
    student: TokenBytes,
    teacher: TokenBytes,
    *,
    student_start: int = 0,
    teacher_start: int = 0,
    length: int | None = None,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The spans of a text that stands in two different renderings.

    The text begins at byte `student_start` of the student's rendering and at byte `teacher_start`
    of the teacher's, and is `length` bytes long (None: to the end of the shorter rendering).
    Positions are compared relative to those first bytes.

    A boundary is the end of a token (of a run of tokens that share one range: the last), or the
    text's first byte unless a token straddles it. Tokens that straddle either end of the text are
    in no span.
    Tokens without bytes (BOS, EOS, the space that SentencePiece puts in front) are in no span
    either, unless they stand between two tokens of one.

    Args:
        allowed: int64 [A], sorted byte positions; if given, only boundaries among them are kept,
            beside the first and the last one.

    Returns:
        `(student [S,2], teacher [S,2], bytes [S,2])`, all int64: half-open token ranges of each
        side (disjoint, increasing), and the byte range of the text that both cover. Neighbouring
        spans touch: `bytes[i, 1] == bytes[i + 1, 0]`.

    Cost: O(tokens), no Python loop.
    """
    if length is None:
        length = max(
            0, min(_last(student.ends) - student_start, _last(teacher.ends) - teacher_start)
        )
    s_at, s_close, s_open = _boundaries(student, student_start, length)
    t_at, t_close, t_open = _boundaries(teacher, teacher_start, length)
    # Both are sorted already, so a search does what intersect1d does by sorting them together.
    t_hit = np.searchsorted(t_at, s_at)
    s_hit = np.flatnonzero(np.append(t_at, -1)[t_hit] == s_at)
    at, t_hit = s_at[s_hit], t_hit[s_hit]
    if allowed is not None and len(at) > 2:
        keep = np.isin(at, allowed)
        keep[[0, -1]] = True
        at, s_hit, t_hit = at[keep], s_hit[keep], t_hit[keep]
    return (
        np.stack([s_open[s_hit][:-1], s_close[s_hit][1:]], 1),
        np.stack([t_open[t_hit][:-1], t_close[t_hit][1:]], 1),
        np.stack([at[:-1], at[1:]], 1),
    )


def _last(ends: np.ndarray) -> int:
    return int(ends[-1]) if len(ends) else 0


def _boundaries(
    tokens: TokenBytes, start: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (relative to `start`) where a span may end or begin; for each, the token index
    that closes the span before it and the one that opens the span after it."""
    wide = np.flatnonzero(tokens.ends > tokens.starts)
    starts, ends = tokens.starts[wide], tokens.ends[wide]
    inside = slice(np.searchsorted(starts, start), np.searchsorted(ends, start + length, "right"))
    # The text's first byte, or the end of the token that straddles it.
    first = max(start, ends[inside.start - 1]) if inside.start else start
    wide, ends = wide[inside], ends[inside]
    closing = np.flatnonzero(np.append(ends[1:] != ends[:-1], True)[: len(ends)])
    at = np.append(first, ends[closing]) - start
    # The first boundary closes no span and the last one opens none: -1 is never read.
    close = np.append(-1, wide[closing] + 1)
    return at, close, np.append(wide, -1)[np.append(0, closing + 1)]


class _WordClasses(dict):
    """Character -> "s" white space, "p" punctuation or symbol, "w" anything else; for
    `str.translate`, which asks once for each character that it has not seen."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if char.isspace():
            kind = "s"
        else:
            kind = "p" if unicodedata.category(char)[0] in "PS" and char not in "_'’" else "w"
        self[code] = kind
        return kind


_WORD_CLASSES = _WordClasses()
_SENTENCE = re.compile(
    r"""(?: [.!?…]+ ["'”’»)\]]* (?=\s|$) | [。！？]+ [”’」』）]* ) (?: [^\S\n]* \n+ )? | \n+""",
    re.VERBOSE,
)


def _ends(text: str, granularity: Granularity) -> np.ndarray | None:
    """Byte positions at which a word or a sentence of `text` ends; None for every position."""
    if granularity == "token":
        return None
    if granularity == "word":
        kinds = np.frombuffer(text.translate(_WORD_CLASSES).encode(), np.uint8)
        ends = np.flatnonzero((kinds[:-1] != kinds[1:]) & (kinds[:-1] != ord("s"))) + 1
    else:
        ends = np.array([match.end() for match in _SENTENCE.finditer(text)], np.int64)
    return byte_offsets(text)[ends]


class SpanAligner:
    """Finds the spans that a student's and a teacher's tokenization of a text share.

    Args:
        student_tokenizer, teacher_tokenizer: fast tokenizers of `transformers`, of
            any kind, or `tokenizers.Tokenizer`s (or `ByteTokenizer`s, whose tables are then shared
            between aligners).
        granularity: "token" keeps every shared boundary (SRA); "word" keeps those at which a word
            ends (a run of letters and digits, or of punctuation, with the white space before it);
            "sentence" those after `.!?…` before white space, after `。！？` and after line ends.
            A text without spaces has long words.

    Raises:
        TypeError: a tokenizer is not a fast one.
        ValueError: an unknown granularity.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        granularity: Granularity = "token",
    ) -> None:
        if granularity not in ("token", "word", "sentence"):
            raise ValueError(
                f"granularity must be 'token', 'word' or 'sentence', got {granularity!r}"
            )
        self.granularity = granularity
        self.student_tokenizer = student_tokenizer
        self.teacher_tokenizer = teacher_tokenizer
        self.student = byte_tokenizer(student_tokenizer)
        self.teacher = byte_tokenizer(teacher_tokenizer)

    def __call__(self, text: str) -> SpanTable:
        """Align a text by itself, without added special tokens. Never raises on text."""
        return self.encode_pair("", "", text)

    def encode_pair(
        self,
        student_prefix: str,
        teacher_prefix: str,
        text: str,
        *,
        student_suffix: str = "",
        teacher_suffix: str = "",
        student_max_length: int | None = None,
        teacher_max_length: int | None = None,
        add_special_tokens: bool = False,
    ) -> SpanTable:
        """Tokenise the text in context on each side and align it.

        Each side encodes `prefix + text + suffix` as one string, as its model will see it, so
        tokens may merge across the borders. Lone surrogates count as U+FFFD.

        Args:
            student_prefix, teacher_prefix: what stands before the text (each side's rendering of
                the prompt by its own chat template, say).
            text: what both sides share (the completion).
            student_suffix, teacher_suffix: what follows it (the end-of-turn token).
            student_max_length, teacher_max_length: keep only that many tokens, from the left. A
                span that truncation cuts on either side is dropped; none moves.
            add_special_tokens: whether the tokenizers add theirs. Chat templates already hold them.

        Returns:
            a `SpanTable` whose spans index the full id sequences.
        """
        text, before, behind = (
            clean_text(text),
            (clean_text(student_prefix), clean_text(teacher_prefix)),
            (clean_text(student_suffix), clean_text(teacher_suffix)),
        )
        student, teacher = (
            Rendering(first + text + last, (Piece(text, (Match(0, len(text), len(first)),)),), ())
            for first, last in zip(before, behind, strict=True)
        )
        return self._table(
            student,
            teacher,
            self.student(student.text, add_special_tokens=add_special_tokens),
            self.teacher(teacher.text, add_special_tokens=add_special_tokens),
            student_max_length,
            teacher_max_length,
            after_space=False,
        )

    def align(
        self,
        student: Rendering,
        teacher: Rendering,
        *,
        student_tokens: TokenBytes | None = None,
        student_max_length: int | None = None,
        teacher_max_length: int | None = None,
    ) -> SpanTable:
        """Align all pieces of a row that each side has rendered for itself (`sra.chat.render`).

        Spans lie inside what both renderings hold of a piece, letter for letter. Where a template
        writes a space in front of a piece, a token may hold it with the piece's first letters; that
        token counts as beginning with the piece.

        Args:
            student, teacher: renderings of one row.
            student_tokens: the student's rendering, if it is tokenised already.
            student_max_length, teacher_max_length: as for `encode_pair`.

        Returns:
            a `SpanTable` whose `text` is all pieces, one behind the other.
        """
        if student_tokens is None:
            student_tokens = self.student(student.text)
        return self._table(
            student,
            teacher,
            student_tokens,
            self.teacher(teacher.text),
            student_max_length,
            teacher_max_length,
            after_space=True,
        )

    def _table(
        self,
        student: Rendering,
        teacher: Rendering,
        student_tokens: TokenBytes,
        teacher_tokens: TokenBytes,
        student_max_length: int | None,
        teacher_max_length: int | None,
        *,
        after_space: bool,
    ) -> SpanTable:
        """`after_space`: whether a token may begin with spaces in front of a piece."""
        text = "".join(piece.text for piece in student.pieces)
        sides = (student, student_tokens), (teacher, teacher_tokens)
        at = [byte_offsets(side.text) for side, _ in sides]
        positions = byte_offsets(text)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start, end, *places in _common(student, teacher):
            first, length = positions[start], positions[end] - positions[start]
            local, offsets = [], []
            for (side, tokens), bytes_at, place in zip(sides, at, places, strict=True):
                begin = int(bytes_at[place])
                part, offset = _part(tokens, begin, begin + int(length))
                if after_space:
                    spaces = place - len(side.text[:place].rstrip(" "))
                    part = _after_space(part, begin, spaces)
                local.append(replace(part, starts=part.starts - begin, ends=part.ends - begin))
                offsets.append(offset)
            spans = shared_spans(
                *local, length=int(length), allowed=_ends(text[start:end], self.granularity)
            )
            found.append((spans[0] + offsets[0], spans[1] + offsets[1], spans[2] + first))
        empty = np.zeros((0, 2), np.int64)
        student_spans, teacher_spans, covered = (
            np.concatenate([empty, *columns])
            for columns in (zip(*found, strict=True) if found else ((), (), ()))
        )
        length = int(positions[-1])
        limits = [
            len(tokens) if limit is None else limit
            for tokens, limit in (
                (student_tokens, student_max_length),
                (teacher_tokens, teacher_max_length),
            )
        ]
        whole = (student_spans[:, 1] <= limits[0]) & (teacher_spans[:, 1] <= limits[1])
        shown = [_extent(side, bytes_at) for (side, _), bytes_at in zip(sides, at, strict=True)]
        moved = [
            replace(tokens, starts=tokens.starts - first, ends=tokens.ends - first)
            for (_, tokens), (first, _) in zip(sides, shown, strict=True)
        ]
        return SpanTable(
            text,
            moved[0][: limits[0]],
            moved[1][: limits[1]],
            _first_token(moved[0], limits[0]),
            _first_token(moved[1], limits[1]),
            student_spans[whole],
            teacher_spans[whole],
            covered[whole],
            coverage=float(np.diff(covered).sum() / length) if length else 1.0,
            student_text=shown[0][1],
            teacher_text=shown[1][1],
        )


def _common(student: Rendering, teacher: Rendering) -> list[tuple[int, int, int, int]]:
    """What both sides hold of each piece: ``(start, end)`` in all pieces one behind the other, and
    where it begins in each rendering; in characters."""
    out, first = [], 0
    for one, other in zip(student.pieces, teacher.pieces, strict=True):
        for a in one.matches:
            for b in other.matches:
                start, end = max(a.start, b.start), min(a.end, b.end)
                if start < end:
                    places = (a.at + start - a.start, b.at + start - b.start)
                    out.append((first + start, first + end, *places))
        first += len(one.text)
    return out


def _part(tokens: TokenBytes, start: int, end: int) -> tuple[TokenBytes, int]:
    """The tokens that hold any of these bytes, and the index of the first of them."""
    low = int(np.searchsorted(tokens.ends, start, "right"))
    high = max(low, int(np.searchsorted(tokens.starts, end, "left")))
    return tokens[low:high], low


def _after_space(tokens: TokenBytes, start: int, spaces: int) -> TokenBytes:
    """The tokens, of which one that begins in the `spaces` before byte `start` begins there."""
    early = (tokens.starts < start) & (tokens.starts >= start - spaces)
    return replace(tokens, starts=np.where(early, start, tokens.starts)) if early.any() else tokens


def _extent(side: Rendering, at: np.ndarray) -> tuple[int, str]:
    """The first byte that a rendering holds of any piece, and its text from there to the last."""
    matches = [match for piece in side.pieces for match in piece.matches]
    if not matches:
        return int(at[-1]), ""
    first = min(match.at for match in matches)
    return int(at[first]), side.text[first : max(match.stop for match in matches)]


def _first_token(tokens: TokenBytes, limit: int) -> int:
    """Index of the first token at or after byte 0 that is no added control token, up to `limit`."""
    width = tokens.ends - tokens.starts
    before = (tokens.starts < 0) | ((width == 0) & tokens.special & (tokens.ends == 0))
    index = len(tokens) if before.all() else int(before.argmin())
    return min(index, limit)
