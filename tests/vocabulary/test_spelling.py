"""How one tokenizer spells another's vocabulary: real pairs, and the tree of the spellings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from real_tokenizers import load
from torch import Tensor

from sra import SharedVocabulary, SpanAligner
from sra.loading import load_tokenizer
from sra.packages import fetch_instructions
from sra.respelling import in_order, in_spans, targets
from sra.spelling import DEPTH, spellings, trie
from sra.token_bytes import ByteTokenizer
from tests import tiny

PAIRS = [("gpt2", "qwen"), ("mistral-v1", "qwen"), ("gpt2", "mistral-v1"), ("qwen", "gpt2")]


@pytest.mark.models
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_text_is_spelt_byte_by_byte(student: str, teacher: str) -> None:
    """Parts of characters too; and a piece in mid-word gets no space before it."""
    own, other = ByteTokenizer(load(student)), ByteTokenizer(load(teacher))
    texts = [t for i, t in enumerate(other.token_bytes) if t and i not in other.special_ids]
    for text, tokens in zip(texts, spellings(own, texts), strict=True):
        assert b"".join(own.token_bytes[token] for token in tokens) == text


@pytest.mark.models
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_words_are_spelt_as_in_a_text(student: str, teacher: str) -> None:
    """Not by the longest token that fits, which would cut words elsewhere: where the teacher has
    one token in a text, the student nearly always has its spelling."""
    tokenizers = load(student), load(teacher)
    aligned = SpanAligner(*tokenizers)
    shared = SharedVocabulary(*tokenizers, match="normalised")
    same = total = 0
    for row in fetch_instructions("en")[:50]:
        found = aligned(row["completion"])
        for own, other in zip(found.student, found.teacher, strict=True):
            if other[1] - other[0] == 1:
                wanted = found.student_ids[own[0] : own[1]]
                same += spelling_of(shared, int(found.teacher_ids[other[0]])) == [*wanted]
                total += 1
    assert total > 1000
    assert same / total > 0.97


@pytest.mark.models
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_teacher_that_is_sure_of_the_text_teaches_it_and_nothing_else(
    student: str, teacher: str, language: str
) -> None:
    """Where the student's tokens are the longer ones too."""
    tokenizers = load(student), load(teacher)
    aligned = SpanAligner(*tokenizers)
    tree = SharedVocabulary(*tokenizers, match="normalised").trie(torch.device("cpu"))
    size, teacher_size = tree.size, len(tree.rank)
    taught = total = 0
    for row in fetch_instructions(language)[:20]:
        found = aligned(row["completion"])
        # A token of a prompt before either.
        own, other = (torch.from_numpy(spans) + 1 for spans in (found.student, found.teacher))
        own_ids, other_ids = (
            torch.tensor([0, *ids]) for ids in (found.student_ids, found.teacher_ids)
        )
        at = in_order(in_spans(own_ids, other_ids, own, other, tree))

        def sure(rows: Tensor, ids: Tensor = other_ids) -> Tensor:
            return torch.zeros(len(rows), teacher_size).scatter(1, ids[rows + 1][:, None], 100.0)

        target, weight = targets(sure, at, tree, 1.0, size)
        assert (weight > 0.999).all()
        assert (target.argmax(1) == own_ids[at.rows + 1]).all()
        taught, total = taught + len(at.rows), total + len(own_ids) - 1
    least = {"en": 0.9, "zh": 0.2 if student == "qwen" else 0.8}[language]
    assert taught / total > least


def spelling_of(vocabulary: SharedVocabulary, teacher_id: int) -> list[int]:
    """Down the tree, as far as it leads to this one."""
    tree = vocabulary.trie(torch.device("cpu"))
    rank, node, found = tree.rank[teacher_id], 0, []
    while True:
        first = int(tree.first[node])
        low, high = tree.ranges[first : tree.first[node + 1]].unbind(1)
        through = ((low <= rank) & (rank < high)).nonzero()
        if not len(through):
            return found
        found.append(int(tree.tokens[first + through[0, 0]]))
        node = first + int(through[0, 0]) + 1


def test_shared_entries_are_their_partners_and_most_control_tokens_have_no_spelling() -> None:
    vocabulary = tiny.vocabulary()
    for own, other in zip(vocabulary.student_ids, vocabulary.teacher_ids, strict=True):
        assert spelling_of(vocabulary, int(other)) == [int(own)]
    tree = vocabulary.trie(torch.device("cpu"))
    teacher = tiny.teacher_tokenizer()
    for token in ("<|pad|>", "<|begin|>"):
        i = teacher.convert_tokens_to_ids(token)
        assert tree.rank[i] == -1
        assert i not in tree.entries
    assert spelling_of(vocabulary, teacher.eos_token_id) == [tiny.student_tokenizer().eos_token_id]


@pytest.mark.models
@pytest.mark.parametrize("match", ["raw", "normalised"])
def test_spellings_are_by_bytes_whatever_the_match(match: str) -> None:
    """As strings, Gemma's `é` is SmolLM2's byte E9, and the two ends of a text differ."""
    names = "SmolLM2-135M-Instruct", "Gemma-3-270M"
    own, other = (ByteTokenizer(load_tokenizer(name)) for name in names)
    vocabulary = SharedVocabulary(own, other, match=match)  # type: ignore[arg-type]
    spelt = vocabulary.trie(torch.device("cpu")).begins
    letter = other.backend.token_to_id("é")
    assert letter in SharedVocabulary(own, other, match="raw").teacher_ids
    assert own.token_bytes[spelt[letter]] == "é".encode()
    assert own.eos_id is not None
    assert spelt[other.eos_id] == own.eos_id


def test_ids_beyond_the_heads_are_never_named() -> None:
    tokenizers = tiny.student_tokenizer(), tiny.teacher_tokenizer()
    vocabulary = SharedVocabulary(*tokenizers, match="raw", student_rows=300, teacher_rows=380)
    tree = vocabulary.trie(torch.device("cpu"))
    assert int(tree.tokens.max()) < 300
    assert int(tree.entries.max()) < 380
    assert len(tree.entries) > 360  # spelt with what there is


def test_a_tree_by_hand() -> None:
    """Ids 0 to 5 are spelt 7, 7 3, 2, nothing, 7 3 9, 7 5."""
    table = np.full((6, 4), -1)
    for i, tokens in enumerate([[7], [7, 3], [2], [], [7, 3, 9], [7, 5]]):
        table[i, : len(tokens)] = tokens
    tree = trie(table)
    assert tree.entries.tolist() == [2, 0, 1, 4, 5]
    assert tree.rank.tolist() == [1, 2, 0, -1, 3, 4]
    assert tree.tokens.tolist() == [2, 7, 3, 5, 9]
    assert tree.used.tolist() == [2, 3, 5, 7, 9]
    assert tree.ranges.tolist() == [[0, 1], [1, 5], [2, 4], [4, 5], [3, 4]]
    assert tree.first.tolist() == [0, 2, 2, 4, 5, 5, 5]
    child, there = tree.child(torch.tensor([0, 2, 3, 0, 2]), torch.tensor([7, 3, 9, 3, 700]))
    assert there.tolist() == [True, True, True, False, False]
    assert child[:3].tolist() == [1, 2, 4]


def test_a_long_spelling_is_cut() -> None:
    table = np.full((2, DEPTH), -1)
    table[0] = 1
    tree = trie(table)
    assert len(tree.tokens) == DEPTH
    assert tree.first[-1] == tree.first[-2] == DEPTH
