"""The student with its teacher as one module: gradients, counts, the cache, and where it runs."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sra import Objective, SharedVocabulary, SpanDistiller, TeacherCache, count_items, recipe
from sra.distiller import DistillerOutput
from sra.model import head_of
from sra.objective import RECIPES
from sra.precision import faster_dtype
from tests import tiny

ALL = recipe("paper", outside="weight")
SPAN_RECIPES = {
    "paper": recipe("paper"),
    "boundary": recipe("boundary"),
    "respell": recipe("respell"),
    "every switch": recipe("paper", logit_state="end", outside="bucket", normaliser="spans"),
}


@pytest.fixture(scope="module")
def batch():
    return tiny.collator()(tiny.ROWS)


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
    assert count_items([batch]).tolist() == [tokens, 3, len(batch["teachers"][0]["student_spans"])]
    assert count_items([batch, batch]).tolist() == [
        2 * tokens, 6, 2 * len(batch["teachers"][0]["student_spans"])
    ]  # fmt: skip
    assert count_items([]).tolist() == [0, 0, 0]


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


# --- where it runs ---


def test_a_plain_loop_learns(batch):
    module = distiller(recipe("boundary"), torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = module(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert losses == sorted(losses, reverse=True)


def test_the_plain_trainer_of_transformers(tmp_path):
    """Without SRATrainer: one step of it is one step of the plain loop; it saves and evaluates."""
    module, other = (distiller(ALL, torch.float32, tied=False) for _ in range(2))
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=len(tiny.ROWS),
        per_device_eval_batch_size=4,
        remove_unused_columns=False,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        module,
        args,
        train_dataset=tiny.ROWS,
        eval_dataset=tiny.ROWS,
        data_collator=tiny.collator(),
    )
    trainer.train()
    assert trainer.model is module
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0)
    out, _ = gradients(other, tiny.collator()(tiny.ROWS))
    optimizer.step()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(out.loss.item(), rel=1e-4)
    # AdamW's first step is a sign: where a gradient is all rounding, a row order may flip it.
    theirs = dict(other.named_parameters())
    for name, p in module.named_parameters():
        assert ((p - theirs[name]).abs() < 1e-5).double().mean() > 0.99, name
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < out.loss.item()


def test_the_plain_trainer_saves_a_student_with_a_tied_head(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False
    )
    module = distiller(ALL, torch.float32)
    Trainer(module, args, data_collator=tiny.collator()).save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert "student.lm_head.weight" not in saved
    other = distiller(ALL, torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(saved)
    assert_same(dict(other.named_parameters()), dict(module.named_parameters()), rtol=0, atol=0)
    assert other.student.lm_head.weight is other.student.model.embed_tokens.weight


def test_a_state_that_lacks_more_than_the_tied_head_is_refused():
    module = distiller(ALL, torch.float32)
    state = module.state_dict()
    del state["student.model.embed_tokens.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*embed_tokens"):
        module.load_state_dict(state)


def test_accelerate(batch):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    plain = distiller(ALL, torch.float32)
    _, want = gradients(plain, batch)
    module = distiller(ALL, torch.float32)
    loader = torch.utils.data.DataLoader(
        tiny.ROWS, batch_size=len(tiny.ROWS), collate_fn=tiny.collator()
    )
    module, optimizer, loader = accelerator.prepare(
        module, torch.optim.SGD(module.parameters(), lr=1e-3), loader
    )
    (only,) = loader
    accelerator.backward(module(**only).loss)
    assert_same({n: p.grad for n, p in module.named_parameters()}, want)
    before = float(module(**only).loss.detach())
    optimizer.step()
    assert float(module(**only).loss.detach()) < before


@pytest.mark.parametrize("objective", SPAN_RECIPES.values(), ids=SPAN_RECIPES)
def test_bf16_autocast_stays_near_fp32(batch, objective):
    module = distiller(objective, torch.float32)
    want, want_grads = gradients(module, batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(**batch)
    module.zero_grad()
    out.loss.backward()
    for name in ("loss", "ce", "cosine", "geometry", "logit"):
        torch.testing.assert_close(out[name], want[name], rtol=3e-2, atol=3e-3)
    for name, p in module.named_parameters():
        assert p.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(p.grad.flatten(), want_grads[name].flatten(), dim=0)
        assert cosine > 0.98, name


def test_a_bf16_teacher_beside_an_fp32_student(batch):
    want = distiller(ALL, torch.float32)(**batch)
    teacher = tiny.teacher_model().to(torch.bfloat16)
    for given in (teacher, TeacherCache(teacher)):
        module = distiller(ALL, torch.float32, teacher=given)
        out, grads = gradients(module, batch)
        torch.testing.assert_close(out.loss, want.loss, rtol=3e-2, atol=0)
        assert all(g.isfinite().all() for g in grads.values())


def test_the_faster_dtype_is_one_that_trains():
    assert faster_dtype() in (torch.float32, torch.bfloat16)
    assert faster_dtype("meta") == torch.bfloat16


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
