"""Rows from a file, and the batches that the collator makes of them."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sra import SpanAligner, SpanCollator, bits_per_byte, load_rows
from sra.data import IGNORED, check_coverage
from tests import real_tokenizers, tiny

ROW = {"prompt": "p", "completion": "c"}
GOOD = json.dumps(ROW)


# --- the file ---


def test_rows_are_read_in_order(tmp_path):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.ROWS)
    assert load_rows(path) == tiny.ROWS
    assert load_rows(str(path)) == tiny.ROWS


def test_blank_lines_and_other_keys_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{GOOD}\r\n  \n{json.dumps(ROW | {'id': 7})}")
    assert load_rows(path) == [ROW, ROW]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "not JSON"),
        ('{"prompt": "a", "completion": "b"', "not JSON"),
        ('["a", "b"]', "expected an object with a prompt and a completion, got"),
        ('"text"', "expected an object"),
        ("null", "expected an object"),
        ('{"prompt": "a"}', "there is no 'completion', only prompt"),
        ('{"completion": "b"}', "there is no 'prompt', only completion"),
        ("{}", "there is no 'prompt', only nothing"),
        ('{"prompt": "a", "completion": null}', "'completion' is a NoneType; it must be a string"),
        ('{"prompt": 3, "completion": "b"}', "'prompt' is a int; it must be a string"),
        ('{"prompt": "a", "completion": ["b"]}', "'completion' is a list"),
        ('{"prompt": "a", "completion": ""}', "the completion is empty.*Remove the row"),
        ('{"prompt": "a", "completion": " \\n"}', "the completion is empty"),
    ],
)
def test_a_broken_row_names_its_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 3: .*{message}"):
        load_rows(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} holds no rows"):
        load_rows(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file\. Pass a JSONL"):
        load_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_rows(tmp_path)


# --- the batch ---


@pytest.fixture(scope="module")
def batch():
    return tiny.collator()(tiny.ROWS)


def test_shapes_and_dtypes(batch):
    rows, width = batch["input_ids"].shape
    teacher_width = batch["teacher_input_ids"].shape[1]
    spans = len(batch["student_spans"])
    assert rows == len(tiny.ROWS)
    assert {name: (*x.shape,) for name, x in batch.items()} == {
        "input_ids": (rows, width),
        "attention_mask": (rows, width),
        "labels": (rows, width),
        "teacher_input_ids": (rows, teacher_width),
        "teacher_attention_mask": (rows, teacher_width),
        "student_spans": (spans, 2),
        "teacher_spans": (spans, 2),
        "span_offsets": (rows + 1,),
        "coverage": (rows,),
    }
    for name, x in batch.items():
        assert x.dtype == (torch.float32 if name == "coverage" else torch.int64), name
    # No wider than the longest row.
    assert batch["attention_mask"].sum(1).max() == width
    assert batch["teacher_attention_mask"].sum(1).max() == teacher_width


def test_each_side_sees_its_own_rendering(batch):
    student, teacher = tiny.student_tokenizer(), tiny.teacher_tokenizer()
    for i, row in enumerate(tiny.ROWS):
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert student.decode(ids) == f"{row['prompt']}\n{row['completion']}</s>"
        ids = batch["teacher_input_ids"][i][batch["teacher_attention_mask"][i].bool()]
        assert teacher.decode(ids) == (
            f"<|begin|>user\n{row['prompt']}<|end|>\n<|begin|>assistant\n{row['completion']}<|end|>"
        )


def test_padding_is_on_the_right_with_the_pad_token(batch):
    for prefix, tokenizer in (
        ("", tiny.student_tokenizer()),
        ("teacher_", tiny.teacher_tokenizer()),
    ):
        mask = batch[f"{prefix}attention_mask"]
        assert (mask.diff(dim=1) <= 0).all()
        assert (batch[f"{prefix}input_ids"][mask == 0] == tokenizer.pad_token_id).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_labels_are_the_completion_and_the_end_alone(batch):
    tokenizer = tiny.student_tokenizer()
    for i, row in enumerate(tiny.ROWS):
        labels = batch["labels"][i]
        learnt = labels[labels != IGNORED]
        assert tokenizer.decode(learnt) == row["completion"] + tokenizer.eos_token
        assert learnt[-1] == tokenizer.eos_token_id
        assert torch.equal(learnt, batch["input_ids"][i][labels != IGNORED])


def test_spans_increase_and_stay_inside_their_rows(batch):
    offsets = batch["span_offsets"]
    assert offsets[0] == 0
    assert offsets[-1] == len(batch["student_spans"])
    assert (offsets.diff() > 0).all()
    for name, side in (("student_spans", ""), ("teacher_spans", "teacher_")):
        spans, mask = batch[name], batch[f"{side}attention_mask"].flatten().bool()
        width = batch[f"{side}input_ids"].shape[1]
        assert (spans[:, 0] < spans[:, 1]).all()
        assert (spans.diff(dim=0) >= 0).all()
        for i in range(len(tiny.ROWS)):
            own = spans[offsets[i] : offsets[i + 1]]
            assert own.min() >= i * width
            assert own.max() <= (i + 1) * width
            assert all(mask[a:b].all() for a, b in own.tolist())
        if side == "":
            labels = batch["labels"].flatten()
            assert all((labels[a:b] != IGNORED).all() for a, b in spans.tolist())


def decoded(tokenizer, ids, spans):
    """Each span's text; the tokenizers here are byte-level, so pieces of characters decode too."""
    backend = tokenizer.backend_tokenizer
    return [
        "".join(backend.id_to_token(i) for i in ids.flatten()[a:b].tolist())
        for a, b in spans.tolist()
    ]


def test_both_sides_of_a_span_spell_the_same_bytes(batch):
    student = decoded(tiny.student_tokenizer(), batch["input_ids"], batch["student_spans"])
    teacher = decoded(tiny.teacher_tokenizer(), batch["teacher_input_ids"], batch["teacher_spans"])
    assert student == teacher
    assert len(student) > 60
    assert any(len(text) > 3 for text in student)


def test_spans_of_real_tokenizers_spell_the_same_text():
    """Qwen's vocabulary beside GPT-2's, with texts of several scripts."""
    sides = [
        PreTrainedTokenizerFast(
            tokenizer_object=real_tokenizers.load(name), eos_token="<|endoftext|>"
        )
        for name in ("gpt2", "qwen")
    ]
    batch = SpanCollator(SpanAligner(*sides))(tiny.ROWS)
    student = decoded(sides[0], batch["input_ids"], batch["student_spans"])
    teacher = decoded(sides[1], batch["teacher_input_ids"], batch["teacher_spans"])
    assert student == teacher
    assert len(student) > 60


@pytest.mark.parametrize("student_limit", range(18, 40, 3))
def test_truncation_drops_spans_and_shifts_none(student_limit):
    """The same rows at every width: what is left is the beginning of what there was."""
    whole = tiny.collator(1000)
    rows = [tiny.ROWS[i] for i in (0, 3, 5, 6)]
    for row in rows:
        full, cut = whole.table(row), tiny.collator(student_limit).table(row)
        assert np.array_equal(cut.student_ids, full.student_ids[:student_limit])
        assert np.array_equal(cut.teacher_ids, full.teacher_ids[:student_limit])
        left = len(cut)
        assert np.array_equal(cut.student, full.student[:left])
        assert np.array_equal(cut.teacher, full.teacher[:left])
        # None that fits on both sides was dropped.
        fits = (full.student[:, 1] <= student_limit) & (full.teacher[:, 1] <= student_limit)
        assert left == fits.sum()


def test_a_truncated_batch_still_spells_the_same():
    rows = [tiny.ROWS[i] for i in (0, 3, 5, 6)]
    batch = tiny.collator(32)(rows)
    assert batch["input_ids"].shape[1] == batch["teacher_input_ids"].shape[1] == 32
    student = decoded(tiny.student_tokenizer(), batch["input_ids"], batch["student_spans"])
    teacher = decoded(tiny.teacher_tokenizer(), batch["teacher_input_ids"], batch["teacher_spans"])
    assert student == teacher
    assert 0 < len(student) < len(tiny.collator()(rows)["student_spans"])


def test_a_row_in_a_batch_is_the_row_alone(batch):
    for i, row in enumerate(tiny.ROWS):
        alone = tiny.collator()([row])
        own = slice(batch["span_offsets"][i], batch["span_offsets"][i + 1])
        width, teacher_width = batch["input_ids"].shape[1], batch["teacher_input_ids"].shape[1]
        assert torch.equal(batch["student_spans"][own] - i * width, alone["student_spans"])
        assert torch.equal(batch["teacher_spans"][own] - i * teacher_width, alone["teacher_spans"])
        real = batch["attention_mask"][i].bool()
        assert torch.equal(batch["input_ids"][i][real], alone["input_ids"][0])
        assert torch.equal(batch["labels"][i][real], alone["labels"][0])


def test_a_prompt_that_fills_max_length():
    rows = [tiny.ROWS[0], {"prompt": "a long one " * 40, "completion": "short"}]
    with pytest.raises(ValueError, match=r"Row 1 .*'a long one .*max_length = 64\. Raise max_leng"):
        tiny.collator(64)(rows)


def test_a_broken_row_in_a_batch():
    with pytest.raises(ValueError, match="Row 1 of the batch: there is no 'completion'"):
        tiny.collator()([tiny.ROWS[0], {"prompt": "x"}])


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\\ud800?", "completion": "caf\xe9 \\udc00 ok"}\n')
    rows = load_rows(path)
    assert rows == [{"prompt": "\ufffd?", "completion": "caf\ufffd \ufffd ok"}]
    assert math.isfinite(bits_per_byte(tiny.student_model(), tiny.student_tokenizer(), rows))


def test_lone_surrogates_do_not_stop_a_batch():
    batch = tiny.collator()([{"prompt": "\ud800?", "completion": "caf\udce9 ok"}])
    student = decoded(tiny.student_tokenizer(), batch["input_ids"], batch["student_spans"])
    teacher = decoded(tiny.teacher_tokenizer(), batch["teacher_input_ids"], batch["teacher_spans"])
    assert student == teacher
    assert batch["coverage"].item() == 1.0


# --- coverage ---


def test_full_coverage():
    assert check_coverage(tiny.ROWS, tiny.collator(), 0.9) == pytest.approx(1, abs=0.01)


def lossy_collator():
    return SpanCollator(SpanAligner(tiny.student_tokenizer(), tiny.lossy_tokenizer()))


def test_coverage_is_by_bytes_of_the_completions():
    rows = [tiny.ROWS[0], tiny.ROWS[4]]  # covered whole; not at all
    sizes = [len(row["completion"].encode()) for row in rows]
    coverage = check_coverage(rows, lossy_collator(), 0.5)
    assert coverage == pytest.approx(sizes[0] / sum(sizes))


def test_too_little_coverage_names_the_worst_row():
    message = (
        r"Alignment covers 54\.7% of the completions' bytes \(minimum 90%\)\. Worst is row 1 with "
        r"0\.0%: '我很好，谢谢你。'\. .*`sra align`.*lower min_coverage"
    )
    with pytest.raises(ValueError, match=message):
        check_coverage([tiny.ROWS[0], tiny.ROWS[4]], lossy_collator(), 0.9)


def test_coverage_check_names_a_broken_row():
    with pytest.raises(ValueError, match="Row 2: the completion is empty"):
        check_coverage([ROW, ROW, ROW | {"completion": ""}], tiny.collator(), 0.9)


def test_coverage_check_finds_a_row_without_room_for_its_completion():
    rows = [tiny.ROWS[0], {"prompt": "a long one " * 40, "completion": "short"}]
    with pytest.raises(ValueError, match=r"Row 1 .*max_length = 64"):
        check_coverage(rows, tiny.collator(64), 0.9)
