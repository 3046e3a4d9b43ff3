"""The likelihood of the spans' texts, against one token after the other."""

from __future__ import annotations

import math

import pytest
import torch

from sra import SpanAligner, SpanCollator, SpanDistiller, recipe
from sra.baselines import baseline
from sra.likelihood import span_likelihood, span_log_likelihood
from sra.model import Head
from sra.side import Side
from tests import tiny


def side(rows, vocabulary, spans, first=(0,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocabulary, 8, dtype=torch.float64, generator=generator)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    begins = torch.tensor([i in first for i in range(rows)])
    return Side(hidden, ids, begins, torch.tensor(spans), Head(weight), None)


def by_hand(one):
    """log p of each span, one token after the other."""
    found = []
    for start, end in one.spans.tolist():
        total = 0.0
        for row in range(start, end):
            logits = (one.head.weight @ one.hidden[row - 1]).tolist()
            most = max(logits)
            total += logits[one.ids[row]] - most
            total -= math.log(sum(math.exp(x - most) for x in logits))
        found.append(total)
    return found


STUDENT = side(20, 30, [[2, 3], [3, 6], [8, 9], [12, 19]], first=(0, 10))
TEACHER = side(15, 17, [[1, 2], [2, 3], [5, 9], [9, 14]], first=(0, 7), seed=1)


def test_every_token_of_a_span_counts():
    got = span_log_likelihood(STUDENT, STUDENT.spans)
    torch.testing.assert_close(got.tolist(), by_hand(STUDENT))
    assert span_log_likelihood(STUDENT, STUDENT.spans[:0]).shape == (0,)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_against_one_span_after_the_other(temperature):
    """The third span holds the first token of a teacher's sequence, so it does not count."""
    want = 0.0
    for index in (0, 1, 3):
        p, q = (math.exp(by_hand(x)[index] / temperature) for x in (TEACHER, STUDENT))
        want += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    got = span_likelihood(STUDENT, TEACHER, temperature)
    torch.testing.assert_close(got.item(), temperature * want)


def test_it_is_zero_where_both_find_the_text_equally_likely():
    hidden = STUDENT.hidden.clone().requires_grad_()
    loss = span_likelihood(STUDENT._replace(hidden=hidden), STUDENT, 100.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    loss.backward()
    assert hidden.grad.abs().max() < 1e-12


def test_the_gradient():
    def loss(hidden, weight):
        return span_likelihood(STUDENT._replace(hidden=hidden, head=Head(weight)), TEACHER, 10.0)

    inputs = [x.clone().requires_grad_() for x in (STUDENT.hidden, STUDENT.head.weight)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_the_gradient_does_not_vanish_with_the_temperature():
    """In the student's log p, it tends to l_teacher / l_student - 1."""
    own = by_hand(STUDENT)[3]
    other = by_hand(TEACHER)[3]
    student, teacher = (x._replace(spans=x.spans[3:]) for x in (STUDENT, TEACHER))
    bias = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    head = student.head._replace(bias=bias)
    span_log_likelihood(student._replace(head=head), student.spans).sum().backward()
    alone, bias.grad = bias.grad.clone(), None
    span_likelihood(student._replace(head=head), teacher, 1e6).backward()
    torch.testing.assert_close(bias.grad, (other / own - 1) * alone, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("sure", ["student", "teacher", "both"])
def test_a_text_that_is_certain(sure):
    """log(1 - p) is finite, and so is the gradient."""

    def certain(one):
        weight = torch.zeros(*one.head.weight.shape, dtype=torch.float32)
        bias = torch.full((len(weight),), -1e4)
        bias[one.ids[0]] = 0
        ids = one.ids[:1].expand(len(one.ids))
        return one._replace(hidden=one.hidden.float(), ids=ids, head=Head(weight, bias))

    student, teacher = (
        certain(x) if sure in (name, "both") else x
        for name, x in (("student", STUDENT), ("teacher", TEACHER))
    )
    hidden = student.hidden.clone().requires_grad_()
    loss = span_likelihood(student._replace(hidden=hidden), teacher, 100.0)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


def test_it_is_a_term_of_the_objective_and_alone_the_method_alm():
    aligner = SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    batch = SpanCollator(aligner, max_length=256)(tiny.ROWS)
    student, teacher = tiny.student_model(torch.float64), tiny.teacher_model(torch.float64)
    alone = recipe("paper", cosine=0.0, gamma=0.0, logit=0.0, likelihood=2.0)
    objectives = alone, baseline("alm"), recipe("boundary", likelihood=1.0), recipe("boundary")
    outs = [
        SpanDistiller(student, teacher, objective, vocabulary=tiny.vocabulary())(**batch)
        for objective in objectives
    ]
    torch.testing.assert_close(outs[0].likelihood, outs[1].logit)
    torch.testing.assert_close(outs[0].loss, 0.5 * outs[0].ce + outs[0].likelihood)
    assert outs[3].likelihood is None
    with pytest.raises(ValueError, match="likelihood_temperature = 0"):
        recipe("paper", likelihood_temperature=0.0)
