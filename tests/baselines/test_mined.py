"""MinED against a case worked by hand and a slow reference."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from sra.baselines.baseline import Pair, Side, side_of
from sra.baselines.mined import EditVocabulary, MinED, edit_distances, partnered, warped
from sra.model import Head
from sra.token_bytes import byte_tokenizer
from tests import tiny


def letters(pieces, merges=(), specials=()):
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def side(logits, ids, spans):
    """A side of one sequence whose states are its logits."""
    logits = torch.tensor(logits, dtype=torch.float64)
    head = Head(torch.eye(logits.shape[1], dtype=torch.float64))
    first = torch.arange(len(logits)) == 0
    return Side(logits, torch.tensor(ids), first, torch.tensor(spans), head, None)


# --- by hand ---

STUDENT = letters(["a", "b", "c", "ab"], [("a", "b")])
TEACHER = letters(["c", "b", "a", "bc"], [("b", "c")])
OFFSETS = torch.tensor([0, 2])


def abca(teacher_logits):
    """The answer "abca" behind a first token: ab|c|a and a|bc|a, in spans abc and a."""
    student = side([[0.0] * 4] * 4, [0, 3, 2, 0], [[1, 3], [3, 4]])
    teacher = side(teacher_logits, [0, 2, 3, 2], [[1, 3], [3, 4]])
    return Pair(student, teacher, OFFSETS, EditVocabulary(STUDENT, TEACHER, match="raw"))


@pytest.mark.parametrize("top_k", [1, 3, 4, 10])
def test_the_loss_by_hand(top_k):
    """The cheapest path is ab-a (1), c-bc (1), a-a (0). Teacher's a is not ab, and its bc becomes
    b, not c: so both first tokens have their own negative log-likelihood, log 4. The last one has
    the teacher's distribution, of which bc counts for b."""
    teacher = np.log([[1, 1, 1, 1], [1, 1, 1, 1], [4, 1, 2, 8], [1, 1, 1, 1]]).tolist()
    q = {
        1: [1],  # bc
        3: [8 / 14, 4 / 14, 2 / 14],  # b, c, a
    }.get(top_k, [(8 + 1) / 15, 4 / 15, 2 / 15])
    want = 2 * math.log(4) + sum(x * math.log(x / (1 / 4)) for x in q)
    got = MinED(top_k=top_k).loss(abca(teacher), [])
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_the_vocabulary_by_hand():
    vocabulary = EditVocabulary(STUDENT, TEACHER, match="raw")
    # Both b and c are one byte away from bc: the lower id.
    assert vocabulary.nearest(torch.tensor([[3, 0], [1, 2]])).tolist() == [[1, 2], [1, 0]]


# --- against loops ---


@functools.cache
def levenshtein(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        levenshtein(a[1:], b) + 1,
        levenshtein(a, b[1:]) + 1,
        levenshtein(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edit_distances():
    rng = np.random.default_rng(0)
    for size, other in [(1, 1), (4, 7), (6, 3), (5, 5), (0, 3)]:
        ours = rng.integers(0, 3, (5, size), dtype=np.uint8)
        theirs = rng.integers(0, 3, (8, other), dtype=np.uint8)
        want = [[levenshtein(bytes(a), bytes(b)) for b in theirs] for a in ours]
        assert edit_distances(ours, theirs).tolist() == want


def path_of(cost):
    """Forwards, by the textbook."""
    n, m = len(cost), len(cost[0])
    total = {(-1, -1): 0}
    for i in range(n):
        for j in range(m):
            before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
            total[i, j] = cost[i][j] + min(total.get(x, math.inf) for x in before)
    path = [(n - 1, m - 1)]
    while path[-1] != (0, 0):
        i, j = path[-1]
        before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        path.append(min(before, key=lambda x: total.get(x, math.inf)))
    return path


def test_warped():
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (1, 6), (7, 1), (5, 8), (9, 4), (12, 12)]:
        cost = rng.integers(0, 4, shape, dtype=np.int16)
        assert list(map(tuple, warped(cost).tolist())) == path_of(cost.tolist())


def reference(pair, student_tokenizer, teacher_tokenizer, temperature, top_k):
    spelt = [byte_tokenizer(t).token_bytes for t in (student_tokenizer, teacher_tokenizer)]
    special = [byte_tokenizer(t).special_ids for t in (student_tokenizer, teacher_tokenizer)]
    shared = dict(zip(*(x.tolist() for x in pair.vocabulary[::-1]), strict=True))

    def nearest(entry):
        if entry in shared:
            return shared[entry]
        if entry >= len(spelt[1]) or entry in special[1]:
            return None
        piece = spelt[1][entry]
        return min(
            (levenshtein(piece, x), abs(len(x) - len(piece)), len(x), i)
            for i, x in enumerate(spelt[0])
            if i not in special[0]
        )[3]

    total = 0.0
    for low, high in zip(pair.offsets[:-1], pair.offsets[1:], strict=True):
        rows = [
            [
                row
                for start, end in one.spans[low:high].tolist()
                for row in range(start, end)
                if not one.first[row]
            ]
            for one in pair[:2]
        ]
        pieces = [
            [table[one.ids[row]] for row in own]
            for table, one, own in zip(spelt, pair[:2], rows, strict=True)
        ]
        path = path_of([[levenshtein(a, b) for b in pieces[1]] for a in pieces[0]])
        for i, row in enumerate(rows[0]):
            token = pair.student.ids[row].item()
            q = {token: 1.0}
            partners = [y for x, y in path if x == i]
            if len(partners) == 1 and sum(y == partners[0] for _, y in path) == 1:
                other = rows[1][partners[0]]
                if nearest(pair.teacher.ids[other].item()) == token:
                    states = pair.teacher.hidden[other - 1]
                    logits = (pair.teacher.head.weight @ states / temperature).tolist()
                    top = sorted(range(len(logits)), key=lambda x: -logits[x])[:top_k]
                    moved = [(nearest(x), math.exp(logits[x])) for x in top]
                    mass = sum(p for x, p in moved if x is not None)
                    q = {}
                    for x, p in moved:
                        if x is not None:
                            q[x] = q.get(x, 0) + p / mass
            own = (pair.student.head.weight @ pair.student.hidden[row - 1] / temperature).tolist()
            norm = math.log(sum(map(math.exp, own)))
            total += sum(p * (math.log(p) - own[x] + norm) for x, p in q.items())
    return total


@pytest.mark.parametrize("padding", ["right", "left"])
def test_against_loops(padding):
    torch.manual_seed(0)
    tokenizers = tiny.student_tokenizer(), tiny.teacher_tokenizer()
    make = tiny.collator()
    make.padding = padding
    batch = make(tiny.ROWS[:5])
    (given,) = batch["teachers"]
    sides = []
    for x, spans, entries in (
        (batch, "student_spans", tiny.STUDENT_ROWS),
        (given, "teacher_spans", tiny.TEACHER_ROWS),
    ):
        states = torch.randn(x["input_ids"].numel(), 24, dtype=torch.float64)
        head = Head(torch.randn(entries, 24, dtype=torch.float64))
        sides.append(side_of(None, states, head, x, given[spans]))
    vocabulary = EditVocabulary(*tokenizers, match="raw")
    pair = Pair(*sides, given["span_offsets"], vocabulary)
    _, partners = partnered(pair)
    assert 0 < (partners >= 0).sum() < len(partners)
    got = MinED(temperature=2.0, top_k=7).loss(pair, [])
    ids = vocabulary.student_ids, vocabulary.teacher_ids
    want = reference(pair._replace(vocabulary=ids), *tokenizers, temperature=2.0, top_k=7)
    assert got.item() == pytest.approx(want, rel=1e-10)


# --- what public code gets wrong ---


def test_markers_of_words_do_not_matter():
    """Of any tokenizer: Ġ, ▁ and a WordPiece entry without ## are spaces, stand-ins are bytes."""
    student = letters(["a", "Ġthe", "the", "Ã©"])
    piece = Tokenizer(models.BPE({"a": 0, "▁them": 1, "▁the": 2, "é": 3}, []))
    piece.normalizer = normalizers.Replace(" ", "▁")
    word = Tokenizer(models.WordPiece({"a": 0, "them": 1, "##the": 2, "##é": 3}, unk_token="a"))
    for teacher, want in ((piece, [1, 1, 3]), (word, [1, 2, 3])):
        vocabulary = EditVocabulary(student, teacher, match="raw")
        assert vocabulary.nearest(torch.arange(1, 4)).tolist() == want


def test_control_tokens_and_padding_of_the_head_become_nothing():
    student = letters(["a", "b"], specials=["<end>"])
    teacher = letters(["a", "bb"], specials=["<ends>"])
    vocabulary = EditVocabulary(student, teacher, match="raw")
    assert vocabulary.nearest(torch.tensor([0, 1, 2, 3, 9])).tolist() == [0, 1, -1, -1, -1]
    # Their share is left out, and the rest renormalised.
    logits = np.log([[1, 3, 8, 4], [1, 1, 1, 1]]).tolist()
    pair = Pair(
        side([[0.0] * 3] * 2, [0, 0], [[1, 2]]),
        side(logits, [0, 0], [[1, 2]]),
        torch.tensor([0, 1]),
        vocabulary,
    )
    want = math.log(3) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert MinED(top_k=4).loss(pair, []).item() == pytest.approx(want, rel=1e-12)
    # Where nothing else is likely, the token itself is the target.
    assert MinED(top_k=2).loss(pair, []).item() == pytest.approx(math.log(3), rel=1e-12)


def test_one_tokenizer_for_both():
    """Positions are the same, and so are entries: KL of the teacher's most likely ones."""
    torch.manual_seed(0)
    ids, spans = [0, 2, 1, 2, 2], [[1, 3], [3, 5]]
    student, teacher = (side(torch.randn(5, 4).tolist(), ids, spans) for _ in range(2))
    got = MinED(top_k=4).loss(Pair(student, teacher, torch.tensor([0, 2]), None), [])
    p, q = (x.hidden[:4].log_softmax(-1) for x in (student, teacher))
    torch.testing.assert_close(got, (q.exp() * (q - p)).sum())


def test_at_least_one_entry():
    with pytest.raises(ValueError, match="top_k = 0"):
        MinED(top_k=0)
