"""What a batch holds: its sequences, and the counts that the sums of a loss are divided by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sra.data import IGNORED

SPAN_INPUTS = ("input_ids", "student_spans", "teacher_spans", "span_offsets", "labelled")


def sequence_rows(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> list[Tensor]:
    """For each sequence of a batch, padded or packed, the rows of its tokens in ``[B * T]``."""
    batch, width = input_ids.shape
    every = torch.arange(batch * width)
    if attention_mask is not None:
        real = attention_mask.bool().cpu()
        return [rows[keep] for rows, keep in zip(every.view(batch, width), real, strict=True)]
    if position_ids is not None:
        starts = (position_ids.flatten().cpu() == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], len(every)]
        return [every[start:end] for start, end in zip(starts, ends, strict=True)]
    return [*every.view(batch, width)]


def count_items(batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """``[4]`` float64: label tokens, sequences, spans and told tokens of the micro-batches of one
    step.

    A sequence or span counts once for each teacher that sees it. Told are label tokens, counted so.
    """
    tokens = sequences = spans = told = 0
    for batch in batches:
        tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
        for teacher in batch.get("teachers", ()):
            sequences += len(teacher["span_offsets"]) - 1
            spans += len(teacher["student_spans"])
            told += int(teacher["labelled"].sum())
    return torch.tensor([tokens, sequences, spans, told], dtype=torch.float64)


def own_counts(labels: Tensor, teachers: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """As `count_items` of one batch, without waiting for the device."""
    dtype = torch.float32 if labels.device.type == "mps" else torch.float64
    sequences = sum(len(teacher["span_offsets"]) - 1 for teacher in teachers)
    spans = sum(len(teacher["student_spans"]) for teacher in teachers)
    tokens = (labels[:, 1:] != IGNORED).sum()
    told = torch.zeros_like(tokens)
    for teacher in teachers:
        told += teacher["labelled"].sum().to(told.device)
    counts = torch.tensor([0, sequences, spans, 0], dtype=dtype).to(labels.device)
    counts[0], counts[3] = tokens, told
    return counts


def step_counts(own: Tensor, given: Tensor | int | None) -> Tensor:
    """The counts to divide by, of what a caller gives: see `SpanDistiller.forward`."""
    if given is None:
        return own
    given = torch.as_tensor(given, dtype=own.dtype, device=own.device)
    return given if given.numel() == 4 else own * given / own[0].clamp(min=1)


def check_teacher_inputs(teachers: Sequence[Mapping[str, Tensor]], count: int) -> None:
    """Raise unless a batch has what the span terms of so many teachers need."""
    if len(teachers) != count:
        raise ValueError(
            f"The batch holds {len(teachers)} 'teachers' and the distiller {count}. Make batches "
            "with SpanCollator, with one aligner for each teacher; a transformers Trainer needs "
            "remove_unused_columns=False."
        )
    for teacher in teachers:
        for name in SPAN_INPUTS:
            if name not in teacher:
                raise ValueError(
                    f"The batch holds no {name!r} of a teacher, which the span terms need. Make "
                    "batches with SpanCollator."
                )
