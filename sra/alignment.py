"""Spans: the pieces of a text on whose borders two tokenizers agree.

A student and a teacher cut the same text into different tokens. Every byte position at which both
cut is a boundary; the text between two neighbouring boundaries is a span, a few whole tokens of
each side (SRA, arXiv 2605.01205, finds them by the longest common subsequence of the two offset
sequences; offsets only grow, so that is the intersection of two sorted sets).
"""

from __future__ import annotations

import re
import shutil
import sys
import unicodedata
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal, TextIO

import numpy as np

from sra.token_bytes import TokenBytes, byte_offsets, byte_tokenizer, clean_text

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


@dataclass(frozen=True)
class SpanTable:
    """The spans of one text under two tokenizers.

    Attributes:
        text: the text that was aligned (the completion, for `SpanAligner.encode_pair`).
        student_tokens, teacher_tokens: the ids of each side's whole rendering, with byte ranges
            relative to the text's first byte (negative in a prefix).
        student_start, teacher_start: index of the first token of the text on each side. A token
            that straddles the text's first byte comes before it. Equal to the number of ids where
            truncation left nothing of the text.
        student, teacher: int64 [S, 2], half-open token ranges of each span, increasing.
        bytes: int64 [S, 2], the UTF-8 range of `text` that both ranges of a span cover.
        coverage: share of the text's bytes inside spans, before truncation; 1.0 for an empty text.
    """

    text: str
    student_tokens: TokenBytes = field(repr=False)
    teacher_tokens: TokenBytes = field(repr=False)
    student_start: int
    teacher_start: int
    student: np.ndarray = field(repr=False)
    teacher: np.ndarray = field(repr=False)
    bytes: np.ndarray = field(repr=False)
    coverage: float

    @property
    def student_ids(self) -> np.ndarray:
        """int64 [Ts], the ids of the student's whole rendering."""
        return self.student_tokens.ids

    @property
    def teacher_ids(self) -> np.ndarray:
        """int64 [Tt], the ids of the teacher's whole rendering."""
        return self.teacher_tokens.ids

    def __len__(self) -> int:
        return len(self.bytes)

    def show(
        self, *, width: int | None = None, color: bool | None = None, file: TextIO | None = None
    ) -> None:
        """Print both tokenizations side by side, one span a row.

        ╎ divides tokens, · is a space, ″ a further token of a character already shown, ⟨id⟩ a
        token without text. A row without byte range holds tokens that no span holds.

        Args:
            width: columns to fill (None: the terminal's).
            color: mark spans that are not one token to one token, and tokens in no span (None:
                only on a terminal).
            file: where to print (None: standard output).
        """
        file = file or sys.stdout
        color = file.isatty() if color is None else color
        width = shutil.get_terminal_size().columns if width is None else width
        raw = clean_text(self.text).encode()
        margin = len(f"{len(raw)}-{len(raw)}")
        column = max(8, (width - margin - 6) // 2)

        single = (np.diff(self.student) == 1) & (np.diff(self.teacher) == 1)
        print(
            f"{len(self)} spans over {len(raw)} bytes, coverage {self.coverage:.1%}; "
            f"{len(self.student_ids) - self.student_start} student and "
            f"{len(self.teacher_ids) - self.teacher_start} teacher tokens; "
            f"{int(single.sum())} spans are one token to one",
            file=file,
        )
        print(f"{'bytes':>{margin}} │ {_pad('student', column)} │ teacher", file=file)
        s_at, t_at = self.student_start, self.teacher_start
        ends = ([len(self.student_ids)] * 2, [len(self.teacher_ids)] * 2)
        for s, t, b in zip(
            [*self.student.tolist(), ends[0]],
            [*self.teacher.tolist(), ends[1]],
            [*self.bytes.tolist(), None],
            strict=True,
        ):
            rows = [("", range(s_at, s[0]), range(t_at, t[0]), "\033[31m")]
            if b is not None:
                one_to_one = s[1] - s[0] == t[1] - t[0] == 1
                paint = "" if one_to_one else "\033[33m"
                rows.append((f"{b[0]}-{b[1]}", range(*s), range(*t), paint))
            for label, left, right, paint in rows:
                cells = [
                    _wrap(_visible(self.student_tokens, left, raw), column),
                    _wrap(_visible(self.teacher_tokens, right, raw), column),
                ]
                for one, other in zip_longest(*cells, fillvalue=""):
                    line = f"{label:>{margin}} │ {_pad(one, column)} │ {other}".rstrip()
                    print(f"{paint}{line}\033[0m" if color and paint else line, file=file)
                    label = ""
            s_at, t_at = s[1], t[1]


def _visible(tokens: TokenBytes, indices: range, raw: bytes) -> str:
    """The tokens' texts, every character visible."""
    pieces = []
    shown = (-1, -1)
    for i in indices:
        start, end = int(tokens.starts[i]), int(tokens.ends[i])
        if start == end:
            pieces.append(f"⟨{tokens.ids[i]}⟩")
        elif (start, end) == shown:
            pieces.append("″")
        else:
            shown = (start, end)
            # A suffix's tokens lie past the text, which is all that the table keeps.
            text = raw[max(start, 0) : end].decode(errors="backslashreplace")
            pieces.append(
                "".join(
                    c if c.isprintable() and c != " " else "·" if c == " " else repr(c)[1:-1]
                    for c in text
                )
                or f"⟨{tokens.ids[i]}⟩"
            )
    return "╎".join(pieces)


def _columns(char: str) -> int:
    """Terminal columns that a character takes."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _pad(text: str, width: int) -> str:
    return text + " " * (width - sum(map(_columns, text)))


def _wrap(text: str, width: int) -> list[str]:
    lines, used = [""] if text else [], 0
    for char in text:
        used += _columns(char)
        if used > width:
            lines.append("")
            used = _columns(char)
        lines[-1] += char
    return lines


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
        text = clean_text(text)
        length = kept = len(text.encode())
        sides = []
        for tokenizer, prefix, suffix, limit in (
            (self.student, student_prefix, student_suffix, student_max_length),
            (self.teacher, teacher_prefix, teacher_suffix, teacher_max_length),
        ):
            prefix = clean_text(prefix)
            tokens = tokenizer(prefix + text + suffix, add_special_tokens=add_special_tokens)
            first_byte = len(prefix.encode())
            tokens = replace(
                tokens, starts=tokens.starts - first_byte, ends=tokens.ends - first_byte
            )
            sides.append(tokens)
            if limit is not None:
                # A run of tokens with one range ends where its last token does: kept whole or not.
                dropped = tokens.ends[limit:] > tokens.starts[limit:]
                kept = min([kept, *tokens.starts[limit:][dropped][:1].tolist()])
        student, teacher = sides
        student_spans, teacher_spans, covered = shared_spans(
            student, teacher, length=length, allowed=_ends(text, self.granularity)
        )
        whole = covered[:, 1] <= kept
        return SpanTable(
            text,
            student[:student_max_length],
            teacher[:teacher_max_length],
            _first_token(student, student_max_length),
            _first_token(teacher, teacher_max_length),
            student_spans[whole],
            teacher_spans[whole],
            covered[whole],
            coverage=float(np.diff(covered).sum() / length) if length else 1.0,
        )


def _first_token(tokens: TokenBytes, limit: int | None) -> int:
    """Index of the first token at or after byte 0 that is no added control token, up to `limit`."""
    width = tokens.ends - tokens.starts
    before = (tokens.starts < 0) | ((width == 0) & tokens.special & (tokens.ends == 0))
    index = len(tokens) if before.all() else int(before.argmin())
    return index if limit is None else min(index, limit)
