"""The module in a plain loop, in the Trainer of transformers, in Accelerate, and in bfloat16."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from sra import TeacherCache, recipe
from sra.precision import faster_dtype
from tests import tiny
from tests.distiller.cases import ALL, SPAN_RECIPES, assert_same, distiller, gradients


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


def test_torchs_data_parallel_is_refused(batch):
    """It would cut spans by rows: a forward of one of its copies."""
    copy = distiller(recipe("paper"))._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"DataParallel cuts batches by rows.*torchrun"):
        copy(**batch)


def test_the_faster_dtype_is_one_that_trains():
    assert faster_dtype() in (torch.float32, torch.bfloat16)
    assert faster_dtype("meta") == torch.bfloat16
