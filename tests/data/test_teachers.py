"""Batches for several teachers, and batches made by data workers."""

from __future__ import annotations

import pickle

import pytest
import torch
from batches import CONVERSATION, PADDINGS, ROW, both_sides, sequences
from torch.utils.data import DataLoader

from sra import SpanAligner, SpanCollator
from tests import tiny
from tests.chat import chat_templates

NAMES = ["chat", "lossy", "plain"]


def three_teachers(**options):
    student = tiny.student_tokenizer()
    teachers = (tiny.teacher_tokenizer(), tiny.lossy_tokenizer(), chat_templates.tokenizer("plain"))
    aligners = [SpanAligner(student, teacher) for teacher in teachers]
    return SpanCollator(aligners, teacher_names=NAMES, **options)


ROUTED = [
    tiny.ROWS[0],  # all of them
    tiny.ROWS[1] | {"teacher": "plain"},
    tiny.ROWS[2] | {"teacher": ["plain", "chat"]},
    tiny.ROWS[3] | {"teacher": None},
]


@pytest.mark.parametrize("padding", PADDINGS)
def test_each_teacher_gets_the_rows_that_name_it(padding):
    collator = three_teachers(padding=padding)
    batch = collator(ROUTED)
    got = {"chat": [0, 2, 3], "lossy": [0, 3], "plain": [0, 1, 2, 3]}
    for k, name in enumerate(NAMES):
        alone = SpanCollator(collator.aligners[k], padding=padding)
        teacher = batch["teachers"][k]
        rows = [{**ROUTED[i], "teacher": None} for i in got[name]]
        expected = alone(rows)["teachers"][0]
        assert sequences(teacher) == sequences(expected)
        assert teacher["span_offsets"].tolist() == expected["span_offsets"].tolist()
        assert teacher["teacher_spans"].tolist() == expected["teacher_spans"].tolist()
        tokenizer = collator.aligners[k].teacher_tokenizer
        if name != "lossy":
            left, right = both_sides(tiny.student_tokenizer(), tokenizer, batch, k)
            assert left == right
        # The student's spans lie in the rows that the teacher got.
        starts = rows_of(batch)
        offsets = teacher["span_offsets"].tolist()
        for place, i in enumerate(got[name]):
            own = teacher["student_spans"][offsets[place] : offsets[place + 1]]
            if len(own):
                assert starts[i] <= own.min()
                assert own.max() <= starts[i + 1]


def rows_of(batch):
    """The flattened row at which each sequence of the student begins, and the end."""
    if "position_ids" in batch:
        total = batch["input_ids"].numel()
        return [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), total]
    rows, width = batch["input_ids"].shape
    return [i * width for i in range(rows + 1)]


def test_coverage_is_the_mean_over_a_rows_teachers():
    chinese = tiny.ROWS[4]  # the lossy tokenizer covers none of it
    rows = [chinese, chinese | {"teacher": "lossy"}, chinese | {"teacher": ["lossy", "chat"]}]
    assert three_teachers()(rows)["coverage"].tolist() == pytest.approx([2 / 3, 0, 1 / 2])


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_teacher_without_rows(padding):
    batch = three_teachers(padding=padding)([tiny.ROWS[0] | {"teacher": "plain"}])
    for teacher in batch["teachers"][:2]:
        assert teacher["input_ids"].numel() == 0
        assert len(teacher["input_ids"]) == (1 if padding == "free" else 0)
        assert teacher["span_offsets"].tolist() == [0]
        assert teacher["student_spans"].shape == teacher["teacher_spans"].shape == (0, 2)
        assert all(x.dtype == torch.int64 for x in teacher.values())


def test_teachers_are_numbered_where_they_have_no_names():
    collator = SpanCollator([tiny.collator().aligner] * 2)
    assert collator.teacher_names == ["0", "1"]
    batch = collator([tiny.ROWS[0] | {"teacher": "1"}])
    assert [len(teacher["input_ids"]) for teacher in batch["teachers"]] == [0, 1]


def test_a_row_for_a_teacher_that_there_is_not():
    message = r"Row 1 of the batch: 'teacher' names 'x', and the teachers are \['chat', 'lossy'"
    with pytest.raises(ValueError, match=message):
        three_teachers()([ROW, ROW | {"teacher": ["chat", "x"]}])
    with pytest.raises(ValueError, match="'teacher' names nobody"):
        three_teachers()([ROW | {"teacher": []}])


def test_aligners_of_two_students():
    aligners = [
        tiny.collator().aligner,
        SpanAligner(tiny.teacher_tokenizer(), tiny.student_tokenizer()),
    ]
    with pytest.raises(ValueError, match="Aligner 1 has another student tokenizer"):
        SpanCollator(aligners)
    with pytest.raises(ValueError, match="needs an aligner"):
        SpanCollator([])


# --- workers ---


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_workers_make_the_same_batches(start):
    rows = [*ROUTED, CONVERSATION]
    collator = three_teachers(padding="left")
    here = [collator(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    loader = DataLoader(
        rows,
        batch_size=2,
        num_workers=2 if start == "fork" else 1,
        collate_fn=collator,
        multiprocessing_context=start,
    )
    assert all(same(a, b) for a, b in zip(here, loader, strict=True))


def test_a_pickled_collator_makes_the_same_batch():
    collator = three_teachers(padding="free", train_turns="last")
    collator(ROUTED)
    copied = pickle.loads(pickle.dumps(collator))
    assert same(copied([*ROUTED, CONVERSATION]), collator([*ROUTED, CONVERSATION]))
