"""The checks of `sra doctor` on what the two vocabularies can say to each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from sra.doctor.checks import FEW, Finding, Side, spelling_tokens
from sra.respelling import in_spans
from sra.span_table import SpanTable
from sra.vocabulary import SharedVocabulary

Match = Literal["raw", "normalised"]
MATCHES: tuple[Match, ...] = ("raw", "normalised")
# Shares of the teacher's probability, or of the student's tokens.
MUCH_LOST, MOST = 0.5, 0.9


def shared_vocabularies(student: Side, teacher: Side) -> dict[Match, SharedVocabulary | None]:
    """What is shared by each `match`, None if nothing is; empty if every string has the same id on
    both sides."""
    one, other = student.bytes.backend, teacher.bytes.backend
    if one.get_vocab_size() == other.get_vocab_size() and one.get_vocab() == other.get_vocab():
        return {}
    found: dict[Match, SharedVocabulary | None] = {}
    for match in MATCHES:
        try:
            found[match] = SharedVocabulary(
                student.bytes, teacher.bytes, match=match,
                student_rows=student.rows, teacher_rows=teacher.rows,
            )  # fmt: skip
        except ValueError:
            found[match] = None
    return found


def vocabularies(
    shared: dict[Match, SharedVocabulary | None], match: Match, student: Side,
    tables: Sequence[SpanTable], outside: str,
) -> list[Finding]:  # fmt: skip
    """What the vocabularies share, and how much of the data's teacher tokens that is."""
    topic = "vocabulary"
    if not shared:
        return [
            Finding("note", topic, f"both have one and the same, of {student.entries:,} entries")
        ]
    counts: Counter[int] = Counter()
    for table in tables:
        counts.update(table.teacher_ids[table.teacher_start :].tolist())
    raw, normal = (_entries_and_share(shared[match], counts) for match in MATCHES)
    if not normal[0]:
        return [
            Finding(
                "error", topic, "the vocabularies share no entry",
                "The logit term has nothing to compare: choose another pair.",
            )
        ]  # fmt: skip
    what = "entries are shared, {:.1%} of the teacher's tokens in this data"
    text = f"{normal[0]:,} {what.format(normal[1])}"
    if raw != normal:
        text += f" (normalised; raw: {raw[0]:,}, {raw[1]:.1%})"
    if normal[1] < MUCH_LOST:
        text += "; mostly, the teacher says what the student has no token for"
        if outside == "renormalise":
            return [
                Finding(
                    "warning", topic, text,
                    "Its target inside the shared entries is noise then: use the respell recipe, "
                    "or --outside weight, as the boundary recipe does, or bucket.",
                )
            ]  # fmt: skip
        return [Finding("note", topic, text)]
    if match == "raw" and normal[1] > raw[1] + FEW:
        return [Finding("note", topic, text, "Use --vocabulary-match normalised.")]
    return [Finding("ok", topic, text)]


def _entries_and_share(shared: SharedVocabulary | None, counts: Counter[int]) -> tuple[int, float]:
    """Shared entries, and the share of the counted teacher tokens that they are."""
    if shared is None:
        return 0, 0.0
    hits = sum(counts[i] for i in shared.teacher_ids.tolist())
    return len(shared), hits / max(sum(counts.values()), 1)


def targets(shared: SharedVocabulary, tables: Sequence[SpanTable]) -> Finding:
    """For how many of the student's tokens the respelt predictions of the teacher are a target."""
    spelt = shared.trie(torch.device("cpu"))
    taught = 0
    for table in tables:
        known = (table.student[:, 0] > 0) & (table.teacher[:, 0] > 0)
        ids = torch.from_numpy(table.student_ids), torch.from_numpy(table.teacher_ids)
        spans = torch.from_numpy(table.student[known]), torch.from_numpy(table.teacher[known])
        taught += sum(len(places.rows) for places in in_spans(*ids, *spans, spelt))
    share = taught / max(sum(spelling_tokens(table, 0) for table in tables), 1)
    text = f"{share:.1%} of the student's tokens have a target in the teacher's predictions"
    if share >= MOST:
        return Finding("ok", "targets", text)
    return Finding(
        "note" if share >= MUCH_LOST else "warning", "targets",
        f"{text}; the others are longer than the teacher's, or behind one that is",
        "They learn from the labels; with --likelihood 1, from the teacher's probability of whole "
        "spans too.",
    )  # fmt: skip
