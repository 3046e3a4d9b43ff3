"""Where two tokenizations of a sample agree, known by their ids alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sra.alignment import shared_spans
from sra.data import IGNORED
from sra.token_bytes import ByteTokenizer, TokenBytes, byte_tokenizer


class Pairs(NamedTuple):
    """Where both sides predict what follows the same byte: positions in one row's sequences.

    student, teacher: int64 [P], positions whose logits are compared: before each span, and behind
        the last, if that is not left out.
    student_spans, teacher_spans: int64 [S, 2], positions from the first token of each of these
        spans to behind its last.
    coverage: share of the student's completion that lies in spans, by bytes.
    """

    student: np.ndarray
    teacher: np.ndarray
    student_spans: np.ndarray
    teacher_spans: np.ndarray
    coverage: float


class SampleAligner:
    """Aligns completions that are known by their tokens, which may be another tokenization than
    that of their text.

    Args:
        student, teacher: tokenizers as `byte_tokenizer` takes them.
        skip_student_eos, skip_teacher_eos: leave out where that side predicts its end of sequence.
    """

    def __init__(
        self, student: Any, teacher: Any, *, skip_student_eos: bool, skip_teacher_eos: bool
    ) -> None:
        self.student = byte_tokenizer(student)
        self.teacher = byte_tokenizer(teacher)
        self.skipped = (
            self.student.eos_id if skip_student_eos else None,
            self.teacher.eos_id if skip_teacher_eos else None,
        )

    def __call__(self, student_labels: np.ndarray, teacher_labels: np.ndarray) -> Pairs:
        """Of one row, int64 [Ts] and [Tt], -100 outside the completion."""
        at = [np.flatnonzero(labels != IGNORED) for labels in (student_labels, teacher_labels)]
        ids = [
            labels[own] for labels, own in zip((student_labels, teacher_labels), at, strict=True)
        ]
        student, teacher, length = self._tokens(*ids)
        spans = shared_spans(student, teacher, length=length)
        size = _text_length(student)
        coverage = float(np.diff(np.minimum(spans[2], size)).sum() / size) if size else 1.0
        # Each boundary by the token that follows it: of every span the first, and what is behind
        # the last span.
        follows = [np.append(side[:, 0], side[-1:, 1]) for side in spans[:2]]
        keep = np.ones(len(follows[0]), bool)
        for own, own_ids, following, end in zip(at, ids, follows, self.skipped, strict=True):
            keep &= following < len(own)
            known = np.minimum(following, len(own) - 1)
            if len(own):
                keep &= (own[known] > 0) & (own_ids[known] != end)
        student_at, teacher_at = (
            own[following[keep]] - 1 for own, following in zip(at, follows, strict=True)
        )
        student_spans, teacher_spans = (
            np.stack([own[side[:, 0]], own[side[:, 1] - 1] + 1], axis=1)[keep[:-1]]
            for own, side in zip(at, spans, strict=False)
        )
        return Pairs(student_at, teacher_at, student_spans, teacher_spans, coverage)

    def _tokens(
        self, student_ids: np.ndarray, teacher_ids: np.ndarray
    ) -> tuple[TokenBytes, TokenBytes, int]:
        """Both sides' tokens by the bytes of their common text, and its length."""
        student, teacher = _spelt(self.student, student_ids), _spelt(self.teacher, teacher_ids)
        # A tokenizer with word-start marks puts a space before the text.
        variants = [
            (student, teacher),
            (student, _unspaced(teacher)),
            (_unspaced(student), teacher),
        ]
        lengths = [_common_length(one[1], other[1]) for one, other in variants]
        best = int(np.argmax(lengths))
        one, other = variants[best]
        if lengths[best] >= len(_text(one)):
            return one[0], other[0], lengths[best]
        # A tokenizer that normalises text does not spell it; tokenised again, it says what is what.
        for known in (student, _unspaced(student)):
            again = _retokenised(self.teacher, teacher_ids, _text(known))
            if again is not None:
                return known[0], again, len(_text(known))
        for known in (teacher, _unspaced(teacher)):
            again = _retokenised(self.student, student_ids, _text(known))
            if again is not None:
                return again, known[0], len(_text(known))
        return one[0], other[0], lengths[best]


def _spelt(tokenizer: ByteTokenizer, ids: np.ndarray) -> tuple[TokenBytes, bytes]:
    """The tokens at the bytes that they spell by themselves, and those bytes."""
    table = tokenizer.token_bytes
    pieces = [table[i] if i < len(table) else b"" for i in ids.tolist()]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    special = np.isin(ids, list(tokenizer.special_ids))
    return TokenBytes(ids, np.append(0, ends)[: len(ids)], ends, special), b"".join(pieces)


def _unspaced(side: tuple[TokenBytes, bytes]) -> tuple[TokenBytes, bytes]:
    """The same without the space that the first token spells, if it does."""
    tokens, spelt = side
    if not spelt.startswith(b" "):
        return side
    starts, ends = (np.maximum(at - 1, 0) for at in (tokens.starts, tokens.ends))
    return TokenBytes(tokens.ids, starts, ends, tokens.special), spelt[1:]


def _text(side: tuple[TokenBytes, bytes]) -> bytes:
    return side[1][: _text_length(side[0])]


def _text_length(tokens: TokenBytes) -> int:
    """Bytes before the control tokens at the end."""
    text = np.flatnonzero(~tokens.special)
    return int(tokens.ends[text[-1]]) if len(text) else 0


def _common_length(one: bytes, other: bytes) -> int:
    size = min(len(one), len(other))
    a, b = (np.frombuffer(raw[:size], np.uint8) for raw in (one, other))
    differ = np.flatnonzero(a != b)
    return int(differ[0]) if len(differ) else size


def _retokenised(tokenizer: ByteTokenizer, ids: np.ndarray, text: bytes) -> TokenBytes | None:
    """`ids` as tokens of `text`, if they are what the tokenizer makes of it (and an end)."""
    tokens = tokenizer(text.decode(errors="replace"))
    if not len(tokens) or not np.array_equal(tokens.ids, ids[: len(tokens)]):
        return None
    more = len(ids) - len(tokens)
    end = np.full(more, tokens.ends[-1])
    return TokenBytes(
        ids,
        np.append(tokens.starts, end),
        np.append(tokens.ends, end),
        np.append(tokens.special, np.ones(more, bool)),
    )
