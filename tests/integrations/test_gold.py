"""`SpanULDLoss` in TRL's GOLDTrainer: real runs."""

from __future__ import annotations

import math
import os

import pytest
import torch
from transformers.trainer_callback import PrinterCallback

from sra_kernels import span_kl
from tests import tiny

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

from datasets import Dataset
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.utils import encode_with_byte_offsets

from sra.trl import SpanULDLoss


def gold_trainer(tmp_path, teacher_tokenizer=None, dtype=torch.float32, **options):
    teacher_tokenizer = teacher_tokenizer or tiny.teacher_tokenizer()
    teacher_tokenizer.save_pretrained(tmp_path / "teacher")
    options = {
        "use_uld_loss": True,
        "use_extended_uld": False,
        "beta": 0.0,
        "lmbda": 0.0,
        "max_completion_length": 16,
        "max_length": 128,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | options
    config = GOLDConfig(
        output_dir=str(tmp_path / "run"),
        teacher_tokenizer_name_or_path=str(tmp_path / "teacher"),
        **options,
    )
    made = GOLDTrainer(
        tiny.student_model(dtype),
        tiny.teacher_model(dtype),
        config,
        train_dataset=Dataset.from_list(tiny.ROWS),
        eval_dataset=Dataset.from_list(tiny.ROWS[:4]),
        processing_class=tiny.student_tokenizer(),
    )
    made.pop_callback(PrinterCallback)
    return made


def logged(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


@pytest.mark.parametrize("outside", ["weight", "respell"])
@pytest.mark.parametrize("on_policy", [0.0, 1.0], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_two_steps(tmp_path, kind, on_policy, outside):
    teacher_tokenizer = tiny.sentencepiece_tokenizer() if kind == "sentencepiece" else None
    trainer = gold_trainer(tmp_path, teacher_tokenizer, lmbda=on_policy)
    trainer.uld_loss_fn = SpanULDLoss.for_trainer(trainer, outside=outside)
    before = trainer.evaluate()["eval_loss"]
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 2
    assert all(math.isfinite(x) and x > 0 for x in losses)
    assert all(0.2 < x < 1 for x in logged(trainer, "shared_mass"))
    if outside == "respell" and kind == "byte-level":
        assert all(0.9 < x < 1 for x in logged(trainer, "shared_mass"))
    assert min(logged(trainer, "span_coverage")) > 0.9
    assert any(
        (p - q).abs().max() > 1e-4 for p, q in zip(trainer.model.parameters(), start, strict=True)
    )
    if not on_policy:
        assert trainer.evaluate()["eval_loss"] < before  # fmt: skip


def test_trl_refuses_sentencepiece():
    """What the way around is for; if this fails, TRL aligns them by itself."""
    with pytest.raises(NotImplementedError, match="ByteLevel"):
        encode_with_byte_offsets(tiny.sentencepiece_tokenizer().backend_tokenizer, ["The Nile"])


def test_byte_offsets_of_trl_are_no_hindrance(tmp_path):
    """use_extended_uld=True, as it is by default, where TRL takes both tokenizers."""
    losses = []
    for extended in (False, True):
        trainer = gold_trainer(tmp_path / str(extended), use_extended_uld=extended)
        trainer.uld_loss_fn = SpanULDLoss.for_trainer(trainer)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_accumulation_changes_nothing(tmp_path):
    """4 rows a step as 1, 2 and 4 micro-batches, in float64: the same parameters after 2 steps."""
    ends = []
    for micro in (1, 2, 4):
        trainer = gold_trainer(
            tmp_path / str(micro), dtype=torch.float64, optim="sgd", learning_rate=1.0,
            per_device_train_batch_size=4 // micro, gradient_accumulation_steps=micro,
            uld_crossentropy_weight=0.5, max_grad_norm=1e9,
        )  # fmt: skip
        start = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.uld_loss_fn = SpanULDLoss.for_trainer(trainer)
        trainer.train()
        ends.append(([p.detach() for p in trainer.model.parameters()], logged(trainer, "loss")))
        assert any((p - q).abs().max() > 1e-3 for p, q in zip(ends[-1][0], start, strict=True))
    for parameters, losses in ends[1:]:
        for p, q in zip(parameters, ends[0][0], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
        assert losses == pytest.approx(ends[0][1], rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_beta_means_what_it_means_there(tmp_path, beta):
    options = SpanULDLoss.for_trainer(gold_trainer(tmp_path, beta=beta)).options
    student, teacher = (torch.randn(3, 20, dtype=torch.float64) for _ in range(2))
    theirs = GOLDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="batchmean")
    torch.testing.assert_close(span_kl(student, teacher, **options).mean(), theirs)


def test_changes_come_before_the_configuration(tmp_path):
    loss = SpanULDLoss.for_trainer(gold_trainer(tmp_path), outside="bucket", temperature=2.0)
    assert loss.options["outside"] == "bucket"
    assert loss.options["temperature"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uld_use_hybrid_loss": True}, "no unmatched part"),
        ({"uld_teacher_temperature": 2.0}, "one temperature"),
        ({"use_uld_loss": False}, "Set use_uld_loss=True"),
    ],
)
def test_what_it_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SpanULDLoss.for_trainer(gold_trainer(tmp_path, **options))
