"""Shared vocabularies of real tokenizer pairs."""

from __future__ import annotations

import functools

import pytest
import torch
from real_tokenizers import load
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sra.token_bytes import ByteTokenizer
from sra.vocabulary import SharedVocabulary


@functools.cache
def byte_tokenizer(name: str) -> ByteTokenizer:
    return ByteTokenizer(load(name))


def strings(name: str, ids: torch.Tensor) -> list[str]:
    return [load(name).id_to_token(i) for i in ids.tolist()]


@pytest.mark.models
@pytest.mark.parametrize(
    ("student", "teacher", "raw", "normalised"),
    [
        ("gpt2", "mistral-v1", 8_020, 21_240),
        ("gpt2", "qwen", 42_257, 42_257),
        ("mistral-v1", "qwen", 10_566, 29_235),
        ("mistral-v1", "mistral-v3", 32_000, 32_000),
        ("gpt2", "bert", 4_319, 18_158),
    ],
)
def test_counts(student: str, teacher: str, raw: int, normalised: int) -> None:
    pair = byte_tokenizer(student), byte_tokenizer(teacher)
    assert len(SharedVocabulary(*pair, match="raw")) == raw
    assert len(SharedVocabulary(*pair, match="normalised")) == normalised


@pytest.mark.models
def test_raw_is_equality_of_strings() -> None:
    shared = SharedVocabulary(load("gpt2"), load("mistral-v1"), match="raw")
    assert strings("gpt2", shared.student_ids) == strings("mistral-v1", shared.teacher_ids)
    assert len(shared) == len(load("gpt2").get_vocab().keys() & load("mistral-v1").get_vocab())


@pytest.mark.models
@pytest.mark.parametrize("match", ["raw", "normalised"])
def test_sorted_and_one_to_one(match) -> None:
    shared = SharedVocabulary(byte_tokenizer("mistral-v1"), byte_tokenizer("gpt2"), match=match)
    assert shared.student_ids.dtype == shared.teacher_ids.dtype == torch.int64
    assert (shared.student_ids.diff() > 0).all()
    assert len(shared.teacher_ids.unique()) == len(shared) == len(shared.student_ids)


@pytest.mark.models
def test_normalised_unifies_word_starts_and_bytes() -> None:
    gpt2, mistral = load("gpt2"), load("mistral-v1")
    shared = SharedVocabulary(
        byte_tokenizer("gpt2"), byte_tokenizer("mistral-v1"), match="normalised"
    )
    pairs = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    for left, right in [
        ("Ġthe", "▁the"),
        ("the", "the"),
        ("Ã©", "é"),
        ("Ċ", "<0x0A>"),
        ("a", "a"),
        ("Ġ", "▁"),
        ("Ã", "<0xC3>"),
    ]:
        assert pairs[gpt2.token_to_id(left)] == mistral.token_to_id(right), (left, right)
    every_word = set(gpt2.get_vocab()) & {piece.replace("▁", "Ġ") for piece in mistral.get_vocab()}
    assert {"Ġhouse", "house"} <= every_word
    assert len(shared) > 20_854  # what a mere Ġ -> ▁ gives


@pytest.mark.models
def test_word_starts_of_wordpiece() -> None:
    shared = SharedVocabulary(byte_tokenizer("bert"), byte_tokenizer("gpt2"), match="normalised")
    pairs = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    bert, gpt2 = load("bert"), load("gpt2")
    assert pairs[bert.token_to_id("house")] == gpt2.token_to_id("Ġhouse")
    assert pairs[bert.token_to_id("##ing")] == gpt2.token_to_id("ing")


@pytest.mark.models
def test_end_of_sequence_tokens_pair() -> None:
    student = PreTrainedTokenizerFast(tokenizer_object=load("gpt2"), eos_token="<|endoftext|>")
    teacher = PreTrainedTokenizerFast(tokenizer_object=load("mistral-v1"), eos_token="</s>")
    shared = SharedVocabulary(student, teacher, match="normalised")
    pairs = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    assert pairs[student.eos_token_id] == teacher.eos_token_id == 2
    assert len(set(pairs.values())) == len(pairs)
    raw = SharedVocabulary(student, teacher, match="raw")
    assert student.eos_token_id not in raw.student_ids.tolist()


def chat(end: str, eos: str) -> PreTrainedTokenizerFast:
    """A base model's tokenizer has another end of sequence than its template has of turns."""
    names = ["a", "b", "<|endoftext|>", "<|im_end|>", "<end_of_turn>", "</s>"]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    inner.add_special_tokens(names[2:])
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + '" + end + "' }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, chat_template=template if end else None
    )


@pytest.mark.parametrize(
    ("student", "teacher", "want"),
    [
        # Of one family, base and instructed: each token has its namesake.
        (
            ("<|im_end|>", "<|endoftext|>"), ("<|im_end|>", "<|im_end|>"),
            {"<|im_end|>": "<|im_end|>", "<|endoftext|>": "<|endoftext|>", "</s>": "</s>"},
        ),
        # Turns that end in other tokens; the teacher's namesake is nobody's then.
        (
            ("<end_of_turn>", "</s>"), ("<|im_end|>", "<|im_end|>"),
            {"<end_of_turn>": "<|im_end|>", "</s>": "</s>", "<|im_end|>": None},
        ),
        (
            ("<end_of_turn>", "</s>"), ("<|im_end|>", "<|endoftext|>"),
            {"<end_of_turn>": "<|im_end|>", "</s>": "<|endoftext|>", "<|endoftext|>": None},
        ),
        # Without a template, rows end in the end of a sequence.
        (("", "</s>"), ("<|im_end|>", "<|endoftext|>"), {"</s>": "<|im_end|>"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("match", ["normalised", "raw"])
def test_the_ends_of_turns_pair(student, teacher, want, match) -> None:
    own, other = chat(*student), chat(*teacher)
    shared = SharedVocabulary(own, other, match=match)
    if match == "normalised":
        pairs = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    else:  # its spellings are by bytes all the same
        tree = shared.trie(torch.device("cpu"))
        pairs = {s: t for t, s in enumerate(tree.begins.tolist()) if s >= 0}
    assert len(set(pairs.values())) == len(pairs)
    ids = own.convert_tokens_to_ids
    found = {name: pairs.get(ids(name)) for name in want}
    assert found == {s: None if t is None else ids(t) for s, t in want.items()}


@pytest.mark.models
def test_rows_of_the_heads() -> None:
    pair = byte_tokenizer("gpt2"), byte_tokenizer("qwen")
    whole = SharedVocabulary(*pair, match="raw", student_rows=50304, teacher_rows=151936)
    assert whole.student_ids.max() == 50256
    cut = SharedVocabulary(*pair, match="raw", student_rows=1000, teacher_rows=500)
    assert cut.student_ids.max() < 1000
    assert cut.teacher_ids.max() < 500


def test_nothing_shared() -> None:
    left = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    right = Tokenizer(models.WordLevel({"c": 0}, unk_token="c"))
    with pytest.raises(ValueError, match=r"share no token .*try match='normalised'"):
        SharedVocabulary(left, right, match="raw")
    with pytest.raises(ValueError, match="needs no shared vocabulary"):
        SharedVocabulary(left, right, match="normalised")


def test_unknown_match() -> None:
    with pytest.raises(ValueError, match="must be 'raw' or 'normalised', got 'fuzzy'"):
        SharedVocabulary(None, None, match="fuzzy")  # type: ignore[arg-type]
