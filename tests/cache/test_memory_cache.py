"""A teacher that remembers, in memory: what it gives is what the teacher gives, computed once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sra import TeacherCache
from sra.model import check_head
from sra.states import model_states
from tests import tiny
from tests.distiller.cases import SPAN_RECIPES, assert_same, distiller, gradients, wider


@pytest.fixture(scope="module")
def batch():
    return tiny.collator()(tiny.ROWS)


def inputs(batch):
    (teacher,) = batch["teachers"]
    return teacher["input_ids"], teacher["attention_mask"]


class Counted(nn.Module):
    """A teacher that counts the texts that it computes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config
        self.texts = 0
        check_head(model)  # once, with a text of its own
        self.model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.texts += len(kwargs["input_ids"])


@pytest.mark.parametrize("objective", SPAN_RECIPES.values(), ids=SPAN_RECIPES)
def test_the_cache_gives_the_loss_and_gradients_of_the_teacher(batch, objective):
    teacher = tiny.teacher_model(torch.float64)
    cached = distiller(objective, teacher=TeacherCache(teacher))
    live = distiller(objective, teacher=teacher)
    assert {*cached.state_dict()} == {*live.state_dict()}
    backwards = tiny.collator()(tiny.ROWS[::-1])
    alone = tiny.collator()(tiny.ROWS[2:3])
    for given in (batch, batch, backwards, alone, wider(batch, 3, 4)):
        want, want_grads = gradients(live, given)
        got, got_grads = gradients(cached, given)
        assert_same(dict(got), dict(want), rtol=1e-9, atol=1e-12)
        assert_same(got_grads, want_grads, rtol=1e-9, atol=1e-12)


def test_the_cache_computes_each_text_once(batch):
    model = tiny.teacher_model()
    counted = Counted(model)
    cache = TeacherCache(model)
    args = inputs(batch)
    first = cache.states(*args)
    assert counted.texts == len(tiny.ROWS)
    tokens = int(args[1].sum())
    assert cache.nbytes == tokens * (48 + 1) * 4
    again = cache.states(*args)
    assert torch.equal(first.hidden[0], again.hidden[0])
    assert torch.equal(first.mass[0], again.mass[0])
    other = tiny.collator()([*tiny.ROWS[3:5], {"prompt": "new", "completion": "text"}])
    cache.states(*inputs(other))
    assert counted.texts == len(tiny.ROWS) + 1


def test_masses_are_computed_when_they_are_first_asked_for(batch):
    model = tiny.teacher_model()
    counted = Counted(model)
    cache = TeacherCache(model)
    args = inputs(batch)
    without = cache.states(*args, mass=False)
    assert without.mass == ()
    assert cache.nbytes == int(args[1].sum()) * 48 * 4
    assert torch.equal(cache.states(*args, mass=False).hidden[0], without.hidden[0])
    assert counted.texts == len(tiny.ROWS)
    (hidden,), (mass,) = cache.states(*args)
    assert counted.texts == 2 * len(tiny.ROWS)
    assert torch.equal(hidden, without.hidden[0])
    torch.testing.assert_close(mass, model_states(model, *args).mass[0])
    assert cache.states(*args, mass=False).mass == ()
    assert counted.texts == 2 * len(tiny.ROWS) + len(tiny.ROWS)  # of model_states, just above


def test_the_cache_computes_a_text_once_even_if_a_batch_repeats_it():
    model = tiny.teacher_model()
    counted = Counted(model)
    twice = tiny.collator()([tiny.ROWS[0], tiny.ROWS[1], tiny.ROWS[0]])
    (hidden,), (mass,) = TeacherCache(model).states(*inputs(twice))
    assert counted.texts == 2
    assert torch.equal(hidden[0], hidden[2])
    assert torch.equal(mass[0], mass[2])


def test_the_states_of_the_cache_are_those_of_the_model(batch):
    model = tiny.teacher_model(torch.float64)
    args = inputs(batch)
    (hidden,), (mass,) = TeacherCache(model).states(*args)
    with torch.no_grad():
        (want_hidden,), (want_mass,) = model_states(model, *args)
    real = args[1].bool()
    torch.testing.assert_close(hidden[real], want_hidden[real])
    torch.testing.assert_close(mass, want_mass)
    assert hidden[~real].abs().max() == 0
    assert not hidden.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
