"""Spans of real tokenizers on hostile texts against alignment by definition."""

from __future__ import annotations

import functools
import io
import pickle
import re
import time

import brute_force
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_tokenizers import BUILDERS, load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sra.alignment import SpanAligner, SpanTable, shared_spans
from sra.token_bytes import ByteTokenizer, byte_offsets, clean_text

pytestmark = pytest.mark.models

HOSTILE = {
    "empty": "",
    "one byte": "a",
    "one space": " ",
    "one character of four bytes": "𝄞",
    "plain": "The quick brown fox doesn't jump over 13 lazy dogs.",
    "composed": "Tiếng Việt naïve café Ångström",
    "decomposed": "Tie\u0302\u0301ng Vie\u0323\u0302t nai\u0308ve cafe\u0301 A\u030angstro\u0308m",
    "marks in the wrong order": "Vie\u0302\u0323t s\u0307\u0323",
    "lone marks": "\u0301\u0301 \u0323x\u0300",
    "zalgo": "Z\u0351\u036b\u0343\u036aa\u0336\u0321lgo",
    "joined emoji": "👨‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ❤️‍🔥 1️⃣",
    "right to left": "مرحبا بالعالم שלום עולם\u200f!",
    "scripts": "日本語のテキスト。漢字かな 한국어 नमस्ते ภาษาไทย Ελληνικά",
    "compatibility": "ﬁ ﬀ ㎏ ½ ① Ⅷ ﷺ ｆｕｌｌ　width",
    "line ends": "a\r\nb\r\n\r\nc\rd\n\n\ne\u2028f\x85g",
    "tabs": "\tif x:\n\t\treturn\t\t1\n",
    "spaces around": "  two before, three after   ",
    "spaces of all kinds": "a\u00a0b\u3000c\u2009d\u200be\ufefff",
    "digits": "1234567890 3.14159 1,000,000 0x1F 2⁶⁴",
    "underscores": "_x x_ __init__ ▁x Ġx",
    "capitals": "ǅ İstanbul STRASSE straße ẞ",
    "control characters": "\x00a\x01\x1b[0mb\x7f",
    "special tokens": "<|im_end|><|endoftext|> hi</s>Hello<s>你 [CLS][SEP] <unk><0x41>",
    "surrogates": "a\ud800b \udfff\ud83d\ude00",
    "private and unassigned": "\ue000 \U000e0041 \U0010ffff \u0378",
    "ten thousand spaces": "x" + " " * 10_000 + "y",
}
NAMES = sorted({*BUILDERS} - {"gemma3"})  # which not every machine has
RING = list(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True))
# Kinds that differ most: byte-level, NFC, NFKC, lower-cased, SentencePiece, WordPiece, Unigram.
CROSS = [
    ("gpt2", "mistral-v1"),
    ("gpt2", "qwen"),
    ("claude", "qwen"),
    ("bert", "llama3"),
    ("clip", "bert"),
    ("unigram-ja", "tekken"),
    ("mistral-v3", "unigram-en"),
    ("smollm2", "gemma3"),
]


@functools.cache
def byte_tokenizer(name: str) -> ByteTokenizer:
    return ByteTokenizer(load(name))


def aligner(student: str, teacher: str, granularity: str = "token") -> SpanAligner:
    return SpanAligner(byte_tokenizer(student), byte_tokenizer(teacher), granularity=granularity)


def spans(table: SpanTable) -> list[brute_force.Span]:
    columns = (table.student.tolist(), table.teacher.tolist(), table.bytes.tolist())
    return [(tuple(s), tuple(t), tuple(b)) for s, t, b in zip(*columns, strict=True)]


def check(student: str, teacher: str, text: str) -> None:
    """The table equals alignment by definition."""
    table = aligner(student, teacher)(text)
    clean = clean_text(text)
    left = brute_force.token_ranges(student, load(student), clean)
    right = brute_force.token_ranges(teacher, load(teacher), clean)
    expected = brute_force.shared_spans(left, right, len(clean.encode()))
    assert spans(table) == expected
    covered = sum(high - low for _, _, (low, high) in expected)
    assert table.coverage == (covered / len(clean.encode()) if clean else 1.0)


@pytest.mark.parametrize(("student", "teacher"), RING + CROSS, ids="-".join)
def test_hostile_texts(student: str, teacher: str) -> None:
    for name, text in HOSTILE.items():
        if name == "ten thousand spaces":
            table = aligner(student, teacher)(text)
            raw = text.encode()
            assert (np.diff(table.bytes, axis=1) > 0).all()
            assert (table.bytes[1:, 0] == table.bytes[:-1, 1]).all()
            assert table.bytes[-1, 1] == len(raw)
            continue
        check(student, teacher, text)


fragments = st.one_of(
    st.sampled_from([text for name, text in HOSTILE.items() if len(text) < 100]),
    st.text(max_size=12),
    st.text(st.characters(categories=["Mn", "Lo", "Zs", "Cf", "So", "Cs"]), max_size=8),
    st.text("e\u0301\u0323 \n\tﬁ👍🏽\u200d_x1", max_size=12),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pair=st.sampled_from(RING + CROSS), parts=st.lists(fragments, max_size=4))
def test_random_texts(pair: tuple[str, str], parts: list[str]) -> None:
    check(*pair, "".join(parts))


@settings(max_examples=100, deadline=None)
@given(
    pair=st.sampled_from(RING + CROSS),
    prefixes=st.tuples(fragments, fragments),
    text=fragments,
    suffixes=st.tuples(fragments, fragments),
    limits=st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)),
)
def test_encode_pair(pair, prefixes, text, suffixes, limits) -> None:
    """In context, with prefixes and truncation: the spans of the full texts, less those cut off."""
    table = aligner(*pair).encode_pair(
        *prefixes,
        text,
        student_suffix=suffixes[0],
        teacher_suffix=suffixes[1],
        student_max_length=limits[0],
        teacher_max_length=limits[1],
    )
    ranges, starts, ids = [], [], []
    for name, prefix, suffix in zip(pair, prefixes, suffixes, strict=True):
        full = clean_text(prefix + text + suffix)
        ranges.append(brute_force.token_ranges(name, load(name), full))
        starts.append(len(clean_text(prefix).encode()))
        ids.append(load(name).encode(full, add_special_tokens=False).ids)
    length = len(clean_text(text).encode())
    whole = brute_force.shared_spans(*ranges, length, *starts)
    cut = [len(i) if limit is None else limit for i, limit in zip(ids, limits, strict=True)]

    def survives(side: int, end: int, low: int) -> bool:
        # A run of tokens that share one range must be kept whole, or its end is not known.
        dropped = ranges[side][cut[side] :]
        return end <= cut[side] and not any(
            first - starts[side] < low and last > first for first, last in dropped
        )

    expected = [
        span
        for span in whole
        if survives(0, span[0][1], span[2][1]) and survives(1, span[1][1], span[2][1])
    ]
    assert spans(table) == expected
    assert table.student_ids.tolist() == ids[0][: cut[0]]
    assert table.teacher_ids.tolist() == ids[1][: cut[1]]
    for side, start in enumerate((table.student_start, table.teacher_start)):
        inside = [i for i, (low, _) in enumerate(ranges[side]) if low >= starts[side]]
        assert start == min([*inside, len(ids[side]), cut[side]])
    covered = sum(high - low for _, _, (low, high) in whole)
    assert table.coverage == (covered / length if length else 1.0)


def test_truncation_does_not_count_against_coverage() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    table = aligner("gpt2", "mistral-v1").encode_pair("Q:", "Say:", text, teacher_max_length=50)
    whole = aligner("gpt2", "mistral-v1").encode_pair("Q:", "Say:", text)
    assert table.coverage == whole.coverage == 1.0
    assert spans(table) == spans(whole)[: len(table)]
    assert 30 < len(table) < 50


def test_a_token_across_the_start_is_in_no_span() -> None:
    """The student's prefix and text merge into "Hello"; both sides agree from its end on."""
    table = aligner("gpt2", "gpt2").encode_pair("Hel", "x:", "lo day")
    assert load("gpt2").encode("Hello day").tokens == ["Hello", "Ġday"]
    assert table.student_start == 1
    assert table.student.tolist() == [[1, 2]]
    assert table.bytes.tolist() == [[2, 6]]
    assert table.coverage == 4 / 6


def test_a_prefix_that_fills_the_window_leaves_nothing() -> None:
    table = aligner("gpt2", "qwen").encode_pair("a b c d", "a:", " text", student_max_length=3)
    assert len(table) == 0
    assert table.student_start == len(table.student_ids) == 3
    assert table.student.shape == table.teacher.shape == table.bytes.shape == (0, 2)


def test_added_special_tokens_are_in_no_span() -> None:
    table = aligner("bert", "llama3").encode_pair("", "", "Hello world", add_special_tokens=True)
    assert table.student_start == table.teacher_start == 1
    assert table.student.tolist() == [[1, 2], [2, 3]]
    assert table.teacher.tolist() == [[1, 2], [2, 3]]
    assert table.student_tokens.special.tolist() == [True, False, False, True]
    assert table.coverage == 1.0


def test_special_tokens_spelt_in_the_text() -> None:
    tokens = byte_tokenizer("qwen")("<|im_start|>user\nhi<|im_end|>")
    assert tokens.special.tolist() == [True, False, False, False, True]
    assert tokens.starts.tolist() == [0, 12, 16, 17, 19]
    assert tokens.ends.tolist() == [12, 16, 17, 19, 29]


def test_dummy_prefix_has_no_bytes() -> None:
    tokens = byte_tokenizer("mistral-v1")("你好")
    assert tokens.starts.tolist() == [0, 0, 3]
    assert tokens.ends.tolist() == [0, 3, 6]
    after_special = byte_tokenizer("mistral-v1")("</s>你")
    assert after_special.ends.tolist() == [4, 4, 7]


def test_pieces_inside_a_character_are_exact() -> None:
    tokens = byte_tokenizer("gpt2")("e\u0301👍🏽")
    assert b"".join(byte_tokenizer("gpt2").token_bytes[i] for i in tokens.ids) == (
        "e\u0301👍🏽".encode()
    )
    assert len(set(tokens.ends.tolist())) == len(tokens)


def test_composed_characters_keep_their_marks() -> None:
    """Qwen composes e + circumflex + dot below into one character, which ends after both."""
    tokens = byte_tokenizer("qwen")("e\u0302\u0323 x")
    assert tokens.ends.tolist() == [5] * (len(tokens) - 1) + [7]


@pytest.mark.parametrize("name", sorted({*NAMES} - {"bert", "clip", "unigram-en", "unigram-ja"}))
def test_lossless_texts_spell_themselves(name: str) -> None:
    """The bytes of each token are the bytes of the text in its range."""
    tokenizer = byte_tokenizer(name)
    for text in ("Hello world, 123!\n\tdef f(x): return x_1", "naïve 日本 👍🏽 e\u0301"):
        raw = text.encode()
        tokens = tokenizer(text)
        if name in ("qwen", "claude") and "\u0301" in text:
            assert (np.diff(tokens.ends) >= 0).all()  # composed: the mark has no token
            continue
        ranges = zip(tokens.ids, tokens.starts, tokens.ends, strict=True)
        for place, (i, start, end) in enumerate(ranges):
            dummy = b" " if place == 0 and name.startswith("mistral") else b""
            assert dummy + raw[start:end] == tokenizer.token_bytes[i]
        assert tokens.ends[-1] == len(raw)


@given(st.text(st.characters(exclude_categories=[]), max_size=30))
def test_byte_offsets(text: str) -> None:
    text = clean_text(text)
    assert byte_offsets(text).tolist() == [len(text[:i].encode()) for i in range(len(text) + 1)]


def test_words_and_sentences() -> None:
    text = "Dr. Who, isn't 3 x_y!  Yes?\nNo… “Really.” 好。是的！ok"
    raw = text.encode()

    def cut(teacher: str, granularity: str) -> str:
        table = aligner("gpt2", teacher, granularity)(text)
        return "|".join(raw[low:high].decode() for low, high in table.bytes)

    words = "Dr|.| Who|,| isn't| 3| x_y|!|  Yes|?|\nNo|…| “|Really|.”| 好|。|是的|！|ok"
    assert cut("gpt2", "word") == words
    assert cut("qwen", "word") == words.replace("?|\n", "?\n")  # Qwen has a token "?\n"
    sentences = "Dr.| Who, isn't 3 x_y!|  Yes?\n|No…| “Really.”| 好。|是的！|ok"
    assert cut("gpt2", "sentence") == cut("qwen", "sentence") == sentences


@pytest.mark.parametrize("granularity", ["word", "sentence"])
@pytest.mark.parametrize("pair", CROSS, ids="-".join)
def test_coarse_spans_are_unions_of_fine_ones(pair: tuple[str, str], granularity: str) -> None:
    for text in HOSTILE.values():
        fine, coarse = aligner(*pair)(text), aligner(*pair, granularity)(text)
        assert len(coarse) <= len(fine)
        assert coarse.coverage == fine.coverage
        for column in ("student", "teacher", "bytes"):
            assert set(getattr(coarse, column)[:, 0]) <= set(getattr(fine, column)[:, 0])
            assert set(getattr(coarse, column)[:, 1]) <= set(getattr(fine, column)[:, 1])
        assert not len(fine) or (coarse.bytes[[0, -1]] == fine.bytes[[0, -1]])[[0, 1], [0, 1]].all()


def test_unknown_granularity() -> None:
    with pytest.raises(ValueError, match="'token', 'word' or 'sentence', got 'phrase'"):
        aligner("gpt2", "gpt2", "phrase")


def test_slow_tokenizer() -> None:
    with pytest.raises(TypeError, match="needs a fast tokenizer"):
        SpanAligner(object(), load("gpt2"))


def test_takes_transformers_tokenizers_and_leaves_them_alone() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load("gpt2"), eos_token="<|endoftext|>")
    tokenizer("warm up", truncation=True, max_length=3)
    before = tokenizer.backend_tokenizer.truncation
    assert before is not None
    assert len(SpanAligner(tokenizer, load("qwen"))("one two three four five six").student_ids) == 6
    assert tokenizer.backend_tokenizer.truncation == before


def test_vocabulary_with_holes_and_without_bytes() -> None:
    """Ids without a token, a decoder that names nothing: offsets serve alone."""
    tokenizer = Tokenizer(models.WordLevel({"a": 3, "[UNK]": 9}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    table = SpanAligner(tokenizer, load("gpt2"))("a bcd a")
    assert table.student_ids.tolist() == [3, 9, 3]
    assert table.bytes.tolist() == [[0, 1], [1, 5], [5, 7]]


def test_pickles() -> None:
    """As data workers need it."""
    original = aligner("gpt2", "mistral-v1")
    copied = pickle.loads(pickle.dumps(original))
    assert spans(copied("naïve 日本")) == spans(original("naïve 日本"))


def test_show() -> None:
    out = io.StringIO()
    aligner("gpt2", "mistral-v1")("你 naïve\n").show(width=60, color=False, file=out)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("3 spans over 11 bytes, coverage 100.0%; ")
    assert all(len(line) <= 60 for line in lines[1:])
    assert any("·na╎ï╎ve" in line for line in lines)
    assert any(re.search(r"⟨28705⟩", line) for line in lines)
    coloured = io.StringIO()
    aligner("gpt2", "mistral-v1")("你 naïve\n").show(width=60, color=True, file=coloured)
    assert re.sub(r"\033\[\d+m", "", coloured.getvalue()) == out.getvalue()
    assert "\033[33m" in coloured.getvalue()


def test_show_never_raises() -> None:
    for pair in CROSS:
        for text in HOSTILE.values():
            table = aligner(*pair).encode_pair("p ", "", text[:200], student_suffix="</s>")
            table.show(width=30, color=True, file=io.StringIO())


def test_cost_is_linear_and_small() -> None:
    """The merge of 2,048 teacher tokens takes about 0.2 ms; the rest is room for load."""
    text = "def forward(self, hidden: Tensor) -> Tensor:\n    return self.norm(hidden) * 2\n" * 200
    student, teacher = byte_tokenizer("gpt2")(text), byte_tokenizer("qwen")(text)
    assert len(teacher) > 2048
    took = []
    for _ in range(20):
        start = time.perf_counter()
        shared_spans(student, teacher)
        took.append(time.perf_counter() - start)
    assert min(took) / len(teacher) * 2048 < 5e-3
