"""DSKDv2 with exact token alignment, against cases worked by hand and a slow reference."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from sra import SharedVocabulary, SpanAligner, SpanCollator
from sra.baselines.baseline import Pair, Side, side_of
from sra.baselines.dskdv2 import DSKDv2, aligned
from sra.model import Head, head_of
from tests import tiny
from tests.baselines.test_dskd import (
    batch,
    constant,
    distribution,
    divergence,
    gradients,
    maps,
    tensor,
)


def shared(*pairs):
    student_ids, teacher_ids = torch.tensor(pairs).unbind(1)
    return SimpleNamespace(student_ids=student_ids, teacher_ids=teacher_ids)


def side(states, head, ids, spans):
    """Row 0 begins the one sequence."""
    first = torch.arange(len(ids)) == 0
    return Side(
        tensor(states), torch.tensor(ids), first, torch.tensor(spans), Head(tensor(head)), None
    )


@pytest.mark.parametrize("known", [True, False])
def test_one_token_by_hand(known):
    """Student token 1 is the teacher's 2; the teacher's favourite, 0, is the student's or none."""
    student = side([[0.0, 0.0], [7.0, 7.0]], [[1, 0], [0, 1]], [0, 1], [[1, 2]])
    three, head = math.log(3), [[1, 0], [0, 0], [0, 0]]
    teacher = side([[three, 5.0], [7.0, 7.0]], head, [0, 2], [[1, 2]])
    vocabulary = shared((0, 0), (1, 2)) if known else shared((1, 2))
    weights = [tensor([[1, 0], [0, 0]]), tensor([[9, 0], [0, 9]])]
    # u = (log 3, 0): (3/4, 1/4), whose first is the favourite; the student's own is (1/2, 1/2).
    student_space = math.log(4 / 3) + 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    # The teacher has (3/5, 1/5, 1/5), the student's mapped state, 0, thirds.
    teacher_space = 0.6 * math.log(1.8) + 0.4 * math.log(0.6)
    pair = Pair(student, teacher, torch.tensor([0, 1]), vocabulary)
    got = DSKDv2(temperature=1.0).loss(pair, weights).item()
    torch.testing.assert_close(got, student_space * known + teacher_space)


def test_which_tokens_are_aligned():
    """In turn: aligned, another entry for the same bytes, two tokens for one, one for two,
    aligned."""
    student = side([[0.0]] * 8, [[1.0]] * 9, [5, 1, 2, 3, 3, 4, 0, 0], [])
    teacher = side([[0.0]] * 8, [[1.0]] * 9, [5, 7, 6, 8, 1, 2, 6, 0], [])
    spans = [[1, 2], [2, 3], [3, 5], [5, 6], [6, 7]], [[1, 2], [2, 3], [3, 4], [4, 6], [6, 7]]
    student, teacher = (
        s._replace(spans=torch.tensor(x)) for s, x in zip((student, teacher), spans, strict=True)
    )
    vocabulary = shared((0, 6), (1, 7), (2, 5), (3, 8), (4, 1))
    pair = Pair(student, teacher, torch.tensor([0, 5]), vocabulary)
    assert [rows.tolist() for rows in aligned(pair)] == [[1, 6], [1, 6]]
    # With one tokenizer, ids are tokens.
    one = Pair(student, student, torch.tensor([0, 5]), None)
    assert [rows.tolist() for rows in aligned(one)] == [[1, 2, 5, 6]] * 2
    # What begins a sequence is predicted by nothing.
    begins = torch.arange(8) == 1
    for sides in (
        (student._replace(first=begins), teacher),
        (student, teacher._replace(first=begins)),
    ):
        rows, _ = aligned(Pair(*sides, torch.tensor([0, 5]), vocabulary))
        assert rows.tolist() == [6]


@pytest.mark.parametrize("padding", ["right", "left", "free"])
def test_aligned_tokens_have_one_history(padding):
    """Of real tokenizations: the answer's text up to the token's end, white space included."""
    tokenizers = tiny.student_tokenizer(), tiny.teacher_tokenizer()
    collator = SpanCollator(SpanAligner(*tokenizers), max_length=256, padding=padding)
    spaced = {"prompt": "Indent.", "completion": "a\n\n    b  c\tthe\nthe  the"}
    inputs = collator([*tiny.ROWS, spaced])
    (given,) = inputs["teachers"]
    pair = Pair(
        *(
            side_of(None, torch.zeros(x["input_ids"].numel(), 1), head, x, given[f"{name}_spans"])
            for x, name, head in (
                (inputs, "student", Head(torch.zeros(tiny.STUDENT_ROWS, 1))),
                (given, "teacher", Head(torch.zeros(tiny.TEACHER_ROWS, 1))),
            )
        ),
        given["span_offsets"],
        SharedVocabulary(*tokenizers, match="normalised"),
    )
    found = list(zip(*(rows.tolist() for rows in aligned(pair)), strict=True))
    assert len(found) > 50
    checked = 0
    for low, high in zip(pair.offsets[:-1].tolist(), pair.offsets[1:].tolist(), strict=True):
        own, other = pair.student.spans[low:high], pair.teacher.spans[low:high]
        for row, partner in found:
            if own[0, 0] <= row < own[-1, 1]:
                texts = [
                    tokenizer.decode(s.ids[int(spans[0, 0]) : end + 1])
                    for tokenizer, s, spans, end in (
                        (tokenizers[0], pair.student, own, row),
                        (tokenizers[1], pair.teacher, other, partner),
                    )
                ]
                assert texts[0] == texts[1]
                checked += 1
    assert checked == len(found)


def token_by_token(pair, weights, temperature):
    """The loss as the formulas have it; how many tokens are aligned, known and agreed."""
    to_student, to_teacher = weights
    student, teacher, _, vocabulary = pair
    total, counts = tensor(0.0), [0, 0, 0]
    partner = dict(zip(*(x.tolist() for x in vars(vocabulary).values()), strict=True))
    known = {theirs: ours for ours, theirs in partner.items()}
    for (start, end), (low, high) in zip(
        student.spans.tolist(), teacher.spans.tolist(), strict=True
    ):
        if end - start != 1 or high - low != 1 or student.first[start] or teacher.first[low]:
            continue
        if partner.get(int(student.ids[start])) != int(teacher.ids[low]):
            continue
        counts[0] += 1
        own, other = student.hidden[start - 1], teacher.hidden[low - 1]
        total = total + divergence(
            distribution(other, teacher.head, temperature),
            distribution(to_teacher @ own, teacher.head, temperature),
        )
        said = known.get(int(distribution(other, teacher.head).argmax()))
        if said is None:
            continue
        counts[1] += 1
        u = to_student @ other
        predicted = distribution(u, constant(student.head))
        total = total - predicted[said].log()
        if predicted.argmax() == said:
            counts[2] += 1
            total = total + divergence(
                distribution(u.detach(), constant(student.head), temperature),
                distribution(own, student.head, temperature),
            )
    return total, counts


def test_value_and_gradient_against_the_reference(monkeypatch):
    for module in ("dskd", "dskdv2"):
        monkeypatch.setattr(f"sra.baselines.{module}.ROWS", 7)
    pair, weights = batch((600, 0, 501, 1)), maps((3, 5), (5, 3))
    pair = pair._replace(vocabulary=shared((0, 3), (1, 0), (2, 5)))
    for one in pair[:2]:  # more of one token
        one.spans[one.spans.diff(dim=1)[:, 0] == 2, 1] -= 1
    want, counts = token_by_token(pair, weights, 2.0)
    assert counts[0] > counts[1] > counts[2] > 1
    got = DSKDv2().loss(pair, weights)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, pair, weights), gradients(want, pair, weights))


def test_nothing_is_aligned():
    """0, with a gradient for whoever waits for one."""
    pair, weights = batch((3, 2)), maps((3, 5), (5, 3))
    loss = DSKDv2().loss(
        pair._replace(teacher=pair.teacher._replace(ids=pair.teacher.ids + 9)), weights
    )
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (pair.student.hidden, *weights)):
        assert not grad.any()


def test_maps_begin_where_logits_are_nearest(monkeypatch):
    monkeypatch.setattr("sra.baselines.dskdv2.FIT_ROWS", 100)
    student, teacher = tiny.student_model(torch.float64), tiny.teacher_model(torch.float64)
    vocabulary = tiny.vocabulary()
    to_student, to_teacher = DSKDv2().projections(student, teacher, vocabulary)
    own = head_of(student).weight[vocabulary.student_ids]
    other = head_of(teacher).weight[vocabulary.teacher_ids]
    torch.testing.assert_close(to_student.weight, torch.linalg.lstsq(own, other).solution)
    torch.testing.assert_close(to_teacher.weight, torch.linalg.lstsq(other, own).solution)
    assert to_student.weight.requires_grad
    # With the same heads, nothing is left to learn.
    copy = tiny.student_model(torch.float64)
    for layer in DSKDv2().projections(student, copy):
        torch.testing.assert_close(layer.weight, torch.eye(32, dtype=torch.float64))


def test_maps_of_fewer_shared_tokens_than_dimensions():
    student, teacher = tiny.student_model(torch.float64), tiny.teacher_model(torch.float64)
    teacher.config.logit_scale = 0.25
    few = shared(*((i, 2 * i) for i in range(20)))
    to_student, to_teacher = DSKDv2().projections(student, teacher, few)
    own = head_of(student).weight[few.student_ids]
    other = head_of(teacher).weight[few.teacher_ids] * 0.25
    torch.testing.assert_close(to_student.weight, torch.linalg.pinv(own) @ other)
    torch.testing.assert_close(to_teacher.weight, torch.linalg.pinv(other) @ own)
