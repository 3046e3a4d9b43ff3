"""The spans of a text under two tokenizers, and how they are shown in a terminal."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal, NamedTuple, TextIO

import numpy as np

from sra.token_bytes import TokenBytes

PAINT = {"one": "", "many": "\033[33m", "none": "\033[31m"}


class Cell(NamedTuple):
    """Neighbouring tokens of both sides: a span, or what lies between two.

    kind: "one" token to one, "many" tokens, or "none": in no span.
    student, teacher: ranges of token indices.
    bytes: of the text, or None outside spans.
    """

    kind: Literal["one", "many", "none"]
    student: range
    teacher: range
    bytes: tuple[int, int] | None


@dataclass(frozen=True)
class SpanTable:
    """The spans of one text under two tokenizers.

    Attributes:
        text: the text that was aligned: for `SpanAligner.encode_pair` the completion, for
            `SpanAligner.align` all pieces, one behind the other.
        student_tokens, teacher_tokens: the ids of each side's whole rendering, with byte ranges
            relative to the first byte that it holds of the text (negative in a prefix).
        student_start, teacher_start: index of the first token of the text on each side. A token
            that straddles the text's first byte comes before it. Equal to the number of ids where
            truncation left nothing of the text.
        student, teacher: int64 [S, 2], half-open token ranges of each span, increasing.
        bytes: int64 [S, 2], the UTF-8 range of `text` that both ranges of a span cover.
        coverage: share of the text's bytes inside spans, before truncation; 1.0 for an empty text.
        student_text, teacher_text: each side's rendering from the first byte that it holds of the
            text to the last; of several pieces, with what stands between them.
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
    student_text: str = field(repr=False)
    teacher_text: str = field(repr=False)

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

    def cells(self) -> Iterator[Cell]:
        """The text's tokens from left to right, span by span."""
        at = [self.student_start, self.teacher_start]
        for s, t, b in zip(
            self.student.tolist(), self.teacher.tolist(), self.bytes.tolist(), strict=True
        ):
            if at != [s[0], t[0]]:
                yield Cell("none", range(at[0], s[0]), range(at[1], t[0]), None)
            kind: Literal["one", "many"] = "one" if s[1] - s[0] == t[1] - t[0] == 1 else "many"
            yield Cell(kind, range(*s), range(*t), (b[0], b[1]))
            at = [s[1], t[1]]
        ends = [len(self.student_ids), len(self.teacher_ids)]
        if at != ends:
            yield Cell("none", range(at[0], ends[0]), range(at[1], ends[1]), None)

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
        size = len(self.text.encode())
        student_raw, teacher_raw = self.student_text.encode(), self.teacher_text.encode()
        margin = len(f"{size}-{size}")
        column = max(8, (width - margin - 6) // 2)

        cells = list(self.cells())
        print(
            f"{len(self)} spans over {size} bytes, coverage {self.coverage:.1%}; "
            f"{len(self.student_ids) - self.student_start} student and "
            f"{len(self.teacher_ids) - self.teacher_start} teacher tokens; "
            f"{sum(cell.kind == 'one' for cell in cells)} spans are one token to one",
            file=file,
        )
        print(f"{'bytes':>{margin}} │ {_pad('student', column)} │ teacher", file=file)
        for cell in cells:
            paint = PAINT[cell.kind] if color else ""
            label = f"{cell.bytes[0]}-{cell.bytes[1]}" if cell.bytes else ""
            sides = [
                _wrap(_visible(self.student_tokens, cell.student, student_raw), column),
                _wrap(_visible(self.teacher_tokens, cell.teacher, teacher_raw), column),
            ]
            for one, other in zip_longest(*sides, fillvalue=""):
                line = f"{label:>{margin}} │ {_pad(one, column)} │ {other}".rstrip()
                print(f"{paint}{line}\033[0m" if paint else line, file=file)
                label = ""


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
