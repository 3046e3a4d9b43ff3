"""SimpleCTKD against a case worked by hand and a slow reference."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch

from sra.baselines.baseline import Pair, Side
from sra.baselines.simple_ctkd import SimpleCTKD
from sra.model import Head

# Student entries 0, 1, 3 are the teacher's 2, 0, 1; each side has others besides.
SHARED = SimpleNamespace(student_ids=torch.tensor([0, 1, 3]), teacher_ids=torch.tensor([2, 0, 1]))
PARTNER = {0: 2, 1: 0, 3: 1}


def side(logits, ids, spans, first=(0,), **head):
    """A side whose states are its logits."""
    logits = torch.as_tensor(logits, dtype=torch.float64)
    begins = torch.isin(torch.arange(len(logits)), torch.tensor(first))
    weight = torch.eye(logits.shape[1], dtype=torch.float64)
    return Side(
        logits, torch.tensor(ids), begins, torch.tensor(spans), Head(weight, **head), None
    )  # fmt: skip


def loss(student, teacher, vocabulary=SHARED, **options):
    offsets = torch.tensor([0, len(student.spans)])
    return SimpleCTKD(**options).loss(Pair(student, teacher, offsets, vocabulary), [])


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_one_position_by_hand():
    """Span 1 is the student's entry 1, the teacher's 0; span 2 is two tokens of the student."""
    student = side([[0, math.log(2), 7, 0], [9] * 4, [9] * 4, [9] * 4], [2, 1, 1, 0],
                   [[1, 2], [2, 4]])  # fmt: skip
    teacher = side([[math.log(6), 0, 0, 5], [8] * 4, [8] * 4], [3, 0, 0], [[1, 2], [2, 3]])
    # In the student's order; what is outside (logits 7 and 5) does not count.
    want = kl((1 / 8, 6 / 8, 1 / 8), (1 / 4, 2 / 4, 1 / 4))
    torch.testing.assert_close(loss(student, teacher).item(), want)
    # At temperature 2: exp(log(6) / 2) and exp(log(2) / 2) against 1.
    six, two = math.sqrt(6), math.sqrt(2)
    want = kl((1 / (2 + six), six / (2 + six), 1 / (2 + six)),
              (1 / (2 + two), two / (2 + two), 1 / (2 + two)))  # fmt: skip
    torch.testing.assert_close(loss(student, teacher, temperature=2.0).item(), want)


def test_the_states_are_those_that_predict():
    student = side([[0.0] * 4] * 3, [2, 1, 3], [[1, 2], [2, 3]])
    for row, moved in ((0, True), (1, True), (2, False)):
        logits = [[0.0] * 4] * 3
        logits[row] = [3.0, 0.0, 0.0, 0.0]
        teacher = side(logits, [3, 0, 1], [[1, 2], [2, 3]])
        assert (loss(student, teacher).item() > 0.1) == moved


def test_tokens_of_one_text_that_the_vocabulary_does_not_pair():
    """`the` and `▁the`, say: with their marks stripped, as public code does it, they are equal."""
    student = side([[0.0] * 4] * 2, [2, 2], [[1, 2]])
    assert loss(student, side([[9.0, 0, 0, 0]] * 2, [3, 0], [[1, 2]])).item() == 0
    # Equal ids mean nothing where there are two vocabularies, and all where there is one.
    same = side([[9.0, 0, 0, 0]] * 2, [2, 2], [[1, 2]])
    assert loss(student, same).item() == 0
    assert loss(student, same, vocabulary=None).item() > 1


def test_a_token_that_nothing_predicts():
    """It begins one side's sequence: the row before it is another's, or none."""
    student = side([[0.0] * 4] * 3, [1, 1, 1], [[0, 1], [2, 3]], first=(0,))
    teacher = side([[9.0, 0, 0, 0]] * 3, [0, 0, 0], [[1, 2], [2, 3]], first=(0, 2))
    assert loss(student, teacher).item() == 0


def test_no_position_at_all_has_a_gradient():
    student = side([[0.0] * 4] * 3, [1, 1, 1], [[1, 3]])
    student.hidden.requires_grad_()
    got = loss(student, side([[9.0, 0, 0, 0]] * 3, [0, 0, 0], [[1, 3]]))
    assert got.item() == 0
    got.backward()
    assert not student.hidden.grad.any()


@pytest.mark.parametrize("one_vocabulary", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_slow_reference(seed, one_vocabulary):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    student, teacher = (ragged(draw, entries, width) for entries, width in ((5, 4), (5, 6)))
    vocabulary = None if one_vocabulary else SHARED
    partner = {i: i for i in range(5)} if one_vocabulary else PARTNER
    want, count = 0.0, 0
    pairs = zip(student.spans.tolist(), teacher.spans.tolist(), strict=True)
    for (start, end), (begin, stop) in pairs:
        if end - start != 1 or stop - begin != 1:
            continue
        if student.first[start] or teacher.first[begin]:
            continue
        if partner.get(int(student.ids[start])) != int(teacher.ids[begin]):
            continue
        z = [logit(student, start - 1, i) / 1.5 for i in partner]
        y = [logit(teacher, begin - 1, i) / 1.5 for i in partner.values()]
        p, q = ([math.exp(x) / sum(map(math.exp, all_)) for x in all_] for all_ in (y, z))
        want, count = want + kl(p, q), count + 1
    assert count >= 3
    got = loss(student, teacher, vocabulary, temperature=1.5)
    torch.testing.assert_close(got.item(), want)


def ragged(draw, entries, width):
    """Three sequences of 20 spans of one or two tokens; bias, scale and cap in the head."""
    spans, first, rows = [], [], 0
    for _ in range(3):
        first.append(rows)
        rows += draw.choice([0, 2])
        for _ in range(20):
            length = draw.choice([1, 1, 1, 2])
            spans.append([rows, rows + length])
            rows += length
    states = torch.randn(rows, width, dtype=torch.float64)
    made = side(states, [draw.choice([0, 1, 2]) for _ in range(rows)], spans, first)
    weight = torch.randn(entries, width, dtype=torch.float64)
    bias = torch.randn(entries, dtype=torch.float64)
    return made._replace(head=Head(weight, bias, scale=0.8, softcap=3.0))


def logit(side, row, entry):
    head = side.head
    raw = sum(a * b for a, b in zip(side.hidden[row].tolist(), head.weight[entry].tolist(),
                                    strict=True))  # fmt: skip
    return 3.0 * math.tanh(0.8 * (raw + head.bias[entry].item()) / 3.0)
