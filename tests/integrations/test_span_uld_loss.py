"""`SpanULDLoss` on logits and ids: by hand, and against the text."""

from __future__ import annotations

import functools
import itertools
import math
import os

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sra import SharedVocabulary, SpanAligner
from sra.data import IGNORED
from sra.respelling import places, targets
from sra.side import side_of
from sra.token_bytes import byte_tokenizer
from tests import real_tokenizers, tiny

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

from sra.trl import SpanULDLoss


def letters(vocabulary, merges):
    """A tokenizer of the letters a, b, c with a few merges; </s> is 0."""
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


# --- by hand ---

STUDENT = letters(["</s>", "a", "b", "c", "ab"], [("a", "b")])
TEACHER = letters(["</s>", "c", "b", "a", "bc"], [("b", "c")])
# The completion "abca": student ab|c|a, teacher a|bc|a. Both cut before it, after abc and after
# abca, so positions before ab and a, before a and a, and before both ends are compared.
STUDENT_LABELS = torch.tensor([[IGNORED, IGNORED, 4, 3, 1, 0]])
TEACHER_LABELS = torch.tensor([[IGNORED, 3, 4, 3, 0]])


@pytest.mark.parametrize(
    ("skip", "student_at", "teacher_at"), [(True, [1, 3], [0, 2]), (False, [1, 3, 4], [0, 2, 3])]
)
def test_the_positions_by_hand(skip, student_at, teacher_at):
    loss = SpanULDLoss(STUDENT, TEACHER, skip_student_eos=skip, skip_teacher_eos=skip)
    pairs = loss.aligner(STUDENT_LABELS[0].numpy(), TEACHER_LABELS[0].numpy())
    assert pairs.student.tolist() == student_at
    assert pairs.teacher.tolist() == teacher_at
    assert pairs.coverage == 1


def test_the_loss_by_hand():
    """Shared: a, b, c and the end. A student without opinion; a teacher of halves and eighths."""
    student = torch.zeros(1, 6, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.full((1, 5, 5), 1 / 5, dtype=torch.float64)
    teacher[0, 0] = torch.tensor([1, 1, 2, 4, 8]) / 16  # half of it on "bc", which is not shared
    teacher[0, 2] = torch.tensor([1, 2, 1, 4, 0]) / 8
    loss = SpanULDLoss(STUDENT, TEACHER)(
        student, teacher.log(), STUDENT_LABELS, TEACHER_LABELS, None, None
    )
    # Inside the shared part: halves, quarters and two eighths at both places, 1.75 bits, against
    # two bits; the first counts half. Divided by the student's four labels.
    want = (0.5 + 1) * 0.25 * math.log(2) / 4
    assert loss.item() == pytest.approx(want, rel=1e-12)
    loss.backward()
    # (p_student - p_teacher) on the shared entries, in the order </s>, a, b, c, ab.
    want = torch.zeros(6, 5, dtype=torch.float64)
    want[1] = 0.5 * torch.tensor([1 / 8, -1 / 4, 0, 1 / 8, 0]) / 4
    want[3] = torch.tensor([1 / 8, -1 / 4, 1 / 8, 0, 0]) / 4
    torch.testing.assert_close(student.grad[0], want, rtol=0, atol=1e-15)


def test_respelt_by_hand():
    """The completion "bca": student b|c|a, teacher bc|a. Before b and before a both ends answer the
    same question; behind b the student is to go on with c, as the teacher's "bc" does."""
    student = letters(["</s>", "a", "b", "c"], [])
    labels = torch.tensor([[IGNORED, IGNORED, 2, 3, 1, 0]])
    others = torch.tensor([[IGNORED, 4, 3, 0]])
    logits = torch.zeros(1, 6, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.full((1, 4, 5), 1 / 5, dtype=torch.float64)
    teacher[0, 0] = torch.tensor([0, 1, 2, 1, 4]) / 8  # </s>, c, b, a, bc
    teacher[0, 1] = torch.tensor([4, 0, 0, 4, 0]) / 8
    seen = {}
    respelt = SpanULDLoss(student, TEACHER, outside="respell", log=seen.__setitem__)
    loss = respelt(logits, teacher.log(), labels, others, None, None)
    # Without opinion: 2 bits. Before b: 3/4 b, 1/8 a, 1/8 c, of 1.06 bits. Behind it: c, for what
    # goes on of "b" and "bc", 4 of 6. Before a: a half each for a and the end, 1 bit.
    bits = 2 + 0.75 * math.log2(0.75) - 0.75, (4 / 6) * 2, 1.0
    assert loss.item() == pytest.approx(sum(bits) * math.log(2) / 4, rel=1e-12)
    assert seen == {"span_coverage": 1, "shared_mass": pytest.approx(1)}
    loss.backward()
    want = torch.zeros(6, 4, dtype=torch.float64)
    want[1] = torch.tensor([1 / 4, 1 / 8, -1 / 2, 1 / 8]) / 4
    want[2] = torch.tensor([1 / 6, 1 / 6, 1 / 6, -1 / 2], dtype=torch.float64) / 4
    want[3] = torch.tensor([-1 / 4, -1 / 4, 1 / 4, 1 / 4]) / 4
    torch.testing.assert_close(logits.grad[0], want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("chunk", [7, 256])
def test_respelt_at_the_places_of_the_distiller(monkeypatch, chunk):
    """Found from the ids alone; but only tokens of spellings are compared."""
    monkeypatch.setattr("sra.trl.gold.ROWS", chunk)
    own = tiny.collator()(tiny.ROWS)
    other = own["teachers"][0]
    labels = torch.full_like(other["input_ids"], IGNORED)
    spans, offsets = other["teacher_spans"], other["span_offsets"]
    for begin, end in itertools.pairwise(offsets.tolist()):
        completion = slice(spans[begin, 0], spans[end - 1, 1] + 1)  # and its end of sequence
        labels.view(-1)[completion] = other["input_ids"].view(-1)[completion]
    torch.manual_seed(0)
    rows = tiny.STUDENT_ROWS, tiny.TEACHER_ROWS
    logits = [
        torch.randn(*side["input_ids"].shape, size, dtype=torch.float64)
        for side, size in zip((own, other), rows, strict=True)
    ]
    tokenizers = tiny.student_tokenizer(), tiny.teacher_tokenizer()
    loss = SpanULDLoss(
        *tokenizers, outside="respell", skip_student_eos=False, skip_teacher_eos=False
    )(*logits, own["labels"], labels, None, None)

    spelt = SharedVocabulary(
        *tokenizers, match="normalised", student_rows=rows[0], teacher_rows=rows[1]
    ).trie(torch.device("cpu"))
    flat = [x.flatten(0, 1) for x in logits]
    sides = [
        side_of(None, states, None, side, found)
        for states, side, found in zip(flat, (own, other), (other["student_spans"], spans),
                                       strict=True)
    ]  # fmt: skip
    at = places(*sides, offsets, spelt)
    assert (at.nodes > 0).any()
    target, weight = targets(lambda rows: flat[1][rows], at, spelt, 1.0, rows[0])
    used = torch.zeros(rows[0], dtype=torch.bool).index_fill(0, spelt.used, True)
    said = flat[0][at.rows].masked_fill(~used, -torch.inf).log_softmax(1)
    target = target[:, used] / target.sum(1, keepdim=True)
    kl = torch.special.xlogy(target, target) - target * said[:, used]
    tokens = (own["labels"] != IGNORED).sum()
    torch.testing.assert_close(loss, (weight * kl.sum(1)).sum() / tokens)


def test_respelt_goes_forward_alone():
    with pytest.raises(ValueError, match=r"Set beta=0\.0 in GOLDConfig"):
        SpanULDLoss(STUDENT, TEACHER, outside="respell", direction="reverse")


def test_another_turn_inside_a_span():
    """Tokens that are not learnt stand between those of "bc": nothing is taught inside it."""
    student = letters(["</s>", "a", "b", "c"], [])
    loss = SpanULDLoss(student, TEACHER, outside="respell")
    for gap in (0, 2):
        labels = np.array([IGNORED, 2, *[IGNORED] * gap, 3, 1])
        others = np.array([IGNORED, 4, 3])
        pairs = loss.aligner(labels, others)
        assert pairs.student_spans.tolist() == [[1, 3 + gap], [3 + gap, 4 + gap]]
        assert pairs.teacher_spans.tolist() == [[1, 2], [2, 3]]
        assert pairs.student.tolist() == [0, 2 + gap]
        logits = torch.randn(1, len(labels), 4, requires_grad=True)
        loss(
            logits, torch.randn(1, 3, 5), torch.tensor([labels]), torch.tensor([others]), None, None
        ).backward()
        taught = logits.grad[0].abs().sum(1).nonzero().flatten().tolist()
        assert taught == ([0, 1, 2] if not gap else [0, 2 + gap])


def test_cross_entropy_and_weights():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6, 5), torch.randn(1, 5, 5)
    inputs = student, teacher, STUDENT_LABELS, TEACHER_LABELS, None, None
    kl = SpanULDLoss(STUDENT, TEACHER)(*inputs)
    both = SpanULDLoss(STUDENT, TEACHER, crossentropy_weight=0.25, distillation_weight=3)(*inputs)
    ce = torch.nn.functional.cross_entropy(student[0, :-1], STUDENT_LABELS[0, 1:])
    torch.testing.assert_close(both, 0.25 * ce + 3 * kl)


@pytest.mark.parametrize("outside", ["weight", "respell"])
def test_nothing_to_compare(outside):
    labels = torch.full((1, 4), IGNORED)
    student = torch.randn(1, 4, 5, requires_grad=True)
    loss = SpanULDLoss(STUDENT, TEACHER, outside=outside)
    nothing = loss(student, torch.randn(1, 4, 5), labels, labels, None, None)
    nothing.backward()
    assert nothing.item() == 0
    assert not student.grad.any()


# --- any tokenizer ---

TEXTS = [row["completion"] for row in tiny.ROWS] + [" two  spaces ", "\tx\n\n", "naïve café", "Ａ①"]


def assert_pairs_are_the_aligners(student, teacher, texts):
    """From the ids alone as the aligner has them from the text; 3 tokens stand before it."""
    loss = SpanULDLoss(student, teacher)
    aligner = SpanAligner(student, teacher)
    for text in texts:
        table = aligner(text)
        want = list(zip(table.student[:, 0].tolist(), table.teacher[:, 0].tolist(), strict=True))
        ends = table.student[-1, 1], table.teacher[-1, 1]
        if ends[0] < len(table.student_ids) and ends[1] < len(table.teacher_ids):
            want.append(ends)  # what follows the last span
        labels = [
            np.concatenate([np.full(3, IGNORED), ids])
            for ids in (table.student_ids, table.teacher_ids)
        ]
        pairs = loss.aligner(*labels)
        got = list(zip(pairs.student.tolist(), pairs.teacher.tolist(), strict=True))
        assert got == [(s + 2, t + 2) for s, t in want], text
        assert pairs.coverage == pytest.approx(table.coverage), text


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_sentencepiece_on_either_side(side):
    pair = tiny.student_tokenizer(), tiny.sentencepiece_tokenizer()
    assert_pairs_are_the_aligners(*(pair if side == "teacher" else pair[::-1]), TEXTS)


@functools.cache
def gpt2():
    return byte_tokenizer(real_tokenizers.load("gpt2"))


@pytest.mark.parametrize("teacher", ["mistral-v1", "unigram-en", "bert"])
def test_real_tokenizers_that_normalise(teacher):
    assert_pairs_are_the_aligners(gpt2(), real_tokenizers.load(teacher), TEXTS)


def test_the_vocabulary_is_of_the_heads(tmp_path):
    loss = SpanULDLoss(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    heads = torch.empty(1, 1, tiny.STUDENT_ROWS), torch.empty(1, 1, tiny.TEACHER_ROWS)
    shared = loss._shared(*heads)
    want = SharedVocabulary(tiny.student_tokenizer(), tiny.teacher_tokenizer(), match="normalised")
    assert torch.equal(shared.student_ids, want.student_ids)
    assert torch.equal(shared.teacher_ids, want.teacher_ids)
