"""Batches: what the collator makes of rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from batches import CONVERSATION, PADDINGS, ROW, both_sides, sequences

from sra import SpanAligner, SpanCollator, count_items
from sra.collator import check_coverage
from sra.data import IGNORED
from tests import tiny
from tests.chat import chat_templates

LONG = {"prompt": "a long one " * 40, "completion": "short"}


@pytest.fixture(scope="module")
def batch():
    return tiny.collator()(tiny.ROWS)


# --- layout ---


def test_shapes_and_dtypes(batch):
    rows, width = batch["input_ids"].shape
    (teacher,) = batch["teachers"]
    teacher_width = teacher["input_ids"].shape[1]
    spans = len(teacher["student_spans"])
    assert rows == len(tiny.ROWS)
    assert {name: (*x.shape,) for name, x in batch.items() if name != "teachers"} == {
        "input_ids": (rows, width),
        "attention_mask": (rows, width),
        "labels": (rows, width),
        "num_bytes": (rows,),
        "coverage": (rows,),
    }
    assert {name: (*x.shape,) for name, x in teacher.items()} == {
        "input_ids": (rows, teacher_width),
        "attention_mask": (rows, teacher_width),
        "student_spans": (spans, 2),
        "teacher_spans": (spans, 2),
        "span_offsets": (rows + 1,),
        "labelled": (rows,),
    }
    for name, x in (batch | teacher).items():
        if name != "teachers":
            assert x.dtype == (torch.float32 if name == "coverage" else torch.int64), name
    # No wider than the longest row.
    assert batch["attention_mask"].sum(1).max() == width
    assert teacher["attention_mask"].sum(1).max() == teacher_width


def test_each_side_sees_its_own_rendering(batch):
    student, teacher = tiny.student_tokenizer(), tiny.teacher_tokenizer()
    for row, ids, teacher_ids in zip(
        tiny.ROWS, sequences(batch), sequences(batch["teachers"][0]), strict=True
    ):
        assert student.decode(ids) == f"{row['prompt']}\n{row['completion']}</s>"
        assert teacher.decode(teacher_ids) == (
            f"<|begin|>user\n{row['prompt']}<|end|>\n<|begin|>assistant\n{row['completion']}<|end|>"
        )


def test_labels_are_the_completion_and_the_end_alone(batch):
    tokenizer = tiny.student_tokenizer()
    for i, row in enumerate(tiny.ROWS):
        labels = batch["labels"][i]
        learnt = labels[labels != IGNORED]
        assert tokenizer.decode(learnt) == row["completion"] + tokenizer.eos_token
        assert learnt[-1] == tokenizer.eos_token_id
        assert torch.equal(learnt, batch["input_ids"][i][labels != IGNORED])
        assert batch["num_bytes"][i] == len(row["completion"].encode())


def test_spans_increase_and_stay_inside_their_rows(batch):
    teacher = batch["teachers"][0]
    offsets = teacher["span_offsets"]
    assert offsets[0] == 0
    assert offsets[-1] == len(teacher["student_spans"])
    assert (offsets.diff() > 0).all()
    for name, side in (("student_spans", batch), ("teacher_spans", teacher)):
        spans, mask = teacher[name], side["attention_mask"].flatten().bool()
        width = side["input_ids"].shape[1]
        assert (spans[:, 0] < spans[:, 1]).all()
        assert (spans.diff(dim=0) >= 0).all()
        for i in range(len(tiny.ROWS)):
            own = spans[offsets[i] : offsets[i + 1]]
            assert own.min() >= i * width
            assert own.max() <= (i + 1) * width
            assert all(mask[a:b].all() for a, b in own.tolist())
    labels = batch["labels"].flatten()
    assert all((labels[a:b] != IGNORED).all() for a, b in teacher["student_spans"].tolist())


def test_both_sides_of_a_span_spell_the_same_bytes(batch):
    student, teacher = both_sides(tiny.student_tokenizer(), tiny.teacher_tokenizer(), batch)
    assert student == teacher
    assert len(student) > 60
    assert any(len(text) > 3 for text in student)


MIXED = [
    *tiny.ROWS[:3],
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Yes, x."}]},
    {"text": "The Nile flows through Egypt."},
]


def laid_out(padding, rows=MIXED, **options):
    aligner = SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    return SpanCollator(aligner, padding=padding, **options)(rows)


@pytest.mark.parametrize("limit", [256, 24])
def test_every_padding_holds_the_same(limit):
    rows = [MIXED[i] for i in (0, 3, 4)] if limit < 100 else MIXED
    found = []
    for padding in PADDINGS:
        batch = laid_out(padding, rows, max_length=limit)
        (teacher,) = batch["teachers"]
        spans = both_sides(tiny.student_tokenizer(), tiny.teacher_tokenizer(), batch)
        assert spans[0] == spans[1]
        assert len(spans[0]) > 10
        found.append(
            (
                sequences(batch),
                sequences(batch | {"input_ids": batch["labels"]}),
                sequences(teacher),
                spans,
                teacher["span_offsets"].tolist(),
                batch["coverage"].tolist(),
                batch["num_bytes"].tolist(),
            )
        )
    assert found[0] == found[1] == found[2]


def test_padding_is_where_it_is_asked_for():
    for padding, sign in (("right", -1), ("left", 1)):
        batch = laid_out(padding)
        for side, tokenizer in (
            (batch, tiny.student_tokenizer()),
            (batch["teachers"][0], tiny.teacher_tokenizer()),
        ):
            mask = side["attention_mask"]
            assert (mask.diff(dim=1) * sign >= 0).all()
            assert (mask == 0).any()
            assert (side["input_ids"][mask == 0] == tokenizer.pad_token_id).all()
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_sequences_without_padding_are_told_apart_by_positions():
    batch = laid_out("free")
    (teacher,) = batch["teachers"]
    for side in (batch, teacher):
        assert "attention_mask" not in side
        assert side["input_ids"].shape == side["position_ids"].shape
        lengths = [len(row) for row in sequences(side)]
        assert len(lengths) == len(MIXED)
        assert side["position_ids"].tolist() == [[i for n in lengths for i in range(n)]]
    first = batch["labels"][batch["position_ids"] == 0]
    assert (first == IGNORED).all()


def test_the_first_token_of_a_text_is_predicted_by_nothing():
    row = {"text": "The Nile flows."}
    batch = laid_out("right", [row])
    labels = batch["labels"][0]
    assert labels[0] == IGNORED
    assert (labels[1:] != IGNORED).all()
    first = tiny.student_tokenizer().decode(batch["input_ids"][0, :1])
    assert batch["num_bytes"].item() == len("The Nile flows.") - len(first)


def test_widths_are_rounded_up():
    for padding in ("right", "left"):
        batch = laid_out(padding, pad_to_multiple_of=32)
        assert batch["input_ids"].shape[1] % 32 == 0
        assert batch["teachers"][0]["input_ids"].shape[1] % 32 == 0
        assert sequences(batch) == sequences(laid_out(padding))
        student, teacher = both_sides(tiny.student_tokenizer(), tiny.teacher_tokenizer(), batch)
        assert student == teacher


def test_a_row_in_a_batch_is_the_row_alone(batch):
    teacher = batch["teachers"][0]
    width, teacher_width = batch["input_ids"].shape[1], teacher["input_ids"].shape[1]
    for i, row in enumerate(tiny.ROWS):
        alone = tiny.collator()([row])
        one = alone["teachers"][0]
        own = slice(teacher["span_offsets"][i], teacher["span_offsets"][i + 1])
        assert torch.equal(teacher["student_spans"][own] - i * width, one["student_spans"])
        assert torch.equal(teacher["teacher_spans"][own] - i * teacher_width, one["teacher_spans"])
        real = batch["attention_mask"][i].bool()
        assert torch.equal(batch["input_ids"][i][real], alone["input_ids"][0])
        assert torch.equal(batch["labels"][i][real], alone["labels"][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "middle"}, "padding must be 'right', 'left' or 'free', got 'middle'"),
        ({"padding": "free", "pad_to_multiple_of": 8}, "padding='free' pads nothing"),
        ({"teacher_names": ["a", "b"]}, r"There are 1 teachers; .*got \['a', 'b'\]"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        SpanCollator(tiny.collator().aligner, **options)


# --- truncation ---


@pytest.mark.parametrize("limit", range(18, 40, 3))
def test_truncation_drops_spans_and_shifts_none(limit):
    """The same rows at every width: what is left is the beginning of what there was."""
    whole = tiny.collator(1000)
    rows = [tiny.ROWS[i] for i in (0, 3, 5, 6)]
    for row in rows:
        full, cut = whole.table(row), tiny.collator(limit).table(row)
        assert np.array_equal(cut.student_ids, full.student_ids[:limit])
        assert np.array_equal(cut.teacher_ids, full.teacher_ids[:limit])
        left = len(cut)
        assert np.array_equal(cut.student, full.student[:left])
        assert np.array_equal(cut.teacher, full.teacher[:left])
        # None that fits on both sides was dropped.
        fits = (full.student[:, 1] <= limit) & (full.teacher[:, 1] <= limit)
        assert left == fits.sum()


@pytest.mark.parametrize("limits", itertools.product((30, 47, 61), (25, 70, 95)))
def test_each_side_is_truncated_for_itself_in_any_turn(limits):
    """Every span of the whole that fits is there, at its place; no other is."""
    pair = chat_templates.tokenizer("mistral"), chat_templates.tokenizer("llama3")
    full = SpanCollator(SpanAligner(*pair)).table(CONVERSATION)
    collator = SpanCollator(SpanAligner(*pair), max_length=limits[0], teacher_max_length=limits[1])
    batch = collator([CONVERSATION])
    (teacher,) = batch["teachers"]
    assert batch["input_ids"][0].tolist() == full.student_ids[: limits[0]].tolist()
    assert teacher["input_ids"][0].tolist() == full.teacher_ids[: limits[1]].tolist()
    fits = (full.student[:, 1] <= limits[0]) & (full.teacher[:, 1] <= limits[1])
    assert teacher["student_spans"].tolist() == full.student[fits].tolist()
    assert teacher["teacher_spans"].tolist() == full.teacher[fits].tolist()
    learnt = batch["labels"][0] != IGNORED
    assert batch["labels"][0][learnt].tolist() == batch["input_ids"][0][learnt].tolist()


@pytest.mark.parametrize("padding", ["right", "left", "free"])
def test_a_prompt_that_fills_max_length_is_left_out(padding):
    """It costs one token, and goes to no teacher."""
    collator = SpanCollator(tiny.collator().aligner, max_length=64, padding=padding)
    assert collator.example(LONG, "").left_out
    assert not collator.example(tiny.ROWS[0], "").left_out
    rows = [LONG, tiny.ROWS[0], LONG, tiny.ROWS[1]]
    batch, rest = collator(rows), collator([tiny.ROWS[0], tiny.ROWS[1]])
    assert batch["num_bytes"].tolist() == [0, rest["num_bytes"][0], 0, rest["num_bytes"][1]]
    (teacher,), (other,) = batch["teachers"], rest["teachers"]
    for name in ("input_ids", "teacher_spans", "span_offsets"):
        assert torch.equal(teacher[name], other[name])
    tokens = batch.get("attention_mask", batch["input_ids"].bool()).sum()
    assert tokens == rest.get("attention_mask", rest["input_ids"].bool()).sum() + 2
    assert torch.equal(count_items([batch]), count_items([rest]))


def test_a_teacher_that_sees_only_the_prompt_gives_no_spans():
    aligner = tiny.collator().aligner
    batch = SpanCollator(aligner, max_length=500, teacher_max_length=20)([LONG])
    (teacher,) = batch["teachers"]
    assert teacher["student_spans"].shape == teacher["teacher_spans"].shape == (0, 2)
    assert teacher["span_offsets"].tolist() == [0, 0]
    assert batch["coverage"].item() == 1.0  # of what alignment can do, not of what was cut


# --- broken rows, coverage ---


def test_a_broken_row_in_a_batch():
    with pytest.raises(ValueError, match="Row 1 of the batch: there is no 'completion'"):
        tiny.collator()([tiny.ROWS[0], {"prompt": "x"}])


def test_lone_surrogates_do_not_stop_a_batch():
    row = {"prompt": "\ud800?", "completion": "caf\udce9 ok"}
    batch = tiny.collator()([row, {"text": "\ud800"}])
    student, teacher = both_sides(tiny.student_tokenizer(), tiny.teacher_tokenizer(), batch)
    assert student == teacher
    assert batch["coverage"].tolist() == [1.0, 1.0]


def test_full_coverage():
    assert check_coverage(tiny.ROWS, tiny.collator(), 0.9)[0] == pytest.approx(1, abs=0.01)
    assert check_coverage([CONVERSATION, *MIXED], tiny.collator(), 0.9) == (1, 0)


def lossy_collator():
    return SpanCollator(SpanAligner(tiny.student_tokenizer(), tiny.lossy_tokenizer()))


def test_coverage_is_by_bytes_of_the_trained_texts():
    rows = [tiny.ROWS[0], tiny.ROWS[4]]  # covered whole; not at all
    sizes = [len(row["completion"].encode()) for row in rows]
    coverage, _ = check_coverage(rows, lossy_collator(), 0.5)
    assert coverage == pytest.approx(sizes[0] / sum(sizes))


def test_too_little_coverage_shows_the_words_of_the_worst_row():
    message = (
        r"Alignment covers 54\.7% of the trained texts' bytes \(minimum 90%\)\. Worst is row 1 "
        r"with 0\.0%: '我很好，谢谢你。'\. .*`sra align`.*lower min_coverage"
    )
    with pytest.raises(ValueError, match=message):
        check_coverage([tiny.ROWS[0], tiny.ROWS[4]], lossy_collator(), 0.9)


def test_too_little_coverage_shows_where_it_begins():
    row = {"prompt": "p", "completion": "The Nile 我很好"}
    with pytest.raises(ValueError, match=r"Worst is row 0 with 44\.4%: ' 我很好'"):
        check_coverage([row], lossy_collator(), 0.9)


def test_coverage_check_names_a_broken_row():
    with pytest.raises(ValueError, match="Row 2: the completion is empty"):
        check_coverage([ROW, ROW, ROW | {"completion": ""}], tiny.collator(), 0.9)


def test_coverage_check_counts_rows_without_room_for_their_completion():
    assert check_coverage([tiny.ROWS[0], LONG, LONG], tiny.collator(64), 0.9) == (1.0, 2)
    with pytest.raises(ValueError, match=r"None of 2 rows has .*max_length = 64: .*Raise"):
        check_coverage([LONG, LONG], tiny.collator(64), 0.9)
