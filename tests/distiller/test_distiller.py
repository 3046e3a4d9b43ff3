"""The student with its teacher as one module: gradients, what is saved, counts, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from sra import Objective, SharedVocabulary, SpanDistiller, count_items, recipe
from sra.distiller import DistillerOutput
from sra.model import head_of
from sra.objective import RECIPES
from tests import tiny
from tests.distiller.cases import ALL, SPAN_RECIPES, assert_same, distiller, gradients, wider

# --- what learns and what does not ---


def test_the_teacher_is_no_part_of_the_module(batch):
    module = distiller()
    names = {name for name, _ in module.named_parameters()}
    assert names == {f"student.{n}" for n, _ in module.student.named_parameters()} | {
        "projectors.0.weight"
    }
    assert {n.split(".")[0] for n in module.state_dict()} == {"student", "projectors"}
    owned = {p.data_ptr() for p in module.parameters()}
    assert not owned & {p.data_ptr() for p in module.teachers[0].parameters()}
    module.train()
    assert not module.teachers[0].training
    assert not any(p.requires_grad for p in module.teachers[0].parameters())


@pytest.mark.parametrize("objective", SPAN_RECIPES.values(), ids=SPAN_RECIPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_reach_the_student_and_the_projector_alone(batch, objective, tied):
    module = distiller(objective, tied=tied)
    before = copy.deepcopy(module.teachers[0].state_dict())
    out, grads = gradients(module, batch)
    assert out.loss.requires_grad
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name
    assert all(p.grad is None for p in module.teachers[0].parameters())
    assert_same(module.teachers[0].state_dict(), before, rtol=0, atol=0)
    assert ("projectors.0.weight" in grads) == (objective.cosine > 0)


@pytest.mark.parametrize("name", ["boundary", "respell", "cross-entropy"])
def test_the_gradient_is_that_of_the_loss(batch, name):
    """A step along it changes the loss by what it says: a central difference.

    As exact as the models are, which norm in float32. Where centres of mass are compared, the
    attention mass is a constant by definition.
    """
    module = distiller(recipe(name))
    _, grads = gradients(module, batch)
    direction = {n: torch.randn_like(g) for n, g in grads.items()}
    slope = sum((g * direction[n]).sum() for n, g in grads.items())
    losses = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            for n, p in module.named_parameters():
                p.add_(direction[n], alpha=step)
            losses.append(module(**batch).loss)
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-4, slope, rtol=1e-3, atol=0)


def test_an_extra_output_for_each_term(batch):
    out = distiller()(**batch)
    assert isinstance(out, DistillerOutput)
    assert {*out.keys()} == {
        "loss", "ce", "cosine", "geometry", "logit", "shared_mass", "coverage", "bits_per_byte",
    }  # fmt: skip
    want = 0.5 * out.ce + 0.5 * (out.cosine + 50 * out.geometry + out.logit)
    torch.testing.assert_close(out.loss, want)
    assert 0 < out.shared_mass < 1
    assert out.coverage == pytest.approx(1, abs=0.01)
    assert not any(value.requires_grad for name, value in out.items() if name != "loss")


def test_the_padding_changes_nothing(batch):
    module = distiller()
    _, want = gradients(module, batch)
    wide = wider(batch, 5, 9)
    _, got = gradients(module, wide)
    assert_same(got, want, rtol=1e-9, atol=1e-12)


def test_the_student_alone_is_saved(batch, tmp_path):
    module = distiller(dtype=torch.float32)
    module.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is type(module.student)
    assert_same(loaded.state_dict(), module.student.state_dict(), rtol=0, atol=0)


# --- cross-entropy ---


def test_cross_entropy_needs_no_teacher_and_is_that_of_transformers(batch):
    student = tiny.student_model(torch.float64)
    module = SpanDistiller(student, None, recipe("cross-entropy"))
    assert not module.projectors
    out, ours = gradients(module, batch)
    student.zero_grad()
    theirs = student(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    ).loss
    theirs.backward()
    torch.testing.assert_close(out.loss, theirs.double(), rtol=1e-6, atol=0)
    want = {f"student.{n}": p.grad for n, p in student.named_parameters()}
    assert_same(ours, want, rtol=1e-5, atol=1e-8)
    assert {*out.keys()} == {"loss", "ce", "coverage", "bits_per_byte"}


def test_cross_entropy_takes_a_plain_batch(batch):
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    module = SpanDistiller(tiny.student_model(), None, recipe("cross-entropy"))
    assert module(**plain).loss == module(**batch).loss


# --- the counts ---


@pytest.mark.parametrize("objective", SPAN_RECIPES.values(), ids=SPAN_RECIPES)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_whole(batch, objective, parts):
    module = distiller(objective)
    whole, want = gradients(module, batch)
    size = len(tiny.ROWS) // parts
    split = [tiny.collator()(tiny.ROWS[i : i + size]) for i in range(0, len(tiny.ROWS), size)]
    counts = count_items(split)
    assert counts.tolist() == count_items([batch]).tolist()
    module.zero_grad()
    outs = [module(**part, num_items_in_batch=counts) for part in split]
    for out in outs:
        out.loss.backward()
    got = {name: p.grad for name, p in module.named_parameters()}
    assert_same(got, want, rtol=1e-9, atol=1e-12)
    for name in ("loss", "ce", "cosine", "geometry", "logit"):
        torch.testing.assert_close(sum(out[name] for out in outs), whole[name], rtol=1e-9, atol=0)


def test_counts():
    batch = tiny.collator()(tiny.ROWS[:3])
    tokens = int((batch["labels"] != -100).sum())
    spans = len(batch["teachers"][0]["student_spans"])
    assert count_items([batch]).tolist() == [tokens, 3, spans, tokens]
    assert count_items([batch, batch]).tolist() == [2 * tokens, 6, 2 * spans, 2 * tokens]
    twice = {**batch, "teachers": batch["teachers"] * 2}
    assert count_items([twice]).tolist() == [tokens, 6, 2 * spans, 2 * tokens]
    assert count_items([]).tolist() == [0, 0, 0, 0]


def test_num_items_in_batch_in_every_form(batch):
    module = distiller()
    own, _ = gradients(module, batch)
    counts = count_items([batch])
    tokens = int(counts[0])
    for given in (None, counts, counts.float(), tokens, torch.tensor(tokens)):
        torch.testing.assert_close(
            module(**batch, num_items_in_batch=given).loss, own.loss, rtol=1e-12, atol=0
        )
    for given in (2 * counts, 2 * tokens, torch.tensor(2 * tokens)):
        torch.testing.assert_close(
            2 * module(**batch, num_items_in_batch=given).loss, own.loss, rtol=1e-12, atol=0
        )


# --- bad input ---


def test_heads_of_two_sizes_need_a_shared_vocabulary():
    message = r"student's head has 328 rows and the teacher's 448.*vocabulary=SharedVocabulary\("
    with pytest.raises(ValueError, match=message):
        SpanDistiller(tiny.student_model(), tiny.teacher_model(), ALL)


def test_one_vocabulary_needs_none(batch):
    module = SpanDistiller(tiny.student_model(), tiny.student_model(seed=5), recipe("paper"))
    same = {name: batch[name] for name in ("input_ids", "attention_mask")}
    (teacher,) = batch["teachers"]
    same["teacher_spans"] = teacher["student_spans"]
    out = module(**(batch | {"teachers": [teacher | same]}))
    assert out.logit > 0


@pytest.mark.parametrize(("side", "rows"), [("student", 320), ("teacher", 300)])
def test_a_shared_vocabulary_beyond_a_head(side, rows):
    vocabulary = SharedVocabulary(
        tiny.student_tokenizer(), tiny.teacher_tokenizer(), match="normalised"
    )
    student, teacher = tiny.student_model(), tiny.teacher_model()
    model = student if side == "student" else teacher
    model.resize_token_embeddings(int(getattr(vocabulary, f"{side}_ids").max()))
    rows = model.get_output_embeddings().weight.shape[0]
    message = rf"names id {rows} of the {side}, whose head has {rows} rows.*{side}_rows={rows}"
    with pytest.raises(ValueError, match=message):
        SpanDistiller(student, teacher, ALL, vocabulary=vocabulary)


def test_span_terms_need_a_teacher():
    with pytest.raises(ValueError, match=r'needs a teacher.*recipe\("cross-entropy"\)'):
        SpanDistiller(tiny.student_model(), None, ALL)


def test_span_terms_need_the_batch_of_the_collator(batch):
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with pytest.raises(ValueError, match=r"0 'teachers' and the distiller 1.*SpanCollator"):
        distiller()(**plain)


def test_a_student_cannot_be_its_own_teacher():
    model = tiny.student_model()
    with pytest.raises(ValueError, match="one and the same model"):
        SpanDistiller(model, model, ALL)


def test_a_model_without_a_head():
    with pytest.raises(TypeError, match=r"no output embeddings.*AutoModelForCausalLM"):
        head_of(tiny.student_model().base_model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, r"alpha = 1\.5: .*0 to 1"),
        ({"alpha": -0.1}, "alpha"),
        ({"temperature": 0.0}, r"temperature = 0\.0: it must be positive"),
        ({"gamma": -1.0}, r"gamma = -1\.0: it must not be negative"),
        ({"cosine": -1.0}, "cosine"),
        ({"logit": -1.0}, "logit"),
        ({"power": -1.0}, "power"),
        ({"logit_state": "middle"}, "logit_state = 'middle': choose one of com, end"),
        ({"outside": "drop"}, "outside = 'drop': choose one of renormalise, weight"),
        ({"normaliser": "bytes"}, "normaliser = 'bytes': choose one of sequences, spans, tokens"),
        ({"direction": "sideways"}, "direction = 'sideways': choose one of forward, reverse, jsd"),
        ({"direction": "jsd"}, "beta"),
        ({"beta": 0.5}, "beta"),
    ],
)
def test_objective_values(changes, message):
    with pytest.raises(ValueError, match=message):
        Objective(**changes)
    with pytest.raises(ValueError, match=message):
        recipe("paper", **changes)


def test_recipe_names():
    with pytest.raises(ValueError, match=r"no recipe 'best'\. Choose one of cross-entropy, paper"):
        recipe("best")
    with pytest.raises(TypeError, match=r"no 'lambda_'\. It has alpha, gamma"):
        recipe("paper", lambda_=1)
    assert recipe("paper") == Objective() == RECIPES["paper"]
    assert recipe("paper", gamma=1.0).gamma == 1.0
    assert RECIPES["paper"].gamma == 50
    assert not recipe("cross-entropy").needs_teacher
    assert not Objective(cosine=0, gamma=0, logit=0).needs_teacher
