"""Rows: what a row must hold, and reading them from files, streams and datasets."""

from __future__ import annotations

import json
import math
import re

import pytest
from torch.utils.data import DataLoader

from sra import bits_per_byte, load_rows
from sra.data import check_row, stream_rows
from tests import tiny

ROW = {"prompt": "p", "completion": "c"}
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
GOOD = json.dumps(ROW)


def talk(*messages, **others):
    return {"messages": [dict(zip(("role", "content"), m, strict=True)) for m in messages]} | others


# --- one row ---


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        ROW | {"prompt": ""},
        ROW | {"text": "beside it", "messages": None, "id": 7},
        TALK,
        talk(("system", ""), ("user", "q"), ("assistant", "a"), ("user", "r")),
        talk(("user", "q"), ("assistant", "a"), tools=None),
        TALK | {"tools": [{"type": "function"}]},
        TALK | {"tools": "[]"},
        TALK | {"prompt": "its name", "text": None},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": CALLS}]},
        {"messages": [{"role": "assistant", "tool_calls": CALLS}]},
        {"text": "t"},
        {"text": "t", "completion": None},
        ROW | {"teacher": "a"},
        ROW | {"teacher": ["a", "b"]},
        ROW | {"teacher": None},
    ],
)
def test_rows_of_every_kind_pass(row):
    check_row(row, "here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "there is no 'completion', only prompt. Each row needs"),
        ({"completion": "b"}, "there is no 'prompt', only completion. Each row needs"),
        ({}, "there is no 'prompt', only nothing"),
        ({"prompt": "a", "response": "b"}, "no 'completion'.*Rename 'response' to 'completion'"),
        ({"prompt": "a", "completions": "b"}, "Rename 'completions' to 'completion'"),
        ({"prompt": "a", "Completion": "b"}, "Rename 'Completion' to 'completion'"),
        (
            {"instruction": "a", "input": "", "output": "b"},
            "no 'completion'.*Rename 'instruction' to 'prompt'. Rename 'output' to 'completion'",
        ),
        ({"question": "a", "completion": "b"}, "no 'prompt'.*Rename 'question' to 'prompt'"),
        ({"conversations": []}, "no 'messages'.*Rename 'conversations' to 'messages'"),
        ({"mesages": []}, "Rename 'mesages' to 'messages'"),
        ({"content": "a"}, "no 'text'.*Rename 'content' to 'text'"),
        (
            {"prompt": [{"role": "user"}], "completion": "b"},
            r"'prompt' is a list; it must be a string\. Put a conversation into one list",
        ),
        ({"prompt": 3, "completion": "b"}, "'prompt' is a int; it must be a string"),
        ({"text": 3}, "'text' is a int; it must be a string"),
        ({"text": " \n"}, "the text is empty, so there is nothing to learn"),
        ({"messages": []}, r"'messages' is \[\]; it must be a list of at least one"),
        ({"messages": "hi"}, "'messages' is 'hi'; it must be a list"),
        ({"messages": ["hi"]}, "message 0 is 'hi'; it must be an object"),
        (
            {"messages": [{"from": "human", "value": "q"}]},
            r'message 0 has no \'role\', only from, value\. Write {"role": ..., "content"',
        ),
        (talk(("user", 3)), r"message 0 \(user\): 'content' is 3; it must be a string"),
        (talk(("user", None)), "'content' is None; it must be a string"),
        (talk(("user", [{"type": "text"}])), "must be a string. Join the texts of its parts"),
        (talk(("user", "q")), r"no message of the assistant has content \(roles: user\)"),
        (talk(("user", "q"), ("assistant", " ")), "there is nothing to learn. Remove the row"),
        (talk(("user", "q"), ("gpt", "a")), "Rename the role 'gpt' to 'assistant'"),
        ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "'tool_calls' is 'f'"),
        (TALK | {"tools": "weather"}, "'tools' is 'weather'; it must be a list of JSON schemas"),
        (TALK | {"tools": {"type": "function"}}, "'tools' is .*must be a list"),
        (ROW | {"teacher": 3}, "'teacher' is 3; it must be a teacher's name or a list"),
    ],
)
def test_a_broken_row_says_what_to_change(row, message):
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        check_row(row, "here")


# --- the file ---


def test_rows_are_read_in_order(tmp_path):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.ROWS)
    assert load_rows(path) == tiny.ROWS
    assert load_rows(str(path)) == tiny.ROWS


def test_rows_of_every_kind_in_one_file(tmp_path):
    rows = [ROW, TALK | {"tools": [{"a": [1, None]}]}, {"text": "t"}, ROW | {"teacher": ["x"]}]
    assert load_rows(tiny.write_jsonl(tmp_path / "rows.jsonl", rows)) == rows


def test_blank_lines_and_other_keys_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{GOOD}\r\n  \n{json.dumps(ROW | {'id': 7, 'text': None})}")
    assert load_rows(path) == [ROW, ROW]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "not JSON"),
        ('{"prompt": "a", "completion": "b"', "not JSON"),
        ('["a", "b"]', 'expected an object, one of {"prompt": ..., "completion": ...}.*, got'),
        ('"text"', "expected an object"),
        ("null", "expected an object"),
        ('{"prompt": "a"}', "there is no 'completion', only prompt"),
        ('{"prompt": "a", "completion": null}', "'completion' is a NoneType; it must be a string"),
        ('{"prompt": "a", "completion": ["b"]}', "'completion' is a list"),
        ('{"prompt": "a", "completion": ""}', "the completion is empty.*Remove the row"),
        ('{"prompt": "a", "completion": " \\n"}', "the completion is empty"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "no message of the assistant"),
    ],
)
def test_a_broken_row_names_its_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    for read in (load_rows, lambda path: list(stream_rows(path))):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 3: .*{message}"):
            read(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    for read in (load_rows, stream_rows):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} holds no rows"):
            read(path)


def test_a_missing_file(tmp_path):
    for read in (load_rows, stream_rows):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file\. Pass a JSONL"):
            read(tmp_path / "nowhere.jsonl")
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\\ud800?", "completion": "caf\xe9 \\udc00 ok"}\n')
    rows = load_rows(path)
    assert rows == [{"prompt": "\ufffd?", "completion": "caf\ufffd \ufffd ok"}]
    assert math.isfinite(bits_per_byte(tiny.student_model(), tiny.student_tokenizer(), rows))
    path.write_text('{"messages": [{"role": "assistant", "content": "\\udc00", "x": ["\\ud800"]}]}')
    assert load_rows(path) == [
        {"messages": [{"role": "assistant", "content": "\ufffd", "x": ["\ufffd"]}]}
    ]


# --- streams ---


def numbered(tmp_path, count):
    rows = [{"prompt": "p", "completion": str(i)} for i in range(count)]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))  # lines are not rows
    return path


def numbers(rows):
    return [int(row["completion"]) for row in rows]


def test_a_stream_gives_the_rows_of_the_file_again_and_again(tmp_path):
    stream = stream_rows(numbered(tmp_path, 7))
    assert numbers(stream) == numbers(stream) == [*range(7)]
    assert next(iter(stream)) == {"prompt": "p", "completion": "0"}


def test_a_stream_never_holds_the_file(tmp_path):
    """It reads on only as far as it is asked to: what comes later may be broken, or very long."""
    path = numbered(tmp_path, 3)
    path.write_text(path.read_text() + "broken\n" + "x" * 1_000_000)
    rows = iter(stream_rows(path))
    assert numbers([next(rows), next(rows), next(rows)]) == [0, 1, 2]
    with pytest.raises(ValueError, match="line 8: not JSON"):
        next(rows)


def test_a_stream_looks_at_its_first_row_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    for world in (1, 3):
        with pytest.raises(ValueError, match="line 1: there is no 'completion'"):
            stream_rows(path, world_size=world)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_data_workers_share_a_stream(tmp_path, workers):
    stream = stream_rows(numbered(tmp_path, 11))
    loader = DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=numbers)
    batches = list(loader)
    assert sorted(i for batch in batches for i in batch) == [*range(11)]
    assert batches == list(loader)


def test_ranks_share_a_stream_evenly(tmp_path):
    path = numbered(tmp_path, 11)
    seen = [numbers(stream_rows(path, rank=rank, world_size=3)) for rank in range(3)]
    assert seen == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]  # 9 and 10 are too few for three
    loader = DataLoader(stream_rows(path, rank=1, world_size=3), num_workers=2, batch_size=None)
    assert numbers(loader) == [1, 4, 7]


def test_a_rank_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size = 2\), got 2"):
        stream_rows(numbered(tmp_path, 2), rank=2, world_size=2)


# --- datasets ---


def test_a_sequence_of_rows_comes_back_checked():
    assert load_rows(tiny.ROWS) is tiny.ROWS
    with pytest.raises(ValueError, match=r"^Row 1: there is no 'completion'"):
        load_rows([ROW, {"prompt": "a"}])
    with pytest.raises(ValueError, match="The dataset holds no rows"):
        load_rows([])


def test_datasets_of_the_datasets_package(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    rows = [TALK, talk(("system", "s"), ("user", "q"), ("assistant", "a"))]
    # Arrow gives every message every key.
    rows[0]["messages"][1]["name"] = "x"
    dataset = datasets.Dataset.from_list(rows)
    assert dataset[1]["messages"][0] == {"role": "system", "content": "s", "name": None}
    assert load_rows(dataset) is dataset
    alone = tiny.collator()(rows)
    batch = tiny.collator()([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == alone["input_ids"].tolist()
    loaded = next(iter(DataLoader(dataset, batch_size=2, collate_fn=tiny.collator())))
    assert loaded["labels"].tolist() == alone["labels"].tolist()

    dataset.save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved")[1] == dataset[1]
    splits = datasets.DatasetDict({"train": dataset, "test": dataset})
    with pytest.raises(ValueError, match=r"several splits.*\['train'\], \['test'\]"):
        load_rows(splits)
    broken = datasets.Dataset.from_list([ROW, {"prompt": "a", "completion": ""}])
    broken.save_to_disk(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"broken, row 1: the completion is empty"):
        load_rows(tmp_path / "broken")
