"""Which entries of two vocabularies are the same token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch

from sra.chat import turn_end_id
from sra.spelling import Trie, spelt_with
from sra.token_bytes import BYTE_PIECE, ByteTokenizer, byte_tokenizer


class SharedVocabulary:
    """The entries that a student's and a teacher's vocabulary share, one to one.

    Args:
        student_tokenizer, teacher_tokenizer: fast tokenizers of `transformers`,
            `tokenizers.Tokenizer`s or `ByteTokenizer`s.
        match: "raw" pairs identical strings of the two vocabularies (SRA, arXiv 2605.01205; across
            families, `Ġthe` and `▁the` differ then, and `Ã©` is a different token from `é`).
            "normalised" pairs tokens that stand for the same bytes, whatever the spelling of word
            starts (`Ġ`, `▁`, a WordPiece entry without `##`) and of bytes (`<0x0A>`); a piece is
            preferred to a byte token of the same byte; control tokens pair only with control tokens
            of the same name, but what ends a turn on both sides pairs whatever its name, and so do
            the ends of sequences, unless one of them ends turns and has its partner already.
        student_rows, teacher_rows: rows of the models' heads. Ids beyond them are left out. Rows
            beyond the tokenizer (padding of the head) belong to no token and never appear.

    Attributes:
        student_ids, teacher_ids: int64 [K], ascending in the student's id; entry k of both is the
            same token.

    Raises:
        TypeError: a tokenizer is not a fast one.
        ValueError: an unknown `match`, or nothing is shared.
    """

    student_ids: torch.Tensor
    teacher_ids: torch.Tensor

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        match: Literal["raw", "normalised"],
        student_rows: int | None = None,
        teacher_rows: int | None = None,
    ) -> None:
        if match not in ("raw", "normalised"):
            raise ValueError(f"match must be 'raw' or 'normalised', got {match!r}")
        self._sides = byte_tokenizer(student_tokenizer), byte_tokenizer(teacher_tokenizer)
        self._rows = student_rows, teacher_rows
        self._match = match
        ends = [_ends(student_tokenizer), _ends(teacher_tokenizer)]
        self._ends = list(zip(*ends, strict=True))
        shared = self._pairs(match)
        if not shared:
            raise ValueError(
                f"The vocabularies share no token (match={match!r}; "
                f"{len(self._sides[0].token_bytes):,} student and "
                f"{len(self._sides[1].token_bytes):,} teacher entries, heads of "
                f"{student_rows or 'unlimited'} and {teacher_rows or 'unlimited'} rows). "
                + (
                    "They may spell word starts differently: try match='normalised'."
                    if match == "raw"
                    else "Use an objective that needs no shared vocabulary."
                )
            )
        self.student_ids, self.teacher_ids = torch.tensor(shared, dtype=torch.int64).unbind(1)
        self._tries: dict[torch.device, Trie] = {}

    @torch.compiler.disable  # bytes, dictionaries and a tokenizer, once
    def trie(self, device: torch.device) -> Trie:
        """How the student spells every entry of the teacher's, shared or not; made when it is first
        asked for (2 s for 150,000 entries), and kept on each device.

        By bytes, whatever `match`: of equal strings, some spell others (Gemma's `é` is two bytes,
        in a byte-level alphabet it stands for a third), and the ends of sequences are not equal.
        """
        if not self._tries:
            shared = self.student_ids, self.teacher_ids
            if self._match == "raw":
                same = self._pairs("normalised")
                ids = torch.tensor(same, dtype=torch.int64).view(-1, 2)
                shared = ids[:, 0], ids[:, 1]
            self._tries[torch.device("cpu")] = spelt_with(*self._sides, shared, *self._rows)
        if device not in self._tries:
            own = self._tries[torch.device("cpu")]
            moved = {name: x.to(device) for name, x in own._asdict().items() if name != "size"}
            self._tries[device] = own._replace(**moved)
        return self._tries[device]

    def _pairs(self, match: Literal["raw", "normalised"]) -> list[tuple[int, int]]:
        """(student's id, teacher's id) of each token that both have, ascending."""
        entries = _by_string if match == "raw" else _by_bytes
        own, other = (entries(side) for side in self._sides)
        pairs = {own[key]: other[key] for key in own.keys() & other.keys()}
        if match == "normalised":
            for s, t in _first_come(self._ends):
                pairs = {a: b for a, b in pairs.items() if b != t}
                pairs[s] = t
        student_rows, teacher_rows = self._rows
        return sorted(
            (s, t)
            for s, t in pairs.items()
            if (student_rows is None or s < student_rows)
            and (teacher_rows is None or t < teacher_rows)
        )

    def __len__(self) -> int:
        return len(self.student_ids)

    def __repr__(self) -> str:
        return f"SharedVocabulary({len(self):,} tokens)"


def check_heads(vocabulary: SharedVocabulary | None, student_rows: int, teacher_rows: int) -> None:
    """Raise ValueError unless heads of so many rows can be compared; None: as one vocabulary."""
    if vocabulary is None:
        if student_rows != teacher_rows:
            raise ValueError(
                f"The student's head has {student_rows} rows and the teacher's {teacher_rows}, so "
                "they do not share one vocabulary. Pass vocabulary=SharedVocabulary("
                'student_tokenizer, teacher_tokenizer, match="normalised").'
            )
        return
    for side, ids, rows in (
        ("student", vocabulary.student_ids, student_rows),
        ("teacher", vocabulary.teacher_ids, teacher_rows),
    ):
        if int(ids.max()) >= rows:
            raise ValueError(
                f"The shared vocabulary names id {int(ids.max())} of the {side}, whose head has "
                f"{rows} rows. Build it with {side}_rows={rows}."
            )


def _ends(tokenizer: Any) -> tuple[int | None, int | None]:
    """The tokens that end a turn and a sequence; without a template, one for both."""
    eos = byte_tokenizer(tokenizer).eos_id
    return turn_end_id(tokenizer) if hasattr(tokenizer, "chat_template") else eos, eos


def _first_come(
    ends: Sequence[tuple[int | None, int | None]],
) -> list[tuple[int, int]]:
    """Pairs of which none has a token of one before it."""
    found: dict[int, int] = {}
    for s, t in ends:
        if s is not None and t is not None and s not in found and t not in found.values():
            found[s] = t
    return list(found.items())


def _by_string(tokenizer: ByteTokenizer) -> dict[Any, int]:
    return tokenizer.backend.get_vocab(with_added_tokens=True)


def _by_bytes(tokenizer: ByteTokenizer) -> dict[Any, int]:
    """(is a control token, bytes, n) -> id of the n-th entry that spells them, byte tokens last."""
    model = tokenizer.backend.model
    continuation = getattr(model, "continuing_subword_prefix", None) or ""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    seen: Counter[tuple[bool, bytes]] = Counter()
    found = {}
    for piece, i in sorted(
        vocabulary.items(), key=lambda item: (BYTE_PIECE.fullmatch(item[0]) is not None, item[1])
    ):
        special = i in tokenizer.special_ids
        spelt = tokenizer.token_bytes[i]
        if continuation and not special and not piece.startswith(continuation):
            spelt = b" " + spelt
        if spelt:
            found[special, spelt, seen[special, spelt]] = i
            seen[special, spelt] += 1
    return found
