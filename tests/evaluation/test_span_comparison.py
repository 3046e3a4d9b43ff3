"""Agreement and divergence after spans: known answers, and a loop over whole logits."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from sra import SharedVocabulary, SpanAligner, SpanCollator
from sra.evaluation.span_comparison import compare_spans, span_agreement
from tests import tiny


def plain(student, teacher, row, collator, vocabulary):
    """(bits, student's top, teacher's top) of each span, one row alone, with whole softmaxes."""
    batch = collator([row])
    theirs = batch["teachers"][0]
    ours = student.double()(batch["input_ids"]).logits[0]
    other = teacher.double()(theirs["input_ids"]).logits[0]
    found = []
    for (_, s), (_, t) in zip(
        batch["teachers"][0]["student_spans"].tolist(),
        theirs["teacher_spans"].tolist(),
        strict=True,
    ):
        p, q = other[t - 1].softmax(-1), ours[s - 1].softmax(-1)
        p, q = p[vocabulary.teacher_ids], q[vocabulary.student_ids]
        best = [int(vocabulary.student_ids[x.argmax()]) for x in (q, p)]
        p, q = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (p, q))
        found.append(((p * (p / q).log2()).sum().item(), *best))
    return found


@pytest.mark.parametrize("padding", ["right", "left", "free"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_a_plain_loop(padding, batch_size, monkeypatch):
    monkeypatch.setattr("sra.evaluation.span_comparison.CHUNK_ELEMENTS", 7 * tiny.TEACHER_ROWS)
    student, teacher, vocabulary = tiny.student_model(), tiny.teacher_model(), tiny.vocabulary()
    aligner = SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    collator = SpanCollator(aligner, padding=padding)
    compared = compare_spans(
        student, teacher, tiny.ROWS, collator, vocabulary, batch_size=batch_size
    )
    assert len(compared) == len(tiny.ROWS)
    for row, spans in zip(tiny.ROWS, compared, strict=True):
        want = plain(student, teacher, row, SpanCollator(aligner), vocabulary)
        assert spans.divergence == pytest.approx([bits for bits, _, _ in want], rel=1e-4)
        assert spans.student_top == [top for _, top, _ in want]
        assert spans.teacher_top == [top for _, _, top in want]
        text = "".join(
            tiny.student_tokenizer().decode(spans.ids[a:b]) for a, b in spans.spans
        ).replace("\ufffd", "")
        assert text
        assert set(text) <= set(row["completion"])
        assert all(spans.labelled[a] for a, _ in spans.spans)


def test_known_answers():
    student, tokenizer = tiny.student_model(tied=False), tiny.student_tokenizer()
    collator = SpanCollator(SpanAligner(tokenizer, tokenizer))
    twin, opposite = copy.deepcopy(student), copy.deepcopy(student)
    opposite.lm_head.weight.data.neg_()  # its likeliest token is the other's least likely one
    assert span_agreement(student, twin, tiny.ROWS, collator, None) == 1
    assert span_agreement(student, opposite, tiny.ROWS, collator, None) == 0
    for row in compare_spans(student, twin, tiny.ROWS, collator, None):
        assert row.divergence == pytest.approx([0] * len(row.spans), abs=1e-6)
        assert row.agreements == len(row.spans) > 0
    # Half of the rows: the share is of spans, not of rows.
    counts = [len(row.spans) for row in compare_spans(student, twin, tiny.ROWS, collator, None)]
    models = [twin if i < 4 else opposite for i in range(len(tiny.ROWS))]
    agreed = sum(
        compare_spans(student, model, [row], collator, None)[0].agreements
        for model, row in zip(models, tiny.ROWS, strict=True)
    )
    assert agreed == sum(counts[:4])


def test_only_shared_tokens_can_be_the_likeliest():
    """The token that both would name is in one vocabulary alone: the next shared one counts."""
    student, teacher = tiny.student_model(tied=False), tiny.teacher_model()
    whole = tiny.vocabulary()
    rest = SharedVocabulary.__new__(SharedVocabulary)
    rest.student_ids, rest.teacher_ids = whole.student_ids[:5], whole.teacher_ids[:5]
    for row in compare_spans(student, teacher, tiny.ROWS, tiny.collator(), rest):
        assert set(row.student_top) | set(row.teacher_top) <= set(rest.student_ids.tolist())


def test_a_row_that_truncation_leaves_nothing_of_has_no_span():
    student, teacher = tiny.student_model(), tiny.teacher_model()
    collator = tiny.collator(max_length=24)
    rows = [{"prompt": "x" * 200, "completion": "y"}, tiny.ROWS[1]]
    nothing, whole = compare_spans(student, teacher, rows, collator, tiny.vocabulary())
    assert nothing.spans == []
    assert math.isnan(nothing.mean_divergence)
    assert whole.spans
    with pytest.raises(ValueError, match="There is no span in any row"):
        span_agreement(student, teacher, rows[:1], collator, tiny.vocabulary())


def test_training_mode_is_left_alone():
    student, teacher = tiny.student_model().train(), tiny.teacher_model().eval()
    compare_spans(student, teacher, tiny.ROWS[:1], tiny.collator(), tiny.vocabulary())
    assert student.training
    assert not teacher.training
