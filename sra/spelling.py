"""How a student's tokenizer spells the tokens of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sra.token_bytes import ByteTokenizer

DEPTH = 16  # tokens of a spelling that are kept
ANCHOR = "\n"  # behind it, a tokenizer puts no space of its own before a word


class Trie(NamedTuple):
    """The spellings of a vocabulary as a tree of the student's tokens.

    Node 0 is the root; child c, an edge that bears a token, leads to node c + 1. Children are
    sorted by parent, then by token, so that those of one node are neighbours.

    entries: ``[E]`` ids of the teacher that have a spelling, sorted by it, so that those which
        begin alike are neighbours.
    rank: ``[Vt]`` the place of each id in `entries`, -1 if it has none.
    begins: ``[Vt]`` the first token of each id's spelling, -1 if it has none.
    keys: ``[C]`` parent * size + token of each child, ascending.
    tokens: ``[C]`` its token.
    ranges: ``[C, 2]`` the part of `entries` whose spelling passes through it, half-open.
    first: ``[C + 2]`` the first child of each node; where node n + 1 begins, those of n end.
    used: ``[K]`` the tokens of all spellings, ascending.
    size: more than any token.
    """

    entries: Tensor
    rank: Tensor
    begins: Tensor
    keys: Tensor
    tokens: Tensor
    ranges: Tensor
    first: Tensor
    used: Tensor
    size: int

    def child(self, node: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The child of each node that bears the token, and whether there is one."""
        key = node * self.size + token
        child = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        return child, (self.keys[child] == key) & (token < self.size)


def spelt_with(
    student: ByteTokenizer,
    teacher: ByteTokenizer,
    shared: tuple[Tensor, Tensor],
    student_rows: int | None,
    teacher_rows: int | None,
) -> Trie:
    """How the student spells each entry of the teacher's vocabulary.

    A shared entry is spelt by its partner. Another is spelt as the student's tokenizer splits its
    text; where that gives other bytes (of a part of a character, or because the tokenizer rewrites
    text), by the longest token that fits, from its first byte on. Control tokens that are not
    shared have no spelling, nor have ids without a token.
    """
    table = np.full((len(teacher.token_bytes), DEPTH), -1)
    table[shared[1], 0] = shared[0]
    known = {*shared[1].tolist(), *teacher.special_ids}
    texts = teacher.token_bytes[:teacher_rows]
    others = [i for i, text in enumerate(texts) if text and i not in known]
    spelt = spellings(student, [texts[i] for i in others], student_rows)
    for i, tokens in zip(others, spelt, strict=True):
        table[i, : len(tokens)] = tokens[:DEPTH]
    return trie(table)


def spellings(
    tokenizer: ByteTokenizer, texts: Sequence[bytes], rows: int | None = None
) -> list[list[int]]:
    """The tokens below `rows` that spell each text in the middle of another; [] if none do."""
    pieces = tokenizer.token_bytes
    result: list[list[int]] = [[] for _ in texts]
    whole = [i for i, text in enumerate(texts) if _is_utf8(text)]
    for before in ("", ANCHOR):
        encodings = tokenizer.backend.encode_batch(
            [before + texts[i].decode() for i in whole], add_special_tokens=False
        )
        left = []
        for i, encoding in zip(whole, encodings, strict=True):
            at, missing = len(encoding.ids), len(texts[i])
            while at and missing > 0:
                at -= 1
                missing -= len(pieces[encoding.ids[at]])
            tokens = encoding.ids[at:]
            spelt = b"".join(pieces[token] for token in tokens) == texts[i]
            if spelt and (before or not at) and (rows is None or max(tokens) < rows):
                result[i] = tokens
            else:
                left.append(i)
        whole = left
    longest_first = _Longest(tokenizer, rows)
    return [found or longest_first(text) for found, text in zip(result, texts, strict=True)]


class _Longest:
    """Spells by the longest token that fits, from the first byte on."""

    def __init__(self, tokenizer: ByteTokenizer, rows: int | None) -> None:
        self.ids: dict[bytes, int] = {}
        for i, piece in enumerate(tokenizer.token_bytes[:rows]):
            if piece and i not in tokenizer.special_ids:
                self.ids.setdefault(piece, i)
        self.longest = max(map(len, self.ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self.longest), at, -1)
            end = next((end for end in ends if text[at:end] in self.ids), None)
            if end is None:
                return []
            tokens.append(self.ids[text[at:end]])
            at = end
        return tokens


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def trie(table: np.ndarray) -> Trie:
    """Of spellings ``[Vt, depth]``, each filled up with -1."""
    order = np.lexsort(table.T[::-1])
    order = order[table[order, 0] >= 0]
    rank = np.full(len(table), -1)
    rank[order] = np.arange(len(order))
    size = int(table.max()) + 1
    node, count = np.zeros(len(order), np.int64), 0
    keys, ranges = [], []
    for tokens in table[order].T:  # the children of one depth after those of another
        rows = np.flatnonzero(tokens >= 0)
        key = node[rows] * size + tokens[rows]
        new = np.append(True, key[1:] != key[:-1])[: len(key)]
        begins = np.flatnonzero(new)
        lasts = np.append(begins[1:], len(key))[: len(begins)] - 1
        keys.append(key[begins])
        ranges.append(np.stack([rows[begins], rows[lasts] + 1], axis=1))
        node[rows] = count + new.cumsum()
        count += len(begins)
    all_keys = np.concatenate(keys)
    first = np.searchsorted(all_keys, np.arange(count + 2) * size)
    return Trie(
        entries=torch.from_numpy(order),
        rank=torch.from_numpy(rank),
        begins=torch.from_numpy(table[:, 0].copy()),
        keys=torch.from_numpy(all_keys),
        tokens=torch.from_numpy(all_keys % size),
        ranges=torch.from_numpy(np.concatenate(ranges)),
        first=torch.from_numpy(first),
        used=torch.from_numpy(np.unique(table[table >= 0])),
        size=size,
    )
