"""Rows made into batches of the student and its teachers: ids, labels and spans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sra.alignment import SpanAligner
from sra.batch import sequence_rows
from sra.chat import Rendering, TrainTurns, render
from sra.data import IGNORED, check_row, snippet
from sra.span_table import SpanTable
from sra.token_bytes import TokenBytes, byte_offsets

Padding = Literal["right", "left", "free"]


class Example(NamedTuple):
    """One row, ready for a batch.

    input_ids, labels: int64 [Ts]; the first label is -100, because nothing predicts it.
    num_bytes: UTF-8 bytes that the labels spell; the ends of turns spell none.
    tables: the row's spans with each teacher that it goes to, by the teacher's index.
    coverage: share of the pieces' bytes inside spans, mean over those teachers.
    size: UTF-8 bytes of the pieces.

    A row that truncation leaves nothing of is one token without a label, and goes to no teacher.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    num_bytes: int
    tables: dict[int, SpanTable]
    coverage: float
    size: int

    @property
    def left_out(self) -> bool:
        """Whether nothing of the row is learnt."""
        return not (self.labels != IGNORED).any()


class SpanCollator:
    """Makes batches for `SpanDistiller` out of rows: all tokenizations, labels and spans.

    Each side writes a row in its own way (`sra.chat.render`). What is learnt has labels; spans lie
    inside the completion, the text or the contents of trained messages. A row whose prompt alone
    fills `max_length` is left out: one token in the batch, without label or teacher. Deterministic;
    it can be pickled for data workers.

    Args:
        aligner: finds the spans; it holds both tokenizers. Several of them, which share the
            student's tokenizer, are several teachers.
        max_length: tokens kept of the student's side, from the left. Truncation on one side never
            shifts a span.
        teacher_max_length: the same of each teacher's side (None: as the student's).
        chat_template: False writes every row without chat templates.
        padding: on the "right", on the "left", or "free": without any, sequences one behind the
            other, told apart by `position_ids`.
        train_turns: which messages are learnt: see `sra.chat.render`.
        pad_to_multiple_of: round the width of padded batches up to this many tokens.
        teacher_names: what a row's "teacher" (a name, or a list of names) calls each teacher
            (None: "0", "1", ...). A row without it goes to all of them.

    A batch holds ``input_ids``, ``attention_mask``, ``labels`` ``[B, Ts]`` (-100 where nothing is
    learnt; label i belongs to the logits of i - 1), ``num_bytes`` ``[B]`` (UTF-8 bytes that labels
    spell), ``coverage`` ``[B]`` (share of the trained text's bytes that lie in spans) and
    ``teachers``, a list with a dictionary for each teacher: ``input_ids``, ``attention_mask``
    ``[Bk, Tt]`` of the rows that go to it, ``student_spans`` and ``teacher_spans`` ``[S, 2]``
    (half-open row ranges into the flattened ``[B * Ts]`` and ``[Bk * Tt]`` rows),
    ``span_offsets`` ``[Bk + 1]`` and ``labelled`` ``[Bk]`` (how many labels each row has). With
    padding="free", ``input_ids``, ``labels`` and ``position_ids`` (from 0 in each sequence) are
    ``[1, N]`` and there is no mask. All int64 but ``coverage``, fp32.

    Raises:
        ValueError: an option that is none, aligners of different students, and, when called, a row
            that cannot be learnt from, by its number.
    """

    def __init__(
        self,
        aligner: SpanAligner | Sequence[SpanAligner],
        *,
        max_length: int = 512,
        teacher_max_length: int | None = None,
        chat_template: bool = True,
        padding: Padding = "right",
        train_turns: TrainTurns = "assistant",
        pad_to_multiple_of: int | None = None,
        teacher_names: Sequence[str] | None = None,
    ) -> None:
        self.aligners = [aligner] if isinstance(aligner, SpanAligner) else list(aligner)
        if not self.aligners:
            raise ValueError("SpanCollator needs an aligner: SpanAligner(student, teacher).")
        first = self.aligner.student
        for number, other in enumerate(self.aligners):
            if other.student is not first and other.student.token_bytes != first.token_bytes:
                raise ValueError(
                    f"Aligner {number} has another student tokenizer than aligner 0. Make all "
                    "aligners with the tokenizer of the one student."
                )
        if padding not in ("right", "left", "free"):
            raise ValueError(f"padding must be 'right', 'left' or 'free', got {padding!r}.")
        if padding == "free" and pad_to_multiple_of is not None:
            raise ValueError("padding='free' pads nothing: leave pad_to_multiple_of out.")
        names = [*map(str, range(len(self.aligners)))] if teacher_names is None else teacher_names
        if len({*names}) != len(self.aligners):
            raise ValueError(
                f"There are {len(self.aligners)} teachers; teacher_names needs as many different "
                f"names, got {list(names)}."
            )
        self.max_length = max_length
        self.teacher_max_length = max_length if teacher_max_length is None else teacher_max_length
        self.chat_template = chat_template
        self.padding = padding
        self.train_turns = train_turns
        self.pad_to_multiple_of = pad_to_multiple_of
        self.teacher_names = list(names)

    @property
    def aligner(self) -> SpanAligner:
        """The first teacher's."""
        return self.aligners[0]

    def table(self, row: Mapping[str, Any], teacher: int = 0) -> SpanTable:
        """One row, aligned with one teacher, whichever the row goes to."""
        aligner = self.aligners[teacher]
        return self._aligned(
            self._rendered(aligner.student_tokenizer, row),
            self._rendered(aligner.teacher_tokenizer, row),
            aligner,
            None,
        )

    def example(self, row: Any, where: str) -> Example:
        """One row, checked, tokenised and aligned.

        Raises:
            ValueError: it is no row, a template refuses it, or it names no teacher that there is;
                each with `where`.
        """
        check_row(row, where)
        chosen = self._teachers_of(row, where)
        tokenizer = self.aligner.student_tokenizer
        student = self._rendered(tokenizer, row, f"{where}, student")
        tokens = self.aligner.student(student.text)
        labels, num_bytes = _labels(student, tokens[: self.max_length])
        if not (labels != IGNORED).any():
            return Example(tokens.ids[:1], labels[:1], 0, {}, coverage=1.0, size=0)
        tables = {}
        for k in chosen:
            name = "teacher" if len(self.aligners) == 1 else f"teacher {self.teacher_names[k]!r}"
            aligner = self.aligners[k]
            teacher = self._rendered(aligner.teacher_tokenizer, row, f"{where}, {name}")
            tables[k] = self._aligned(student, teacher, aligner, tokens)
        return Example(
            tokens.ids[: self.max_length],
            labels,
            num_bytes,
            tables,
            float(np.mean([table.coverage for table in tables.values()])),
            sum(len(piece.text.encode()) for piece in student.pieces),
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        examples = [self.example(row, f"Row {i} of the batch") for i, row in enumerate(rows)]
        ids = [example.input_ids for example in examples]
        batch: dict[str, Any]
        batch, starts = self._joined(ids, self.aligner.student_tokenizer)
        labels = [example.labels for example in examples]
        batch["labels"] = _placed(labels, starts, batch["input_ids"].shape, IGNORED)
        batch["num_bytes"] = torch.tensor([example.num_bytes for example in examples])
        batch["coverage"] = torch.tensor([example.coverage for example in examples])
        batch["teachers"] = [self._teacher(k, examples, starts) for k in range(len(self.aligners))]
        return batch

    def _rendered(self, tokenizer: Any, row: Mapping[str, Any], side: str = "") -> Rendering:
        try:
            return render(
                tokenizer, row, chat_template=self.chat_template, train_turns=self.train_turns
            )
        except ValueError as error:
            raise ValueError(f"{side}: {error}" if side else str(error)) from error

    def _aligned(
        self,
        student: Rendering,
        teacher: Rendering,
        aligner: SpanAligner,
        tokens: TokenBytes | None,
    ) -> SpanTable:
        return aligner.align(
            student,
            teacher,
            student_tokens=tokens,
            student_max_length=self.max_length,
            teacher_max_length=self.teacher_max_length,
        )

    def _teachers_of(self, row: Mapping[str, Any], where: str) -> list[int]:
        named = row.get("teacher")
        if named is None:
            return list(range(len(self.aligners)))
        named = [named] if isinstance(named, str) else list(named)
        unknown = [name for name in named if name not in self.teacher_names]
        if unknown or not named:
            wrong = f"names {unknown[0]!r}" if unknown else "names nobody"
            raise ValueError(
                f"{where}: 'teacher' {wrong}, and the teachers are {self.teacher_names}. Give them "
                "their names with teacher_names, or remove the key for a row that goes to all."
            )
        return sorted({self.teacher_names.index(name) for name in named})

    def _teacher(
        self, k: int, examples: list[Example], student_starts: np.ndarray
    ) -> dict[str, Tensor]:
        own = [i for i, example in enumerate(examples) if k in example.tables]
        tables = [examples[i].tables[k] for i in own]
        ids = [table.teacher_ids for table in tables]
        batch, starts = self._joined(ids, self.aligners[k].teacher_tokenizer)
        batch["student_spans"] = _moved([t.student for t in tables], student_starts[own])
        batch["teacher_spans"] = _moved([t.teacher for t in tables], starts)
        batch["span_offsets"] = torch.from_numpy(np.cumsum([0, *map(len, tables)]))
        labelled = [int((examples[i].labels[1:] != IGNORED).sum()) for i in own]
        batch["labelled"] = torch.tensor(labelled, dtype=torch.int64)
        return batch

    def _joined(self, ids: list[np.ndarray], tokenizer: Any) -> tuple[dict[str, Any], np.ndarray]:
        """Sequences side by side, and the flattened row at which each begins."""
        lengths = np.array([len(row) for row in ids], np.int64)
        if self.padding == "free":
            shape = (1, int(lengths.sum()))
            starts = np.cumsum(lengths) - lengths
            extra = "position_ids", [np.arange(n) for n in lengths]
        else:
            step = self.pad_to_multiple_of or 1
            shape = (len(ids), -(-int(lengths.max(initial=0)) // step) * step)
            starts = np.arange(len(ids)) * shape[1]
            if self.padding == "left":
                starts += shape[1] - lengths
            extra = "attention_mask", [np.ones_like(row) for row in ids]
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(i for i in known if i is not None)
        batch = {
            "input_ids": _placed(ids, starts, shape, pad),
            extra[0]: _placed(extra[1], starts, shape, 0),
        }
        return batch, starts


def sequence_ids(batch: Mapping[str, Any], index: int) -> list[int]:
    """The token ids of one sequence of a batch, with or without padding."""
    ids = batch["input_ids"]
    rows = sequence_rows(ids, batch.get("attention_mask"), batch.get("position_ids"))
    return ids.flatten().cpu()[rows[index]].tolist()


def check_coverage(
    rows: Iterable[Mapping[str, Any]],
    collator: SpanCollator,
    minimum: float,
    numbers: Iterable[int] | None = None,
) -> tuple[float, int]:
    """The share of the trained texts' bytes inside spans, and how many rows are left out.

    Args:
        numbers: of the rows, where they are not all of a data set.

    Raises:
        ValueError: the share is under `minimum`, every row is left out, or one is broken.
    """
    covered, total, seen, left_out = 0.0, 0, 0, 0
    worst: tuple[float, int, str] = (2.0, 0, "")
    for number, row in zip(count() if numbers is None else numbers, rows, strict=False):
        example = collator.example(row, f"Row {number}")
        seen += 1
        covered, total = covered + example.coverage * example.size, total + example.size
        left_out += example.left_out
        if example.coverage < worst[0]:
            worst = (example.coverage, number, _uncovered(example, row))
    if left_out and left_out == seen:
        raise ValueError(
            f"None of {left_out:,} rows has a token to learn within max_length = "
            f"{collator.max_length}: their prompts fill it. Raise max_length."
        )
    coverage = covered / total if total else 1.0
    if coverage < minimum:
        share, number, text = worst
        raise ValueError(
            f"Alignment covers {coverage:.1%} of the trained texts' bytes (minimum {minimum:.0%}). "
            f"Worst is row {number} with {share:.1%}: {text!r}. Look at it with `sra align`, "
            "choose another pair, or lower min_coverage."
        )
    return coverage, left_out


def _uncovered(example: Example, row: Mapping[str, Any]) -> str:
    """The first text of a row that a teacher has in no span, with what follows it."""
    for table in example.tables.values():
        raw = table.text.encode()
        # Where one span does not begin at the end of the one before it.
        ends = np.append(0, table.bytes[:, 1])
        gaps = np.flatnonzero(ends != np.append(table.bytes[:, 0], len(raw)))
        if len(gaps):
            return raw[ends[gaps[0]] :].decode(errors="replace")[:60]
    return snippet(row)


def _labels(rendering: Rendering, tokens: TokenBytes) -> tuple[np.ndarray, int]:
    """Labels of a rendering's tokens, and the UTF-8 bytes that they spell."""
    text, at = rendering.text, byte_offsets(rendering.text)
    labels = np.full(len(tokens), IGNORED)
    num_bytes = 0
    for label in rendering.labels:
        # A token may hold a space of the template before the first letters.
        blank = len(text[: label.start].rstrip(" "))
        early, start, end, stop = at[[blank, label.start, label.end, label.stop]]
        first = int(np.searchsorted(tokens.starts, start, "left"))
        if first and tokens.ends[first - 1] > start and tokens.starts[first - 1] >= early:
            first = int(np.searchsorted(tokens.starts, tokens.starts[first - 1], "left"))
        first = max(first, 1)  # nothing predicts the first token
        last = int(np.searchsorted(tokens.starts, stop, "left"))
        if first < last:
            labels[first:last] = tokens.ids[first:last]
            spelt = min(end, tokens.ends[last - 1]) - max(start, tokens.starts[first])
            num_bytes += max(0, int(spelt))
    return labels, num_bytes


def _placed(
    rows: list[np.ndarray], starts: np.ndarray, shape: tuple[int, ...], value: int
) -> Tensor:
    out = np.full(shape, value, np.int64)
    flat = out.reshape(-1)
    for row, start in zip(rows, starts.tolist(), strict=True):
        flat[start : start + len(row)] = row
    return torch.from_numpy(out)


def _moved(spans: list[np.ndarray], starts: np.ndarray) -> Tensor:
    parts = [rows + start for rows, start in zip(spans, starts.tolist(), strict=True)]
    return torch.from_numpy(np.concatenate([np.zeros((0, 2), np.int64), *parts]))
