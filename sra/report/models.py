"""The part of a report that runs the models: figures on held-out rows, and where they differ."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sra.alignment import SpanAligner
from sra.collator import SpanCollator
from sra.evaluation.likelihood import bits_per_byte, scored_bytes
from sra.evaluation.span_comparison import ComparedRow, agreement_of, compare_spans
from sra.loading import load_model, load_tokenizer
from sra.model import head_rows
from sra.report.run import Report, SampleSpans
from sra.run_record import last_checkpoint
from sra.token_bytes import byte_tokenizer
from sra.vocabulary import SharedVocabulary

MAX_SPANS = 400  # of a row that is shown; the figures are of all
SHOWN_ROWS = 64


def measure(
    report: Report,
    rows: Sequence[Mapping[str, Any]],
    data: str,
    *,
    teacher: str | None = None,
    device: str = "cpu",
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> None:
    """Measure the run's models on held-out rows and put the figures and samples into `report`.

    The student is the run's final one, or that of its newest checkpoint. A model that the run names
    but that cannot be loaded here is left out, and the report says so.

    Args:
        rows: of any kind that `SpanCollator` takes.
        data: their name, for the reader.
        teacher: instead of the run's first teacher.
        dtype: of the weights.
        log: called with a line of text before each measurement.
        options: of `load_model`: trust_remote_code.

    Raises:
        ValueError: the run has no student yet, or `teacher` cannot be loaded.
    """
    path = trained_student(report.folder)
    config = report.run.get("config") or {}
    length = config.get("max_length") or 512
    inputs = report.run.get("inputs") or {}

    def load(name: str | Path, revision: str | None = None) -> tuple[Any, Any]:
        of_it = {**options, "revision": revision} if revision else options
        return load_model(name, dtype=dtype, **of_it).to(device), load_tokenizer(name, **of_it)

    def try_to_load(side: str, name: str, revision: str | None, remedy: str) -> Any:
        try:
            return load(name, revision)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            missing.append(f"Figures of {side}, {name}: {reason} {remedy}")
            return None

    names = [str(name) for name in report.run.get("teachers") or []]
    figures: dict[str, dict[str, float]] = {}
    missing: list[str] = []

    def score(side: str, model: Any, its_tokenizer: Any) -> None:
        log(f"{side}: bits per byte of {len(rows):,} rows")
        bits = bits_per_byte(model, its_tokenizer, rows, batch_size=batch_size, max_length=length)
        figures[side] = {"bits_per_byte": bits}

    reference = None
    if teacher is not None:
        reference = load(teacher)
    elif names:
        revision = inputs.get("teacher_model_revision")
        reference = try_to_load("the teacher", names[0], revision, "Name it with --teacher.")
        if len(names) > 1:
            others = ", ".join(names[1:])
            missing.append(f"Figures of {others}: one teacher is measured. Choose by --teacher.")
    else:
        missing.append("The teacher: the run names none. Name it with --teacher.")
    if reference is not None:
        score("teacher", *reference)

    students: dict[str, Any] = {}
    if report.run.get("student"):
        hint = "Run sra report where it can be loaded."
        students["before"] = lambda: try_to_load(
            "the student before training", str(report.run["student"]),
            inputs.get("model_revision"), hint,
        )  # fmt: skip
    else:
        missing.append("The student before training: the run does not name it.")
    students["after"] = lambda: load(path)
    compared: list[ComparedRow] = []
    for side, loaded in students.items():
        student = loaded()
        if student is None:
            continue
        score(side, *student)
        if reference is not None:
            log(f"{side}: spans of {min(len(rows), SHOWN_ROWS):,} rows")
            compared = compare_spans(
                student[0],
                reference[0],
                rows[:SHOWN_ROWS],
                *_pair(student, reference, config, length),
                batch_size=batch_size,
            )
            spans = [bits for row in compared for bits in row.divergence]
            figures[side]["agreement"] = agreement_of(compared)
            figures[side]["divergence"] = sum(spans) / len(spans)
    if reference is not None:
        read = [scored_bytes(one, rows, max_length=length) for one in (reference[1], student[1])]
        if read[0] != read[1]:
            missing.append(
                f"The ends of long rows: of texts beyond {length} tokens, the teacher's figures "
                f"are of {read[0]:,} bytes in all and the student's of {read[1]:,}."
            )
    report.figures = figures
    report.source = f"Measured by this report on {len(rows):,} rows of {data}."
    if reference is not None and len(rows) > SHOWN_ROWS:
        report.source += f" Agreement and divergence: of the first {SHOWN_ROWS}."
    report.missing += missing
    report.samples = sorted(
        (
            sample(number, row, spans, student[1])
            for number, (row, spans) in enumerate(zip(rows, compared, strict=False))
            if spans.spans
        ),
        key=lambda one: -one.divergence,
    )


def trained_student(folder: str | Path) -> Path:
    """The folder of a run's final student, or of its newest whole checkpoint.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(folder)
    student = folder / "student"
    found = student if student.is_dir() else last_checkpoint(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds no student yet, neither {student} nor a whole checkpoint, so "
            "there is nothing to measure. Leave --data out, or wait for the first checkpoint."
        )
    return found


def sample(number: int, row: Mapping[str, Any], spans: ComparedRow, tokenizer: Any) -> SampleSpans:
    """A row's text in pieces: its spans, and what lies between them.

    A character that a span's border divides stands in the piece that completes it.
    """
    spelt = byte_tokenizer(tokenizer).token_bytes
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces: list[tuple[str, float | None, str | None, str | None]] = []

    def text(begin: int, end: int) -> str:
        return decoder.decode(b"".join(spelt[i] for i in spans.ids[begin:end]))

    at = next((i for i, learnt in enumerate(spans.labelled) if learnt), len(spans.ids))
    if spans.spans:
        at = min(at, spans.spans[0][0])
    for index, (begin, end) in enumerate(spans.spans[:MAX_SPANS]):
        if at < begin:
            pieces.append((text(at, begin), None, None, None))
        bits = spans.divergence[index]
        student, teacher = spans.student_top[index], spans.teacher_top[index]
        tops = _token(tokenizer, student), _token(tokenizer, teacher)
        pieces.append((text(begin, end), bits, *tops))
        at = end
    if len(spans.spans) > MAX_SPANS:
        pieces.append((f" … {len(spans.spans) - MAX_SPANS:,} more spans", None, None, None))
    else:
        special = set(tokenizer.all_special_ids)  # the end of an answer is no text
        behind = range(at, len(spans.ids))
        learnt = [i for i in behind if spans.labelled[i] and spans.ids[i] not in special]
        if learnt:
            pieces.append((text(at, learnt[-1] + 1), None, None, None))
    return SampleSpans(
        row=number,
        context=context(row),
        pieces=[piece for piece in pieces if piece[0]],
        divergence=spans.mean_divergence,
        agreement=spans.agreements / len(spans.spans),
    )


def context(row: Mapping[str, Any]) -> str:
    """What a row's learnt text answers: its prompt, or what the user says first."""
    messages = row.get("messages")
    if messages:
        said = (m.get("content") for m in messages if m.get("role") == "user")
        return next((content for content in said if isinstance(content, str)), "")
    return str(row.get("prompt") or "")


def _token(tokenizer: Any, token: int) -> str:
    """A token as a reader sees it: · is a space, ⏎ a line break."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    shown = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return f"“{shown}”" if shown else f"token {token}"


def _pair(
    student: tuple[Any, Any], teacher: tuple[Any, Any], config: Mapping[str, Any], length: int
) -> tuple[SpanCollator, SharedVocabulary]:
    aligner = SpanAligner(student[1], teacher[1], granularity=config.get("granularity") or "token")
    vocabulary = SharedVocabulary(
        student[1],
        teacher[1],
        match=config.get("vocabulary_match") or "normalised",
        student_rows=head_rows(student[0]),
        teacher_rows=head_rows(teacher[0]),
    )
    collator = SpanCollator(
        aligner,
        max_length=length,
        teacher_max_length=config.get("teacher_max_length"),
        train_turns=config.get("train_turns") or "assistant",
    )
    return collator, vocabulary
