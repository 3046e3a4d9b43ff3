"""A `SpanDistiller` in TRL's SFTTrainer: the same training as SRATrainer's."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import PrinterCallback

from sra import SpanDistiller, SRAConfig, SRATrainer, recipe
from tests import tiny

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

from datasets import Dataset
from trl import SFTConfig

from sra.trl import SpanSFTTrainer

OBJECTIVE = recipe("boundary", cosine=0.0)  # the cosine term has a projector of another rate
OPTIONS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.1,
    "optim": "sgd",
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "seed": 3,
}


def sft_trainer(folder, student, teacher, held_out=None, **options):
    torch.manual_seed(0)
    trainer = SpanSFTTrainer(
        SpanDistiller(student, teacher, OBJECTIVE, vocabulary=tiny.vocabulary()),
        SFTConfig(
            output_dir=str(folder), dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False, bf16=False, **OPTIONS | options,
        ),
        train_dataset=Dataset.from_list(tiny.ROWS),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        data_collator=tiny.collator(),
        processing_class=tiny.student_tokenizer(),
    )  # fmt: skip
    trainer.pop_callback(PrinterCallback)
    return trainer


def logged(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


def test_it_trains_as_sra_trainer_does(tmp_path):
    theirs = sft_trainer(
        tmp_path / "sft", tiny.student_model(torch.float64), tiny.teacher_model(torch.float64)
    )
    theirs.train()
    ours = SRATrainer(
        tiny.student_model(torch.float64),
        tiny.teacher_model(torch.float64),
        SRAConfig(
            output_dir=str(tmp_path / "sra"),
            recipe="boundary",
            cosine=0.0,
            vocabulary_match="raw",
            **OPTIONS,
        ),
        train_dataset=tiny.ROWS,
        processing_class=tiny.student_tokenizer(),
        teacher_processing_class=tiny.teacher_tokenizer(),
    )
    ours.pop_callback(PrinterCallback)
    ours.train()
    for key in ("loss", "ce", "logit", "shared_mass"):
        assert len(logged(ours, key)) == 4
        assert logged(theirs, key) == pytest.approx(logged(ours, key), rel=1e-6), key
    pairs = zip(theirs.distiller.parameters(), ours.distiller.parameters(), strict=True)
    for p, q in pairs:
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_a_checkpoint_is_the_plain_student_and_resumes(tmp_path):
    models = tiny.student_model(torch.float64), tiny.teacher_model(torch.float64)
    whole = sft_trainer(tmp_path, *models, save_strategy="steps", save_steps=2)
    whole.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", dtype=torch.float64)
    for p, q in zip(whole.distiller.student.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q)
    again = sft_trainer(tmp_path, tiny.student_model(torch.float64), models[1])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for p, q in zip(again.distiller.parameters(), whole.distiller.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    run = sft_trainer(
        tmp_path, tiny.student_model(), tiny.teacher_model(), max_steps=2, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="step", greater_is_better=False, held_out=tiny.ROWS[:2],
    )  # fmt: skip
    known = run.evaluate
    run.evaluate = lambda *args, **kwargs: known() | {"eval_step": run.state.global_step}
    run.train()
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float32)
    for p, q in zip(run.distiller.student.parameters(), best.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "missing", [{"remove_unused_columns": True}, {"dataset_kwargs": None}], ids=str
)
def test_options_that_lose_the_text(tmp_path, missing):
    options = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options | missing)
    with pytest.raises(ValueError, match="needs the text of each row"):
        SpanSFTTrainer(torch.nn.Linear(1, 1), config)
