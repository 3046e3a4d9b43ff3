"""Rows of `prompt` and `completion`, read from a file and made into batches of both models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sra.alignment import SpanAligner, SpanTable
from sra.chat import render_prompt
from sra.token_bytes import clean_text

IGNORED = -100


def check_row(row: Any, where: str) -> None:
    """Raise unless `row` has a prompt and a completion with text in it."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where}: expected an object with a prompt and a completion, got {row!r:.80}."
        )
    for key in ("prompt", "completion"):
        if key not in row:
            raise ValueError(
                f"{where}: there is no {key!r}, only {', '.join(map(str, row)) or 'nothing'}. Each "
                'row needs {"prompt": ..., "completion": ...}.'
            )
        if not isinstance(row[key], str):
            raise ValueError(
                f"{where}: {key!r} is a {type(row[key]).__name__}; it must be a string."
            )
    if not row["completion"].strip():
        raise ValueError(
            f"{where}: the completion is empty, so there is nothing to learn. Remove the row."
        )


def load_rows(path: str | Path) -> list[dict[str, str]]:
    """Rows of a JSONL file, one ``{"prompt": str, "completion": str}`` a line.

    What is no text (bytes that are not UTF-8, lone surrogates) becomes U+FFFD.

    Raises:
        FileNotFoundError, ValueError: with the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Pass a JSONL file of prompts and completions."
        )
    rows = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}). Write one object a line.") from None
            check_row(row, where)
            rows.append({key: clean_text(row[key]) for key in ("prompt", "completion")})
    if not rows:
        raise ValueError(f"{path} holds no rows. Write one JSON object a line.")
    return rows


class SpanCollator:
    """Makes batches for `SpanDistiller` out of rows: both tokenizations, labels and spans.

    Each side writes the prompt with its own chat template, then the same completion, then its own
    end-of-sequence token. Spans lie in the completion only. Padding is on the right.

    Args:
        aligner: finds the spans; it holds both tokenizers.
        max_length: tokens kept of each side, from the left. Truncation never shifts a span.
        chat_template: False writes the prompt and a line break instead.

    A batch holds ``input_ids``, ``attention_mask``, ``labels`` ``[B, Ts]`` (labels of the
    completion and its end; -100 elsewhere), ``teacher_input_ids``, ``teacher_attention_mask``
    ``[B, Tt]``, ``student_spans`` and ``teacher_spans`` ``[S, 2]`` (half-open row ranges into the
    flattened ``[B * Ts]`` and ``[B * Tt]`` rows), ``span_offsets`` ``[B + 1]`` and ``coverage``
    ``[B]`` (share of the completion's bytes that lie in spans).
    """

    def __init__(
        self, aligner: SpanAligner, *, max_length: int = 512, chat_template: bool = True
    ) -> None:
        self.aligner = aligner
        self.max_length = max_length
        self.chat_template = chat_template

    def table(self, row: Mapping[str, str]) -> SpanTable:
        """One row, aligned."""
        student, teacher = self.aligner.student_tokenizer, self.aligner.teacher_tokenizer
        return self.aligner.encode_pair(
            render_prompt(student, row["prompt"], chat_template=self.chat_template),
            render_prompt(teacher, row["prompt"], chat_template=self.chat_template),
            row["completion"],
            student_suffix=student.eos_token or "",
            teacher_suffix=teacher.eos_token or "",
            student_max_length=self.max_length,
            teacher_max_length=self.max_length,
        )

    def checked(self, row: Any, where: str) -> SpanTable:
        """One row, aligned; raises with `where` if there is nothing in it to learn from."""
        check_row(row, where)
        table = self.table(row)
        if max(table.student_start, 1) >= len(table.student_ids):
            raise ValueError(
                f"{where} (prompt {row['prompt']!r:.60}) has no completion token within "
                f"max_length = {self.max_length}. Raise max_length or drop the row."
            )
        return table

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        tables = [self.checked(row, f"Row {i} of the batch") for i, row in enumerate(rows)]
        student = [table.student_ids for table in tables]
        teacher = [table.teacher_ids for table in tables]
        labels = [
            np.where(np.arange(len(t.student_ids)) < t.student_start, IGNORED, t.student_ids)
            for t in tables
        ]
        width, teacher_width = max(map(len, student)), max(map(len, teacher))
        pad = _padding(self.aligner.student_tokenizer)
        teacher_pad = _padding(self.aligner.teacher_tokenizer)
        counts = [len(table) for table in tables]
        return {
            "input_ids": _padded(student, width, pad),
            "attention_mask": _padded([np.ones_like(ids) for ids in student], width, 0),
            "labels": _padded(labels, width, IGNORED),
            "teacher_input_ids": _padded(teacher, teacher_width, teacher_pad),
            "teacher_attention_mask": _padded([np.ones_like(i) for i in teacher], teacher_width, 0),
            "student_spans": _flattened([table.student for table in tables], width),
            "teacher_spans": _flattened([table.teacher for table in tables], teacher_width),
            "span_offsets": torch.from_numpy(np.cumsum([0, *counts])),
            "coverage": torch.tensor([table.coverage for table in tables]),
        }


def check_coverage(
    rows: Iterable[Mapping[str, str]], collator: SpanCollator, minimum: float
) -> float:
    """The share of the completions' bytes inside spans.

    Raises:
        ValueError: it is under `minimum`, or a row holds nothing to learn from.
    """
    covered, total = 0.0, 0
    worst: tuple[float, int, str] = (2.0, 0, "")
    for number, row in enumerate(rows):
        table = collator.checked(row, f"Row {number}")
        size = len(row["completion"].encode(errors="replace"))
        covered, total = covered + table.coverage * size, total + size
        worst = min(worst, (table.coverage, number, row["completion"][:60]))
    coverage = covered / max(total, 1)
    if coverage < minimum:
        share, number, snippet = worst
        raise ValueError(
            f"Alignment covers {coverage:.1%} of the completions' bytes (minimum {minimum:.0%}). "
            f"Worst is row {number} with {share:.1%}: {snippet!r}. Look at it with `sra align`, "
            "choose another pair, or lower min_coverage."
        )
    return coverage


def _padding(tokenizer: Any) -> int:
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def _padded(rows: list[np.ndarray], width: int, value: int) -> Tensor:
    out = np.full((len(rows), width), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def _flattened(spans: list[np.ndarray], width: int) -> Tensor:
    shifted = [rows + i * width for i, rows in enumerate(spans)]
    return torch.from_numpy(np.concatenate(shifted).reshape(-1, 2))
