"""The checks of `sra doctor`, each a function that gives findings. None needs weights."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sra.alignment import SpanAligner
from sra.chat import Rendering, render
from sra.data import snippet
from sra.span_table import SpanTable
from sra.token_bytes import ByteTokenizer

Level = Literal["ok", "note", "warning", "error"]
# The share of the texts, or of the tokens, from which a finding is no small matter any more.
FEW = 0.01
# Texts on which normalisers show what they do: each rewrites the left side into the right one.
REWRITES = (
    ("composes accents (NFC)", "e\u0301", "\u00e9"),
    ("decomposes accents (NFD)", "\u00e9", "e\u0301"),
    ("rewrites compatible characters (NFKC)", "\ufb01\uff21", "fiA"),
    ("lower-cases", "A", "a"),
    ("strips accents", "\u00e9", "e"),
    ("squeezes white space", "a  b", "a b"),
    ("turns line breaks into spaces", "a\nb", "a b"),
)


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    level: "ok"; "note", good to know; "warning", it will hurt; "error", it cannot run.
    topic: what was looked at.
    text: what was found.
    remedy: what to do about it; "" where nothing needs to be done.
    """

    level: Level
    topic: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Side:
    """One model's tokenizer, of `transformers`, and configuration."""

    name: Literal["student", "teacher"]
    tokenizer: Any
    config: Any
    bytes: ByteTokenizer

    @property
    def entries(self) -> int:
        """Ids that the tokenizer can give: the largest, plus one."""
        return len(self.bytes.token_bytes)

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def rows(self) -> int:
        """Rows of the head."""
        return self.text_config.vocab_size


@dataclass(frozen=True)
class Sample:
    """The rows that both templates write, as they are trained on.

    numbers: where each stands in the data.
    refused: the side that could not write a row, the row's number, and why.
    """

    numbers: list[int]
    rows: list[Mapping[str, Any]]
    student: list[Rendering]
    teacher: list[Rendering]
    tables: list[SpanTable]
    refused: list[tuple[str, int, str]]

    @property
    def texts(self) -> list[str]:
        """What is learnt of each row."""
        return [table.text for table in self.tables]


def sampled(
    aligner: SpanAligner,
    student: Side,
    teacher: Side,
    rows: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
) -> Sample:
    """Write and align the rows."""
    sample = Sample([], [], [], [], [], [])
    for number, row in zip(numbers, rows, strict=True):
        written = []
        for side in (student, teacher):
            try:
                written.append(render(side.tokenizer, row))
            except ValueError as error:
                sample.refused.append((side.name, number, str(error)))
                break
        else:
            sample.numbers.append(number)
            sample.rows.append(row)
            sample.student.append(written[0])
            sample.teacher.append(written[1])
            sample.tables.append(aligner.align(*written))
    return sample


def alignment(sample: Sample, minimum: float) -> list[Finding]:
    """Coverage, and what the spans are made of."""
    sizes = np.array([len(text.encode()) for text in sample.texts])
    shares = np.array([table.coverage for table in sample.tables])
    coverage = float((shares * sizes).sum() / max(sizes.sum(), 1))
    spans = sum(map(len, sample.tables))
    if not spans:
        return [
            Finding(
                "error", "coverage", "there is no span: the tokenizers share no boundary.",
                "Look at a row with `sra align`, and choose another pair.",
            )
        ]  # fmt: skip
    worst = int(shares.argmin())
    lowest = (
        f"worst is row {sample.numbers[worst]} with {shares[worst]:.1%}: "
        f"{snippet(sample.rows[worst])!r}"
    )
    text = f"{coverage:.1%} of the trained bytes are in spans"
    remedy = ""
    level: Level = "ok"
    if coverage < minimum:
        level = "warning"
        text += f" (minimum {minimum:.0%}); {lowest}"
        remedy = (
            "sra distill will refuse this data. Look at the row with `sra align`, choose another "
            f"pair, drop such rows, or lower --min-coverage under {coverage:.2f}."
        )
    elif shares[worst] < minimum:
        level = "note"
        text += (
            f"; {int((shares < minimum).sum())} of {len(shares)} rows are under {minimum:.0%}, "
            f"{lowest}"
        )
        remedy = (
            "Look at the row with `sra align`; what is in no span learns from the labels alone."
        )
    # What a template writes between turns is no text of the row: count where there is one turn.
    whole = [
        table
        for table, *sides in zip(sample.tables, sample.student, sample.teacher, strict=True)
        if all(len(side.pieces) == len(side.pieces[0].matches) == 1 for side in sides)
    ]
    tokens = [sum(spelling_tokens(table, side) for table in whole) for side in (0, 1)]
    held = [
        sum(int(np.diff(spans_of).sum()) for spans_of in column)
        for column in ([t.student for t in whole], [t.teacher for t in whole])
    ]
    single = sum(
        int(((np.diff(t.student) == 1) & (np.diff(t.teacher) == 1)).sum()) for t in sample.tables
    )
    made_of = f"{single / spans:.1%} are one token to one"
    few = False
    if whole:
        ours, theirs = (min(1.0, h / max(n, 1)) for h, n in zip(held, tokens, strict=True))
        count = sum(map(len, whole))
        made_of = (
            f"{count / max(tokens[0], 1):.2f} a student token; {made_of}; they hold {ours:.1%} of "
            f"the student's tokens and {theirs:.1%} of the teacher's"
        )
        few = ours < minimum and coverage >= minimum
    return [
        Finding(level, "coverage", text, remedy),
        Finding("note" if few else "ok", "spans", made_of),
    ]


def spelling_tokens(table: SpanTable, side: int) -> int:
    """Tokens that spell something of the text."""
    tokens = (table.student_tokens, table.teacher_tokens)[side]
    length = len((table.student_text, table.teacher_text)[side].encode())
    wide = tokens.ends > tokens.starts
    return int((wide & (tokens.ends > 0) & (tokens.starts < length)).sum())


def lengths(sample: Sample, max_length: int) -> list[Finding]:
    """Rows that truncation cuts."""
    counts = [(len(t.student_ids), len(t.teacher_ids)) for t in sample.tables]
    cut = [sum(c[i] > max_length for c in counts) for i in (0, 1)]
    longest = [max(c[i] for c in counts) for i in (0, 1)]
    text = f"longest row: {longest[0]} student and {longest[1]} teacher tokens"
    if not any(cut):
        return [Finding("ok", "length", f"{text}; max_length {max_length} cuts none")]
    lost = [t.student_start >= max_length for t in sample.tables]
    text += f"; max_length {max_length} cuts {cut[0]} and {cut[1]} of {len(counts)} rows"
    if any(lost):
        text += f", and leaves nothing to learn of {sum(lost)}"
    return [
        Finding(
            "warning" if any(lost) else "note", "length", text,
            f"Raise --max-length to {max(longest)}, or drop the longest rows.",
        )
    ]  # fmt: skip


def round_trip(side: Side, sample: Sample) -> Finding:
    """Whether the tokens of a text spell the text."""
    topic = f"{side.name} round trip"
    backend = side.bytes.backend
    changed = []
    for number, text in zip(sample.numbers, sample.texts, strict=True):
        ids = backend.encode(text, add_special_tokens=False).ids
        back = backend.decode(ids, skip_special_tokens=False)
        if back != text:
            changed.append((number, text, back))
    total = len(sample.texts)
    if not changed:
        return Finding("ok", topic, f"all {total} texts come back as they were")
    number, text, back = changed[0]
    before, after = map(_named, first_difference(text, back))
    said = (
        f"{len(changed)} of {total} texts come back changed, first row {number}: {before} becomes "
        f"{after}"
    )
    if all(back == normalised(side, text) for _, text, back in changed):
        return Finding("note", topic, f"{said}; its normaliser does that")
    if side.name == "student":
        remedy = "The student can never write these texts. Clean them, or choose another student."
    else:
        remedy = "The teacher reads another text than the student. Clean them, or choose another."
    return Finding("warning" if len(changed) > FEW * total else "note", topic, said, remedy)


def first_difference(one: str, other: str, width: int = 12) -> tuple[str, str]:
    """A few characters of both around the first in which they differ."""
    at = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    part = slice(max(0, at - width // 2), at + width // 2)
    return one[part], other[part]


def normalised(side: Side, text: str) -> str:
    """The text as the side's tokenizer reads it, with plain spaces."""
    normalizer = side.bytes.backend.normalizer
    if normalizer is None:
        return text
    out = normalizer.normalize_str(text).replace("\u2581", " ")
    # SentencePiece puts a word-start mark in front.
    marks = (len(x) - len(x.lstrip(" ")) for x in (out, text))
    return out[1:] if next(marks) == next(marks) + 1 else out


def normalisers(student: Side, teacher: Side, sample: Sample) -> list[Finding]:
    """Whether one side rewrites the text before it cuts it, and the other does not."""
    effects = [
        [name for name, before, after in REWRITES if normalised(side, before) == after]
        for side in (student, teacher)
    ]
    differing = [
        (number, one, other)
        for number, text in zip(sample.numbers, sample.texts, strict=True)
        for one, other in [(normalised(student, text), normalised(teacher, text))]
        if one != other
    ]
    only = [
        f"the {side} {', '.join(name for name in own if name not in others)}"
        for side, own, others in (
            ("student", effects[0], effects[1]), ("teacher", effects[1], effects[0]),
        )
        if set(own) - set(others)
    ]  # fmt: skip
    if not only and not differing:
        both = f": both {' and '.join(effects[0])}" if effects[0] else ""
        return [Finding("ok", "normaliser", f"both sides read the same characters{both}")]
    text = "; ".join(only) or "the sides rewrite text in different ways"
    if not differing:
        return [Finding("note", "normaliser", f"{text}; no text of this data shows it")]
    number, one, other = differing[0]
    ours, theirs = first_difference(one, other)
    text += (
        f"; {len(differing)} of {len(sample.texts)} texts differ, first row {number}: the student "
        f"reads {_named(ours)}, the teacher {_named(theirs)}"
    )
    nfc = all(unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)
              for _, a, b in differing)  # fmt: skip
    remedy = (
        'Normalise the data once, with unicodedata.normalize("NFC", text).'
        if nfc
        else "Apply the same rewriting to the data, or choose a pair that reads alike."
    )
    level: Level = "warning" if len(differing) > FEW * len(sample.texts) else "note"
    return [Finding(level, "normaliser", text, remedy)]


def _named(text: str) -> str:
    """The text, and the code points of what is not ASCII."""
    codes = " ".join(f"U+{ord(c):04X}" for c in text if not c.isascii())
    return f"{text!r} ({codes})" if codes and len(codes) <= 40 else repr(text)
