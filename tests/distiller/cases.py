"""A tiny pair as one module, its gradients, and a batch with more padding."""

from __future__ import annotations

import torch
from torch import nn

from sra import SpanDistiller, recipe
from tests import tiny

ALL = recipe("paper", outside="weight")
SPAN_RECIPES = {
    "paper": recipe("paper"),
    "boundary": recipe("boundary"),
    "respell": recipe("respell"),
    "every switch": recipe("paper", logit_state="end", outside="bucket", normaliser="spans"),
}


def distiller(objective=ALL, dtype=torch.float64, *, tied=True, teacher=None):
    torch.manual_seed(0)
    return SpanDistiller(
        tiny.student_model(dtype, tied=tied),
        tiny.teacher_model(dtype) if teacher is None else teacher,
        objective,
        vocabulary=tiny.vocabulary(),
    )


def gradients(module, batch, **more):
    module.zero_grad()
    out = module(**batch, **more)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)


def wider(batch, columns, teacher_columns):
    """The batch with more padding on the right; spans address flattened rows, so they move."""
    (teacher,) = batch["teachers"]
    sample = torch.arange(len(batch["labels"])).repeat_interleave(teacher["span_offsets"].diff())

    def padded(side, more):
        fills = {"input_ids": 1, "attention_mask": 0, "labels": -100}
        return {
            name: nn.functional.pad(side[name], (0, more), value=fill)
            for name, fill in fills.items()
            if name in side
        }

    teacher = (
        teacher
        | padded(teacher, teacher_columns)
        | {
            "student_spans": teacher["student_spans"] + (sample * columns)[:, None],
            "teacher_spans": teacher["teacher_spans"] + (sample * teacher_columns)[:, None],
        }
    )
    return batch | padded(batch, columns) | {"teachers": [teacher]}
