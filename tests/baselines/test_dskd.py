"""DSKD against cases worked by hand and a token-by-token reference."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sra.baselines.baseline import Pair, Side
from sra.baselines.dskd import DSKD
from sra.model import Head
from tests import tiny


class Embeds(nn.Module):
    """As much of a model as the method reads."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, weight):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(weight)

    def get_input_embeddings(self):
        return self.table


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def one_token(hidden, head, embedding, label):
    """Row 0 predicts the answer's one token."""
    hidden = torch.stack([tensor(hidden), tensor([math.nan] * 2)])
    begins, spans = torch.tensor([True, False]), torch.tensor([[1, 2]])
    return Side(
        hidden, torch.tensor([0, label]), begins, spans, Head(tensor(head)),
        Embeds(tensor(embedding)),
    )  # fmt: skip


@pytest.mark.parametrize("label", [0, 1])
def test_one_token_by_hand(label):
    """One token on each side: every attention weight is 1, whatever the query map."""
    third = math.log(3) / 3
    student = one_token([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0]] * 2, label)
    # Both (3, 1) and the token's embedding (0, 2) deviate by 1 from their mean: they stay.
    teacher = one_token([3.0, 1.0], [[third, 0.0], [0.0, 0.0]], [[5.0, 7.0], [0.0, 2.0]], 1)
    maps = [torch.randn(4, 4).double(), tensor([[third, 0], [0, 0]]), torch.randn(2, 2).double()]
    # u = P (3 + 0, 1 + 2) = (log 3, 0), so (3/4, 1/4); the student's own is (1/2, 1/2).
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    ce = math.log(4 / 3) if label == 0 else math.log(4)
    student_space = ce + (divergence if label == 0 else 0.0)
    # The teacher's is (3/4, 1/4) too, and the student's state, 0, stays 0 under any map.
    got = DSKD(temperature=1.0).loss(Pair(student, teacher, torch.tensor([0, 1]), None), maps)
    torch.testing.assert_close(got.item(), student_space + divergence)


def ragged(seed, width, entries, spans, bias=False):
    """A side of sequences that have so many spans each, between rows that belong to none."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    first, found = [], []
    for count in spans:
        first += [True] * number(1, 4) + [False] * number(0, 3)
        for _ in range(count):
            length = number(1, 4)
            found.append([len(first), len(first) + length])
            first += [False] * length
        first += [False] * number(0, 3)
    normal = [
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((len(first), width), (entries, width), (entries,), (entries, width))
    ]
    return Side(
        normal[0],
        torch.randint(entries, (len(first),), generator=draw),
        torch.tensor(first),
        torch.tensor(found),
        Head(normal[1], normal[2] if bias else None),
        Embeds(normal[3]),
    )


def batch(spans=(4, 0, 3, 1), entries=(4, 6)):
    student = ragged(1, 3, entries[0], spans, bias=True)
    teacher = ragged(2, 5, entries[1], spans)
    offsets = torch.tensor([0, *spans]).cumsum(0)
    student.hidden.requires_grad_()
    student.head.weight.requires_grad_()
    student.head.bias.requires_grad_()
    return Pair(student, teacher, offsets, None)


def maps(*shapes):
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randn(s, generator=draw, dtype=torch.float64).mul(0.5).requires_grad_()
        for s in shapes
    ]


SHAPES = (10, 6), (3, 5), (5, 3)


def distribution(states, head, temperature=1.0):
    bias = 0 if head.bias is None else head.bias
    return ((head.weight @ states + bias) / temperature).softmax(0)


def divergence(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def constant(head):
    return Head(head.weight.detach(), None if head.bias is None else head.bias.detach())


def token_by_token(pair, weights, temperature):
    """The loss as the formulas have it, and how often the student space has its KL."""
    query, to_student, to_teacher = weights
    student, teacher, offsets, _ = pair
    total, agreed = tensor(0.0), 0
    for low, high in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = [
            [
                row
                for start, end in side.spans[low:high].tolist()
                for row in range(start, end)
                if not side.first[row]
            ]
            for side in (student, teacher)
        ]
        if not all(rows):
            continue
        own, other = (
            [side.model.table.weight[side.ids[[row - 1, row]]] for row in of_side]
            for side, of_side in zip((student, teacher), rows, strict=True)
        )
        spread = torch.stack(other).std(correction=0)
        spread_last = torch.stack([e[1] for e in other]).std(correction=0)
        spread_state = torch.stack([teacher.hidden[j - 1] for j in rows[1]]).std(correction=0)
        scores = [
            [(query @ q.flatten()) @ (k.flatten() / spread) / math.sqrt(10) for k in other]
            for q in own
        ]
        for i, row in enumerate(rows[0]):
            shares = torch.stack(scores[i]).softmax(0)
            u = sum(
                share * (to_student @ (teacher.hidden[j - 1] / spread_state + e[1] / spread_last))
                for share, j, e in zip(shares, rows[1], other, strict=True)
            )
            predicted = distribution(u, constant(student.head))
            total = total - predicted[student.ids[row]].log()
            if predicted.argmax() == student.ids[row]:
                agreed += 1
                total = total + divergence(
                    distribution(u.detach(), constant(student.head), temperature),
                    distribution(student.hidden[row - 1], student.head, temperature),
                )
        for j, row in enumerate(rows[1]):
            shares = torch.stack([scores[i][j] for i in range(len(own))]).softmax(0)
            w = sum(
                share * (to_teacher @ student.hidden[i - 1])
                for share, i in zip(shares, rows[0], strict=True)
            )
            total = total + divergence(
                distribution(teacher.hidden[row - 1], teacher.head, temperature),
                distribution(w, teacher.head, temperature),
            )
    return total, agreed


def gradients(loss, pair, weights):
    head = pair.student.head
    return torch.autograd.grad(
        loss, (pair.student.hidden, head.weight, head.bias, *weights), allow_unused=True
    )


@pytest.mark.parametrize("spans", [(4, 0, 3, 1), (1,), (2, 2)])
def test_value_and_gradient_against_the_reference(spans, monkeypatch):
    monkeypatch.setattr("sra.baselines.dskd.ROWS", 3)
    pair, weights = batch(spans), maps(*SHAPES)
    want, agreed = token_by_token(pair, weights, 2.0)
    got = DSKD().loss(pair, weights)
    torch.testing.assert_close(got, want)
    if agreed:  # else the head has no gradient at all
        torch.testing.assert_close(gradients(got, pair, weights), gradients(want, pair, weights))
    assert agreed or spans != (4, 0, 3, 1)


def test_other_sequences_change_nothing():
    """Deviations over a batch and its padding, as public code has them, would."""
    pair, weights = batch((2, 3)), maps(*SHAPES)
    whole = DSKD().loss(pair, weights)
    single = []
    for low, high in ((0, 2), (2, 5)):
        sides = [side._replace(spans=side.spans[low:high]) for side in pair[:2]]
        part = Pair(*sides, torch.tensor([0, high - low]), None)
        single.append(DSKD().loss(part, weights))
    torch.testing.assert_close(whole, sum(single))
    scaled = pair.teacher.hidden.clone()
    inside = torch.cat([torch.arange(*span) for span in pair.teacher.spans.tolist()])
    outside = torch.ones(len(scaled), dtype=torch.bool).index_fill(0, inside - 1, False)
    scaled[outside] = 1e6
    changed = pair._replace(teacher=pair.teacher._replace(hidden=scaled))
    torch.testing.assert_close(DSKD().loss(changed, weights), whole)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_answer_that_is_predicted_on_one_side_only(side):
    """No token to attend to: 0, with a gradient for whoever waits for one."""
    pair, weights = batch((1,)), maps(*SHAPES)
    one = getattr(pair, side)
    pair = pair._replace(**{side: one._replace(first=torch.ones_like(one.first))})
    loss = DSKD().loss(pair, weights)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (pair.student.hidden, *weights)):
        assert not grad.any()


def test_the_maps():
    student, teacher = tiny.student_model(torch.bfloat16), tiny.teacher_model()
    layers = DSKD().projections(student, teacher)
    assert [tuple(x.weight.shape) for x in layers] == [(96, 64), (32, 48), (48, 32)]
    assert all(x.weight.dtype == torch.bfloat16 and x.bias is None for x in layers)


def test_teachers_that_it_cannot_use():
    with pytest.raises(TypeError, match="a cache on disk does not hold"):
        DSKD().projections(tiny.student_model(), object())
    teacher = tiny.teacher_model()
    teacher.set_input_embeddings(nn.Embedding(tiny.TEACHER_ROWS, 24))
    with pytest.raises(ValueError, match="24 wide and its last states 48"):
        DSKD().projections(tiny.student_model(), teacher)
