"""What holds of every method that SRA is compared with."""

from __future__ import annotations

import pytest
import torch

from sra import SpanAligner, SpanCollator, SpanDistiller, SRAConfig, count_items
from sra.baselines import METHODS, baseline
from sra.baselines.baseline import Pair, side_of
from sra.model import head_of
from tests import tiny

TAUGHT = [name for name, method in METHODS.items() if method().needs_teacher]
LONG = {"prompt": "a long one " * 60, "completion": "short"}


def collator(**options):
    aligner = SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    return SpanCollator(aligner, max_length=256, **options)


def distiller(name, **options):
    torch.manual_seed(0)
    method = baseline(name, **options)
    student, teacher = tiny.student_model(torch.float64), tiny.teacher_model(torch.float64)
    vocabulary = method.vocabulary(
        tiny.student_tokenizer(), tiny.teacher_tokenizer(), match="normalised",
        student_rows=tiny.STUDENT_ROWS, teacher_rows=tiny.TEACHER_ROWS,
    )  # fmt: skip
    return SpanDistiller(student, teacher, method, vocabulary=vocabulary)


def gradient(module, *batches, **more):
    module.zero_grad()
    outs = [module(**batch, **more) for batch in batches]
    for out in outs:
        out.loss.backward()
    return outs[0], {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, rtol=1e-7, atol=1e-10):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", TAUGHT)
def test_the_student_learns_and_the_teacher_does_not(name):
    module = distiller(name)
    out, grads = gradient(module, collator()(tiny.ROWS))
    assert out.logit.item() > 0
    torch.testing.assert_close(out.loss, 0.5 * out.ce + 0.5 * out.logit)
    assert {n for n, _ in module.named_parameters()} == {*grads}
    assert all(p.grad is None for p in module.teachers[0].parameters())
    start = out.loss.item()
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(10):
        optimiser.zero_grad()
        loss = module(**collator()(tiny.ROWS)).loss
        loss.backward()
        optimiser.step()
    assert loss.item() < start


@pytest.mark.parametrize("name", TAUGHT)
def test_the_gradient_is_that_of_the_loss(name):
    module, batch = distiller(name), collator()(tiny.ROWS[:3])
    (given,) = batch["teachers"]
    teacher = module.teachers[0]
    torch.manual_seed(1)
    states = [
        torch.randn(x["input_ids"].numel(), model.config.hidden_size, dtype=torch.float64)
        for x, model in ((batch, module.student), (given, teacher))
    ]
    theirs = side_of(teacher, states[1], head_of(teacher), given, given["teacher_spans"])

    def loss(hidden, *projections):
        ours = side_of(
            module.student, hidden, head_of(module.student), batch, given["student_spans"]
        )
        return module.objective.loss(
            Pair(ours, theirs, given["span_offsets"], module.vocabularies[0]), projections
        )

    weights = [p.weight.detach().clone().requires_grad_() for p in module.projectors]
    inputs = states[0].requires_grad_(), *weights
    torch.autograd.gradcheck(loss, inputs, eps=1e-7, atol=1e-5, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("padding", ["left", "free"])
def test_any_padding(name, padding):
    module = distiller(name)
    want, wanted = gradient(module, collator()(tiny.ROWS))
    got, gotten = gradient(module, collator(padding=padding)(tiny.ROWS))
    torch.testing.assert_close(got.loss, want.loss)
    assert_same(gotten, wanted)


@pytest.mark.parametrize("name", METHODS)
def test_any_split_into_micro_batches(name):
    module, make = distiller(name), collator()
    _, want = gradient(module, make(tiny.ROWS))
    parts = [make([*tiny.ROWS[:1], LONG]), make(tiny.ROWS[1:5]), make([LONG]), make(tiny.ROWS[5:])]
    _, got = gradient(module, *parts, num_items_in_batch=count_items(parts))
    assert_same(got, want)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_learn(name):
    out, grads = gradient(distiller(name), collator()([LONG, LONG]))
    assert out.loss.item() == 0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("name", TAUGHT)
def test_it_is_reached_from_a_configuration(name, tmp_path):
    config = SRAConfig(output_dir=str(tmp_path), method=name, alpha=0.25, use_cpu=True)
    assert config.objective() == baseline(name, alpha=0.25)


def test_what_is_no_method():
    with pytest.raises(ValueError, match=r"no method 'udl'. Did you mean 'uld'"):
        baseline("udl")
    with pytest.raises(TypeError, match=r"'uld' has no 'gamma'. It has alpha, temperature"):
        baseline("uld", gamma=1.0)
    with pytest.raises(ValueError, match="alpha = 2"):
        baseline("uld", alpha=2.0)
