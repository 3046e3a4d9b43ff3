"""Every family as student and as teacher, against what transformers itself gives of each."""

from __future__ import annotations

import functools

import pytest
import torch

from sra import SpanDistiller, recipe
from sra.model import head_of, trunk_of
from sra.states import model_states
from tests import tiny
from tests.models.families import NAMES, build

LENGTHS = (19, 11)
EVERY_TERM = recipe(
    "paper", gamma=2.0, outside="weight", layers=((0, 0, 1.0), (-1, -1, 1.0)), temperature=1.0
)


@functools.cache
def model_of(name):
    return build(name, tiny.STUDENT_ROWS)


def padded(side):
    ids = torch.randint(3, tiny.STUDENT_ROWS, (2, max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids, (mask if side == "right" else mask.flip(1)).long()


@pytest.mark.parametrize("name", NAMES)
def test_states_masses_and_logits_are_those_of_transformers(name):
    """All layers of one padded batch: hidden states, attention rows from `output_attentions`, and
    the logits that the head makes of the last states."""
    model = model_of(name)
    count = model.config.get_text_config().num_hidden_layers
    for side in ("right", "left"):
        ids, mask = padded(side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        own = [*range(count)]
        with torch.no_grad():
            got = model_states(model, ids, mask, layers=own)
            implementation = model.config._attn_implementation
            model.set_attn_implementation("eager")
            whole = model(
                input_ids=ids, attention_mask=mask, position_ids=positions,
                output_hidden_states=True, output_attentions=True, use_cache=False,
            )  # fmt: skip
            model.set_attn_implementation(implementation)
            logits = head_of(model).logits(got.hidden[-1])
        real = mask.bool()
        for layer in own:
            torch.testing.assert_close(
                got.hidden[layer][real], whole.hidden_states[layer + 1][real], atol=2e-5, rtol=2e-5
            )
        torch.testing.assert_close(logits[real], whole.logits[real].float(), atol=5e-5, rtol=5e-5)
        assert logits[real].std() > 0.05
        attentions = whole.attentions
        if len(attentions) == count:
            pairs = zip(got.mass, attentions, strict=True)
        else:  # of two layers, one has softmax attention
            pairs = [(mass, attentions[0]) for mass in got.mass]
        for mass, attention in pairs:
            expected = attention_rows(attention, real)
            torch.testing.assert_close(mass.double(), expected, atol=1e-5, rtol=0)
            assert expected.max() > 1.5 / max(LENGTHS), "uniform attention would prove nothing"


def attention_rows(attention, real):
    """The definition: the last real token's row, heads summed, over the real tokens."""
    rows = []
    for heads, tokens in zip(attention.double(), real, strict=True):
        row = heads[:, int(tokens.nonzero().max())].sum(0) * tokens
        rows.append(row / row.sum())
    return torch.stack(rows)


def gradients(distiller):
    out = distiller(**tiny.collator()(tiny.ROWS[:3]))
    out.loss.backward()
    for term in ("loss", "ce", "cosine", "geometry", "logit"):
        assert torch.isfinite(out[term]), term
        assert out[term] > 0, term
    return {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_as_student(name):
    student = build(name, tiny.STUDENT_ROWS)
    distiller = SpanDistiller(
        student, tiny.teacher_model(), EVERY_TERM, vocabulary=tiny.vocabulary()
    ).train()
    grads = gradients(distiller)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    learns = [*trunk_of(student).parameters(), *student.get_output_embeddings().parameters()]
    assert all(p.grad is not None for p in learns)
    head = student.get_output_embeddings().weight
    assert head.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in distiller.projectors.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_as_teacher(name):
    teacher = build(name, tiny.TEACHER_ROWS)
    distiller = SpanDistiller(
        tiny.student_model(), teacher, EVERY_TERM, vocabulary=tiny.vocabulary()
    ).train()
    grads = gradients(distiller)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training
