"""The teacher's predictions in the student's tokens, against one string after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sra import SpanDistiller, chunks, recipe
from sra.model import Head
from sra.objective import Objective
from sra.respelling import (
    Labels,
    by_first_token,
    by_spans_of_entries,
    places,
    respelled_kl,
    targets,
)
from sra.side import Side
from sra.spelling import trie
from tests import tiny

# The student's tokens are letters, and the teacher's are these texts, each with its own state.
LETTERS = "abcdef"
TEXTS = ["a", "ab", "abc", "b", "bc", "ca", "d", "dd", "", "e"]


def trie_of(texts):
    table = np.full((len(texts), 4), -1)
    for i, text in enumerate(texts):
        table[i, : len(text)] = [LETTERS.index(letter) for letter in text]
    return trie(table)


TREE = trie_of(TEXTS)


def sides(words, seed=0, bias=False):
    """A sequence of these spans, each one token of the teacher or, at a "|", several."""
    generator = torch.Generator().manual_seed(seed)
    letters, texts, own, other = ["f"], ["e"], [], []  # a prompt of one token
    for word in words:
        pieces = word.split("|")
        own.append([len(letters), len(letters) + len(word.replace("|", ""))])
        other.append([len(texts), len(texts) + len(pieces)])
        letters += word.replace("|", "")
        texts += pieces

    def side(tokens, entries, spans, width):
        first = torch.zeros(len(tokens), dtype=torch.bool)
        first[0] = True
        weight, *more = (
            torch.randn(*shape, dtype=torch.float64, generator=generator)
            for shape in ((len(entries), width), (len(entries),), (len(tokens), width))
        )
        ids = torch.tensor([entries.index(token) for token in tokens])
        head = Head(weight, more[0] if bias else None)
        return Side(
            more[1], ids, first, torch.tensor(spans, dtype=torch.int64).view(-1, 2), head, None
        )

    student, teacher = side(letters, [*LETTERS], own, 5), side(texts, TEXTS, other, 7)
    return student, teacher, torch.tensor([0, len(words)])


WORDS = ["ab", "d", "abc", "a|b", "dd", "ca", "b"]


def by_hand(student, teacher, words, temperature=1.0):
    """Sum of weight * KL, one place and one text after the other, and -log p of other tokens."""

    def softmax(side, row, temperature=temperature):
        logits = side.head.weight @ side.hidden[row]
        if side.head.bias is not None:
            logits = logits + side.head.bias
        return (logits / temperature).softmax(0).tolist()

    where = [(own - 1, other - 1, "") for own, other in zip(student.spans[:, 0].tolist(),
             teacher.spans[:, 0].tolist(), strict=True)]  # fmt: skip
    where.append((int(student.spans[-1, 1]) - 1, int(teacher.spans[-1, 1]) - 1, ""))
    for word, own, other in zip(words, student.spans[:, 0].tolist(), teacher.spans[:, 0].tolist(),
                                strict=True):  # fmt: skip
        token = word.split("|")[0]
        where += [(own + said - 1, other - 1, token[:said]) for said in range(1, len(token))]
    total = 0.0
    for row, at, said in where:
        chances, mass, whole = softmax(teacher, at), dict.fromkeys(LETTERS, 0.0), 0.0
        for text, chance in zip(TEXTS, chances, strict=True):
            if text.startswith(said) and (text or not said):
                whole += chance
                if len(text) > len(said):
                    mass[text[len(said)]] += chance
        weight = sum(mass.values()) / whole
        own = softmax(student, row)
        for letter, q in zip(LETTERS, own, strict=True):
            p = mass[letter] / sum(mass.values())
            total += weight * p * math.log(p / q) if p else 0.0
    taught = {row for row, _, _ in where}
    for begin, end in student.spans.tolist():
        for row in {*range(begin - 1, end - 1)} - taught:
            total -= math.log(softmax(student, row, 1.0)[student.ids[row + 1]])
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("bias", [False, True])
def test_against_one_text_after_the_other(temperature, bias):
    student, teacher, offsets = sides(WORDS, bias=bias)
    got, shared, _ = respelled_kl(student, teacher, offsets, TREE, temperature)
    torch.testing.assert_close(got.item(), by_hand(student, teacher, WORDS, temperature))
    assert 0 < shared < len(WORDS)


def test_the_places():
    """ "ab|" of "a|b": nothing inside, for the teacher ends a token there."""
    student, teacher, offsets = sides(["ab", "a|b", "dd"])
    found = places(student, teacher, offsets, TREE)
    assert found.rows.tolist() == [0, 1, 2, 4, 5, 6]
    assert found.others.tolist() == [0, 0, 1, 3, 3, 4]
    assert (found.nodes > 0).tolist() == [False, True, False, False, True, False]


def test_what_follows_a_span_that_no_other_follows_has_a_place():
    """Of a conversation: the end of each turn, and of the last."""
    student, teacher, _ = sides(["ab", "d", "abc", "dd"])
    whole = places(student, teacher, torch.tensor([0, 4]), TREE)
    gap = torch.tensor([0, 1, 3])  # the third span is a question
    one, other = (side._replace(spans=side.spans[gap]) for side in (student, teacher))
    found = places(one, other, torch.tensor([0, 3]), TREE)
    lost = range(student.spans[2, 0], student.spans[2, 1] - 1)  # inside the question
    assert found.rows.tolist() == [row for row in whole.rows.tolist() if row not in lost]
    assert student.spans[1, 1] - 1 in found.rows
    # Two rows without padding: the second begins where the first ends.
    both = places(student, teacher, torch.tensor([0, 2, 4]), TREE)
    assert both.rows.tolist() == sorted([*whole.rows.tolist(), int(student.spans[1, 1]) - 1])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_no_gradient_is_formed_where_none_is_asked_for(mode, monkeypatch):
    student, teacher, offsets = sides(WORDS)
    learning = student._replace(head=Head(student.head.weight.clone().requires_grad_()))
    want, *_ = respelled_kl(learning, teacher, offsets, TREE, 2.0)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("formed"))
    with mode():
        got, *_ = respelled_kl(learning, teacher, offsets, TREE, 2.0)
    assert got == want
    assert not got.requires_grad


def test_no_place_where_the_student_spells_otherwise():
    """Its token may reach beyond the teacher's, whose probability says little of it then: there
    the token itself is the target."""
    student, teacher, offsets = sides(["ab", "abc", "d"])
    assert places(student, teacher, offsets, TREE).rows.tolist() == [0, 1, 2, 3, 4, 5, 6]
    ids = student.ids.clone()
    ids[1] = LETTERS.index("e")  # for the first letter of "ab"
    ids[4] = LETTERS.index("d")  # for the second of "abc"
    hidden = student.hidden.clone().requires_grad_()
    student = student._replace(ids=ids, hidden=hidden)
    found = places(student, teacher, offsets, TREE)
    assert found.rows.tolist() == [2, 5, 6]
    assert (found.nodes > 0).tolist() == [False] * 3
    respelled_kl(student, teacher, offsets, TREE, 2.0)[0].backward()
    alone = [0, 1, 3, 4]
    gaps = (student.hidden[alone] @ student.head.weight.T).softmax(1)
    gaps = gaps - F.one_hot(ids[[row + 1 for row in alone]], len(LETTERS))
    torch.testing.assert_close(hidden.grad[alone], gaps @ student.head.weight)


def test_a_target_sums_to_its_weight_and_the_rest_is_not_taught():
    """The text "" has no spelling; behind "a", the tokens "ab" and "abc" go on and "a" ends."""
    student, teacher, offsets = sides(["ab"])
    at = places(student, teacher, offsets, TREE)
    logits = teacher.hidden @ teacher.head.weight.T
    target, weight = targets(lambda rows: logits[rows], at, TREE, 1.0, len(LETTERS))
    chances = logits[0].softmax(0)
    torch.testing.assert_close(weight[0], 1 - chances[TEXTS.index("")])
    a, ab, abc = (chances[TEXTS.index(text)] for text in ("a", "ab", "abc"))
    torch.testing.assert_close(weight[1], (ab + abc) / (a + ab + abc))
    assert target[1].nonzero().flatten().tolist() == [LETTERS.index("b")]


@pytest.mark.parametrize("rows", [len(TEXTS) - 1, len(TEXTS), len(TEXTS) + 3])
def test_both_ways_of_summing(rows):
    """Heads have more rows than there are tokens, and some have fewer."""
    spelt = trie_of(TEXTS[:rows])
    chances = torch.rand(3, rows, dtype=torch.float64)
    want = torch.zeros(3, 8, dtype=torch.float64)
    for i, text in enumerate(TEXTS[:rows]):
        if text:
            want[:, LETTERS.index(text[0])] += chances[:, i]
    for sums in (by_first_token, by_spans_of_entries):
        torch.testing.assert_close(sums(chances, spelt, 8), want)


def test_one_vocabulary_is_the_plain_divergence():
    _, teacher, offsets = sides(WORDS)
    same = teacher._replace(hidden=torch.randn(teacher.hidden.shape, dtype=torch.float64))
    got, shared, _ = respelled_kl(same, teacher, offsets, None, 2.0)
    rows = torch.cat([teacher.spans[:, 0] - 1, teacher.spans[-1:, 1] - 1])
    p, q = ((x.head.logits(x.hidden[rows]) / 2).log_softmax(-1) for x in (teacher, same))
    inside = int(teacher.spans[3, 1]) - 1  # the second token of "a|b"
    label = same.head.logits(same.hidden[inside - 1]).log_softmax(-1)[same.ids[inside]]
    torch.testing.assert_close(got, (p.exp() * (p - q)).sum() - label)
    assert shared == len(WORDS)


def test_the_gradient():
    student, teacher, offsets = sides(WORDS, bias=True)

    def loss(hidden, weight, bias):
        one = student._replace(hidden=hidden, head=Head(weight, bias))
        return 3 * respelled_kl(one, teacher, offsets, TREE, 1.5)[0]

    inputs = [x.clone().requires_grad_() for x in (student.hidden, *student.head[:2])]
    assert torch.autograd.gradcheck(loss, inputs)


# Of some places, and of a token that the teacher says nothing of; not of others.
LABELS = [0, 3, 4, 8, 11]


def labels_of(student, weight=0.7):
    ids = torch.full_like(student.ids, -100)
    ids[LABELS] = student.ids[[row + 1 for row in LABELS]]
    return Labels(ids, weight)


@pytest.mark.parametrize("rows", [3, 1000])
def test_labels_share_the_logits(rows, monkeypatch):
    """The same values as apart, and the sum of both gradients."""
    monkeypatch.setattr(chunks, "ROWS", rows)
    student, teacher, offsets = sides(WORDS, bias=True)
    ids = student.ids.clone()
    ids[1] = LETTERS.index("e")  # where the student spells otherwise

    def both(labels):
        inputs = [x.clone().requires_grad_() for x in (student.hidden, *student.head[:2])]
        one = student._replace(ids=ids, hidden=inputs[0], head=Head(*inputs[1:]))
        out = respelled_kl(one, teacher, offsets, TREE, 1.5, labels)
        total = out.kl
        if labels is None:
            logits = one.head.logits(one.hidden[LABELS])
            loss = F.cross_entropy(logits, ids[[row + 1 for row in LABELS]], reduction="sum")
            out = out._replace(cross_entropy=loss.detach())
            total = out.kl + 0.7 * loss
        total.backward()
        return *(x.detach() for x in out), *(x.grad for x in inputs)

    student = student._replace(ids=ids)
    told = {*places(student, teacher, offsets, TREE).rows.tolist()}
    assert told & {*LABELS}
    assert told - {*LABELS}
    assert {*LABELS} - told
    together = both(labels_of(student))
    for got, want in zip(together, both(None), strict=True):
        torch.testing.assert_close(got, want)


def test_the_gradient_with_labels():
    student, teacher, offsets = sides(WORDS, bias=True)

    def loss(hidden, weight, bias):
        one = student._replace(hidden=hidden, head=Head(weight, bias))
        out = respelled_kl(one, teacher, offsets, TREE, 1.5, labels_of(student))
        return out.kl + 0.7 * out.cross_entropy

    inputs = [x.clone().requires_grad_() for x in (student.hidden, *student.head[:2])]
    assert torch.autograd.gradcheck(loss, inputs)


def test_labels_alone():
    """Where no sequence has a span."""
    student, teacher, _ = sides(WORDS)
    empty = student.spans[:0]
    hidden = student.hidden.clone().requires_grad_()
    one = student._replace(hidden=hidden, spans=empty)
    labels = labels_of(student, weight=2.0)
    other = teacher._replace(spans=empty)
    out = respelled_kl(one, other, torch.tensor([0, 0]), TREE, 1.0, labels)
    assert out.kl.item() == out.shared.item() == 0
    out.kl.backward()
    logits = hidden[LABELS] @ student.head.weight.T
    loss = F.cross_entropy(logits, labels.ids[LABELS], reduction="sum")
    torch.testing.assert_close(out.cross_entropy, loss.detach())
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(2 * loss, hidden)[0])


@pytest.mark.parametrize("wanted", ["hidden", "weight", "none"])
def test_only_what_is_wanted_gets_a_gradient(wanted):
    student, teacher, offsets = sides(WORDS)
    hidden = student.hidden.clone().requires_grad_(wanted == "hidden")
    weight = student.head.weight.clone().requires_grad_(wanted == "weight")
    one = student._replace(hidden=hidden, head=Head(weight, softcap=5.0))
    got, *_ = respelled_kl(one, teacher, offsets, TREE, 1.0)
    assert got.requires_grad == (wanted != "none")
    if wanted != "none":
        got.backward()
    assert (hidden.grad is not None) == (wanted == "hidden")
    assert (weight.grad is not None) == (wanted == "weight")


def test_chunks_of_rows_change_nothing(monkeypatch):
    student, teacher, offsets = sides(WORDS)

    def both():
        hidden = student.hidden.clone().requires_grad_()
        weight = student.head.weight.clone().requires_grad_()
        one = student._replace(hidden=hidden, head=Head(weight))
        total, shared, _ = respelled_kl(one, teacher, offsets, TREE, 1.0)
        total.backward()
        return total.detach(), shared, hidden.grad, weight.grad

    whole = both()
    monkeypatch.setattr(chunks, "ROWS", 3)
    for part, same in zip(both(), whole, strict=True):
        torch.testing.assert_close(part, same)


def test_sums_of_low_precision_are_kept_in_float32(monkeypatch):
    """The gradient of a head in bf16, over many chunks, is no worse than in one."""
    student, teacher, offsets = sides(WORDS * 20)

    def gradient(dtype, rows):
        monkeypatch.setattr(chunks, "ROWS", rows)
        weight = student.head.weight.to(dtype, copy=True).requires_grad_()
        one = student._replace(hidden=student.hidden.to(dtype), head=Head(weight))
        respelled_kl(one, teacher, offsets, TREE, 1.0)[0].backward()
        return weight.grad.double()

    exact = gradient(torch.float64, 1000)
    error = [(gradient(torch.bfloat16, rows) - exact).norm() / exact.norm() for rows in (1000, 2)]
    assert error[1] < 1.5 * error[0] + 1e-3


def test_no_place_at_all():
    student, teacher, _ = sides([])
    hidden = student.hidden.clone().requires_grad_()
    got, *_ = respelled_kl(
        student._replace(hidden=hidden), teacher, torch.tensor([0, 0]), TREE, 1.0
    )
    assert got.item() == 0
    got.backward()
    assert not hidden.grad.any()


def test_a_teacher_that_finds_the_text_impossible():
    """Behind a prefix of probability 0 there is nothing to learn, and nothing is NaN."""
    student, teacher, offsets = sides(["ab"])
    bias = torch.zeros(len(TEXTS), dtype=torch.float64)
    bias[[i for i, text in enumerate(TEXTS) if text.startswith("a")]] = -1e9
    teacher = teacher._replace(head=teacher.head._replace(bias=bias))
    hidden = student.hidden.clone().requires_grad_()
    got, *_ = respelled_kl(student._replace(hidden=hidden), teacher, offsets, TREE, 1.0)
    got.backward()
    assert got.isfinite()
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[1].any()


def test_it_is_the_logit_term_of_its_recipe():
    batch = tiny.collator()(tiny.ROWS)
    student, teacher = tiny.student_model(torch.float64), tiny.teacher_model(torch.float64)
    vocabulary = tiny.vocabulary()
    module = SpanDistiller(student, teacher, recipe("respell"), vocabulary=vocabulary)
    out = module(**batch)
    torch.testing.assert_close(out.loss, 0.2 * out.ce + 0.8 * out.logit)
    assert not list(module.projectors)
    assert 0.9 < out.shared_mass < 1  # some of it: control tokens, and rows beyond the tokenizer
    less = SpanDistiller(student, teacher, recipe("boundary"), vocabulary=vocabulary)(**batch)
    assert out.shared_mass > less.shared_mass


def test_what_does_not_go_together():
    for changes in ({"logit_state": "com"}, {"direction": "reverse"}):
        with pytest.raises(ValueError, match='it goes with logit_state = "end"'):
            recipe("respell", **changes)
    assert Objective(outside="respell", logit_state="end").normaliser == "sequences"
