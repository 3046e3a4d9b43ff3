"""Which UTF-8 bytes of a text each token stands for, for any fast Hugging Face tokenizer.

The offsets that `tokenizers` reports count characters, leave out what a normaliser removed, and
give every piece of a split character the whole character. `ByteTokenizer` turns them into byte
ranges that are exact wherever they can be proven: the bytes that each vocabulary entry spells are
known, so a run of tokens is exact when its bytes, joined, are the bytes of the text. What cannot
be proven is widened to the run, never guessed.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK = re.compile(r"\s")
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-ins: code point -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{byte: byte for byte in printable}, **{256 + i: b for i, b in enumerate(others)}}


_FROM_BYTE_LEVEL = _byte_level_alphabet()


@dataclass(frozen=True)
class TokenBytes:
    """One tokenization of one text, by UTF-8 bytes.

    Attributes:
        ids: int64 [n], token ids.
        starts: int64 [n], first byte of each token.
        ends: int64 [n], one past its last byte.
        special: bool [n], control tokens: added by the tokenizer (BOS, [CLS]) or spelt in the text
            (`<|im_end|>`).

    Both `starts` and `ends` are non-decreasing, and two tokens are either disjoint or share one
    range. A shared range is a run of tokens that no byte position can be proven to divide. A token
    that stands for no byte of the text has `starts == ends`. White space that no token covers lies
    in a gap before the token that follows it; other characters that a normaliser removed belong to
    the token before them.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    special: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> TokenBytes:
        return TokenBytes(self.ids[part], self.starts[part], self.ends[part], self.special[part])


def clean_text(text: str) -> str:
    """`text` with every surrogate code point replaced by U+FFFD (3 bytes, as a surrogate has in
    CESU-8 and WTF-8), because tokenizers and UTF-8 know no surrogates."""
    try:
        text.encode()  # cheaper than a search, and text is nearly always clean
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def byte_offsets(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: the UTF-8 byte at which each character of `text` starts."""
    if text.isascii():
        return np.arange(len(text) + 1)
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    offsets = np.zeros(len(code) + 1, np.int64)
    np.cumsum(1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF), out=offsets[1:])
    return offsets


class ByteTokenizer:
    """Encodes a text and says which of its bytes each token stands for.

    Args:
        tokenizer: a fast tokenizer of `transformers`, or a `tokenizers.Tokenizer`. A private copy
            is taken, without truncation and padding, so later changes to the original are not seen.

    Attributes:
        backend: the private copy.
        eos_id: the id of the end-of-sequence token, where `tokenizer` knows one.
        special_ids: ids of all control tokens.

    Raises:
        TypeError: a tokenizer that is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, Tokenizer):
            raise TypeError(
                f"{type(tokenizer).__name__} gives no character offsets: alignment needs a fast "
                "tokenizer. Load it with AutoTokenizer.from_pretrained(..., use_fast=True), or pass"
                " a tokenizers.Tokenizer."
            )
        self.backend: Tokenizer = copy.deepcopy(backend)
        self.backend.encode_special_tokens = backend.encode_special_tokens
        self.backend.no_truncation()
        self.backend.no_padding()
        self.eos_id: int | None = getattr(tokenizer, "eos_token_id", None)
        self.special_ids = {
            i for i, token in self.backend.get_added_tokens_decoder().items() if token.special
        }

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id spells, by id; b"" for an id that no token has.

        Read from the vocabulary alone: byte-level stand-ins and `<0xNN>` pieces become bytes, ▁
        becomes a space, `##` and `</w>` are dropped. Whether a text really holds those bytes is for
        the caller to verify.
        """
        tokenizer = self.backend
        parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
        state = b"".join(part.__getstate__() for part in parts if part is not None).decode()
        byte_level = '"ByteLevel"' in state
        byte_fallback = '"ByteFallback"' in state or getattr(
            tokenizer.model, "byte_fallback", False
        )
        space = "▁" if "▁" in state else None
        prefix = getattr(tokenizer.model, "continuing_subword_prefix", None) or ""
        suffix = getattr(tokenizer.model, "end_of_word_suffix", None) or ""

        def spell(piece: str) -> bytes:
            piece = piece.removeprefix(prefix).removesuffix(suffix)
            if byte_level:
                try:
                    return piece.translate(_FROM_BYTE_LEVEL).encode("latin-1")
                except UnicodeEncodeError:
                    return piece.encode()
            if byte_fallback and (byte := BYTE_PIECE.fullmatch(piece)):
                return bytes([int(byte[1], 16)])
            return (piece.replace(space, " ") if space else piece).encode()

        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        added = tokenizer.get_added_tokens_decoder()
        table = [b""] * (1 + max(chain(vocabulary.values(), added), default=-1))
        for piece, i in vocabulary.items():
            table[i] = spell(piece)
        for i, token in added.items():
            table[i] = token.content.encode()
        return table

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array(list(map(len, self.token_bytes)), np.int64)

    @cached_property
    def _is_special(self) -> np.ndarray:
        table = np.zeros(len(self.token_bytes), bool)
        table[list(self.special_ids)] = True
        return table

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> TokenBytes:
        """Tokenise `text`. Never raises on text; lone surrogates count as U+FFFD."""
        text = clean_text(text)
        raw = text.encode()
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        listed = encoding.ids
        ids = np.array(listed, np.int64)
        special = self._is_special[ids]
        pieces = list(map(self.token_bytes.__getitem__, listed))
        lengths = self._lengths[ids]
        if add_special_tokens:
            added = encoding.special_tokens_mask
            special |= np.array(added, bool)
            pieces = [b"" if mask else piece for mask, piece in zip(added, pieces, strict=True)]
            lengths = np.where(added, 0, lengths)
        ends = _spelt_ends(pieces, lengths, raw)
        if ends is not None:
            return TokenBytes(ids, np.append(0, ends[:-1])[: len(ids)], ends, special)
        return TokenBytes(ids, *_ends_from_offsets(encoding.offsets, pieces, text, raw), special)


def byte_tokenizer(tokenizer: Any) -> ByteTokenizer:
    """`tokenizer` as a `ByteTokenizer`; one that already is comes back as it is."""
    return tokenizer if isinstance(tokenizer, ByteTokenizer) else ByteTokenizer(tokenizer)


def _spelt_ends(pieces: list[bytes], lengths: np.ndarray, raw: bytes) -> np.ndarray | None:
    """Where each piece, of these lengths, ends, if the pieces spell `raw`, or `raw` behind the
    space that a tokenizer with word-start marks puts before a text; else None."""
    spelt = b"".join(pieces)
    dummy = len(spelt) - len(raw)
    if dummy not in (0, 1) or not spelt.endswith(raw) or spelt[:dummy] not in (b"", b" "):
        return None
    ends = lengths.cumsum()
    return np.maximum(ends - dummy, 0) if dummy else ends


def _ends_from_offsets(
    offsets: list[tuple[int, int]], pieces: list[bytes], text: str, raw: bytes
) -> tuple[np.ndarray, np.ndarray]:
    """First and last byte of each token of a text that its tokens do not spell byte by byte."""
    n = len(offsets)
    low, high = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * n).reshape(n, 2).T
    wide = np.flatnonzero(high > low)
    if not len(wide):
        return np.zeros(n, np.int64), np.zeros(n, np.int64)

    # Runs: maximal chains of tokens whose character ranges overlap.
    reach = np.maximum.accumulate(high[wide])
    ahead = np.minimum.accumulate(low[wide][::-1])[::-1]
    first = np.append(0, np.flatnonzero(reach[:-1] <= ahead[1:]) + 1)
    last = np.append(first[1:], len(wide))
    run_low, run_high = ahead[first], reach[last - 1]

    # A mark that was composed or stripped goes with the token before it; a space does not.
    next_low = np.append(run_low[1:], len(text))
    widened = run_high.copy()
    for run in np.flatnonzero(run_high < next_low).tolist():
        gap = text[run_high[run] : next_low[run]]
        blank = _BLANK.search(gap)
        widened[run] += blank.start() if blank else len(gap)

    at = byte_offsets(text)
    size = last - first
    starts, ends = np.repeat(at[run_low], size), np.repeat(at[widened], size)
    members, bounds = wide.tolist(), np.stack([first, last, at[run_low], at[run_high]], 1)
    for begin, end, left, right in bounds[size > 1].tolist():
        run_pieces = [pieces[i] for i in members[begin:end]]
        lengths = np.array(list(map(len, run_pieces)), np.int64)
        inner = _spelt_ends(run_pieces, lengths, raw[left:right])
        if inner is not None:
            ends[begin : end - 1] = starts[begin + 1 : end] = left + inner[:-1]

    # A token without text sits where the token before it ends.
    all_ends = np.zeros(n, np.int64)
    all_ends[wide] = ends
    all_ends = np.maximum.accumulate(all_ends)
    all_starts = all_ends.copy()
    all_starts[wide] = starts
    return np.minimum.accumulate(all_starts[::-1])[::-1], all_ends
