"""Rows: what a row must hold, and how files and datasets of them are read."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from sra.token_bytes import clean_text

IGNORED = -100

KINDS = (
    '{"prompt": ..., "completion": ...}, {"messages": [{"role": ..., "content": ...}, ...]} or '
    '{"text": ...}'
)
_KEYS = {
    "messages": ("messages", "tools", "teacher"),
    "completion": ("prompt", "completion", "teacher"),
    "text": ("text", "teacher"),
}
# What other data sets call these keys.
_OTHER_NAMES = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "completion": ("response", "output", "answer", "target", "chosen", "reply", "label"),
    "prompt": ("instruction", "question", "query", "input", "source", "context"),
    "text": ("content", "document", "body", "raw_content", "passage"),
}
_ANSWERING = ("gpt", "model", "bot", "ai", "chatbot")


def check_row(row: Any, where: str) -> None:
    """Raise unless `row` is a prompt and a completion, messages, or a text, with words to learn.

    Raises:
        ValueError: with `where`, and what to change.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object, one of {KINDS}, got {row!r:.80}.")
    teacher = row.get("teacher")
    if teacher is not None and not isinstance(teacher, str) and not _strings(teacher):
        raise ValueError(
            f"{where}: 'teacher' is {teacher!r:.80}; it must be a teacher's name or a list of them."
        )
    if row.get("messages") is not None:
        _check_messages(row["messages"], where)
        _check_tools(row.get("tools"), where)
    elif row.get("text") is not None and row.get("completion") is None:
        _check_string(row, "text", where)
    else:
        for key in ("prompt", "completion"):
            if key not in row:
                raise ValueError(f"{where}: {_missing(row, key)} Each row needs {KINDS}.")
            _check_string(row, key, where)


def _check_string(row: Mapping[str, Any], key: str, where: str) -> None:
    value = row[key]
    if not isinstance(value, str):
        turns = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
        raise ValueError(
            f"{where}: {key!r} is a {type(value).__name__}; it must be a string."
            + (' Put a conversation into one list: {"messages": prompt + completion}.' * turns)
        )
    if key != "prompt" and not value.strip():
        raise ValueError(
            f"{where}: the {key} is empty, so there is nothing to learn. Remove the row."
        )


def _missing(row: Mapping[str, Any], key: str) -> str:
    """Says which key a row lacks, and which of its keys is probably meant for it."""
    only = ", ".join(map(str, row)) or "nothing"
    names = [str(name) for name in row if name not in ("prompt", "completion", "teacher")]
    near = {
        wanted: [name for name in names if name.lower() in (wanted, *others)]
        or difflib.get_close_matches(wanted, names, 1, 0.8)
        for wanted, others in _OTHER_NAMES.items()
    }
    # A row that holds a prompt, or something that looks like one, is no lone text.
    kinds = [key] if "prompt" in row or "completion" in row else ["messages", "completion", "text"]
    wanted = next((kind for kind in kinds if near[kind]), key)
    hints = [f"Rename {name!r} to {wanted!r}." for name in near[wanted][:1]]
    if wanted == "completion" and "prompt" not in row:
        hints = [f"Rename {name!r} to 'prompt'." for name in near["prompt"][:1]] + hints
    return " ".join([f"there is no {wanted!r}, only {only}.", *hints])


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            f"{where}: 'messages' is {messages!r:.80}; it must be a list of at least one "
            '{"role": ..., "content": ...}.'
        )
    learnt = False
    for number, message in enumerate(messages):
        place = f"{where}: message {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{place} is {message!r:.80}; it must be an object.")
        if not isinstance(message.get("role"), str):
            hint = ' Write {"role": ..., "content": ...} for {"from": ..., "value": ...}.'
            raise ValueError(
                f"{place} has no 'role', only {', '.join(map(str, message)) or 'nothing'}."
                + hint * ("from" in message)
            )
        content, calls = message.get("content"), message.get("tool_calls") or []
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise ValueError(f"{place}: 'tool_calls' is {calls!r:.80}; it must be a list.")
        if not isinstance(content, str) and not (content is None and calls):
            parts = " Join the texts of its parts." * isinstance(content, list)
            raise ValueError(
                f"{place} ({message['role']}): 'content' is {content!r:.40}; it must be a string."
                + parts
            )
        learnt |= message["role"] == "assistant" and bool(calls or (content or "").strip())
    if not learnt:
        roles = [message["role"] for message in messages]
        other = next((role for role in roles if role.lower() in _ANSWERING), None)
        hint = f"Rename the role {other!r} to 'assistant'." if other else "Remove the row."
        raise ValueError(
            f"{where}: no message of the assistant has content (roles: {', '.join(roles)}), so "
            f"there is nothing to learn. {hint}"
        )


def _check_tools(tools: Any, where: str) -> None:
    try:
        value = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError:
        value = tools
    if value is not None and (not isinstance(value, Sequence) or isinstance(value, str)):
        raise ValueError(
            f"{where}: 'tools' is {tools!r:.80}; it must be a list of JSON schemas, or that list "
            "as a JSON string."
        )


def snippet(row: Mapping[str, Any]) -> str:
    """The first 60 characters of a row, to tell it from others."""
    if row.get("messages") is not None:
        texts = (message.get("content") for message in row["messages"])
        return next((text for text in texts if text), "")[:60]
    return (row["text"] if row.get("completion") is None else row["prompt"])[:60]


def load_rows(source: Any) -> Sequence[Mapping[str, Any]]:
    """Rows of a JSONL file, one a line; of a folder that `datasets` saved; or of a dataset.

    A line is ``{"prompt": str, "completion": str}``, ``{"messages": [{"role": str, "content": str},
    ...], "tools": [...]}`` or ``{"text": str}``, and may hold a ``"teacher"`` (see
    `SpanCollator`). What is no text (bytes that are not UTF-8, lone surrogates) becomes U+FFFD. A
    dataset comes back as it is, each of its rows checked.

    Args:
        source: a path, or a sequence of rows, e.g. a `datasets.Dataset`.

    Raises:
        FileNotFoundError, ValueError: with the file and the line, or the row.
        ImportError: a saved dataset, without the package `datasets`.
    """
    if not isinstance(source, (str, Path)):
        return _checked_dataset(source, "The dataset")
    path = Path(source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        if importlib.util.find_spec("datasets") is None:
            raise ImportError(f"{path} is a saved dataset. To read it: pip install datasets")
        from datasets import load_from_disk

        return _checked_dataset(load_from_disk(str(path)), str(path))
    return [clean_row(row, where) for where, row in parsed_lines(path)]


def _checked_dataset(dataset: Any, name: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(dataset, Mapping):
        splits = [f"[{split!r}]" for split in dataset]
        raise ValueError(f"{name} holds several splits. Pass one of them: {', '.join(splits)}.")
    for number, row in enumerate(dataset):
        check_row(row, f"Row {number}" if name == "The dataset" else f"{name}, row {number}")
    if not len(dataset):
        raise ValueError(f"{name} holds no rows.")
    return dataset


class RowStream(IterableDataset):
    """Rows of a JSONL file, read when they are asked for; see `stream_rows`."""

    def __init__(self, path: str | Path, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}.")
        self.path, self.rank, self.world_size = Path(path), rank, world_size
        next(iter(self._own(0, 1, whole=False)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return self._own(index, count, whole=True)

    def _own(self, worker: int, workers: int, *, whole: bool) -> Iterator[dict[str, Any]]:
        """`whole`: leave out the last rows that are too few for all ranks."""
        group: list[tuple[str, str]] = []
        for number, line in enumerate(_lines(self.path), start=1):
            group.append(line)
            if len(group) < self.world_size and whole:
                continue
            if (number - 1) // self.world_size % workers == worker:
                where, text = group[self.rank if whole else 0]
                yield clean_row(_parse(where, text), where)
            group = []


class Passes(IterableDataset):
    """A stream, pass after pass, so that a resumed run skips what was read in all of them."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        number = 1
        while number:  # else a data worker has no share
            number = 0
            for number, row in enumerate(self.rows, start=1):  # noqa: B007
                yield row


def stream_rows(path: str | Path, *, rank: int = 0, world_size: int = 1) -> RowStream:
    """The rows of a JSONL file (as `load_rows` reads them) without holding the file in memory.

    An `IterableDataset` for a `DataLoader`; data workers share the rows out among themselves. It
    keeps the file's order, so shuffle the file. The first row is checked at once, the others when
    they are reached.

    Args:
        path: a JSONL file.
        rank, world_size: of this process, in a loop of your own with several: each reads every
            `world_size`-th row, all of them equally many. Leave them out under Accelerate and
            `transformers.Trainer`, which share out the batches themselves.

    Raises:
        FileNotFoundError, ValueError: with the file and the line.
    """
    return RowStream(path, rank, world_size)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where each line with something on it stands, and the line; ValueError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Pass a JSONL file of rows, each one of {KINDS}."
        )
    empty = True
    with path.open(encoding="utf-8-sig", errors="replace") as lines:  # some editors write a mark
        for number, line in enumerate(lines, start=1):
            if line.strip():
                empty = False
                yield f"{path}, line {number}", line
    if empty:
        raise ValueError(f"{path} holds no rows. Write one JSON object a line.")


def _parse(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}). Write one object a line.") from None


def parsed_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line of a JSONL file stands, and what it holds, for `clean_row`.

    Raises:
        FileNotFoundError, ValueError: with the file and the line.
    """
    return ((where, _parse(where, line)) for where, line in _lines(path))


def clean_row(row: Any, where: str) -> dict[str, Any]:
    """The keys that this kind of row has; `check_row` first, and what is no text as U+FFFD."""
    check_row(row, where)
    kind = next(kind for kind in _KEYS if row.get(kind) is not None)
    return {key: _clean(row[key]) for key in _KEYS[kind] if row.get(key) is not None}


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {name: _clean(x) for name, x in value.items()}
    return [_clean(x) for x in value] if isinstance(value, list) else value


def _strings(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(name, str) for name in value)
