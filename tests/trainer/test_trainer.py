"""SRATrainer on a tiny pair: what it learns, logs, saves and shows, and how it goes on."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
)

from sra import SRAConfig, TeacherCache, bits_per_byte
from sra.distiller_trainer import _wide
from sra.run_record import last_checkpoint
from tests import tiny
from tests.distiller.cases import assert_same
from tests.trainer.cases import logged, trainer, weights


@pytest.mark.parametrize("recipe", ["cross-entropy", "paper", "boundary", "respell"])
def test_it_learns(tmp_path, recipe):
    run = trainer(tmp_path, recipe=recipe, outside=None, max_steps=8, per_device_train_batch_size=8)
    before = run.evaluate()["eval_bits_per_byte"]
    run.train()
    losses = logged(run, "loss")
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.1
    assert run.evaluate()["eval_bits_per_byte"] < before - 0.1


def test_it_logs_each_term(tmp_path):
    run = trainer(tmp_path)
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 5, 6]
    for log in logs:
        span = log["cosine"] + 1.0 * log["geometry"] + log["logit"]
        # transformers rounds nothing, but adds up in float32.
        assert log["loss"] == pytest.approx(0.5 * log["ce"] + 0.5 * span, rel=1e-4)
        assert 0 < log["shared_mass"] < 1
        assert log["coverage"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("every", [1, 3])
def test_terms_are_of_steps_not_of_micro_batches(tmp_path, every):
    """8 rows in 4 batches, 3 to a step: the second step of an epoch has one batch."""
    run = trainer(
        tmp_path, gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=3,
        logging_steps=every, learning_rate=0.0, projector_learning_rate=0.0,
    )  # fmt: skip
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 6 // every
    for log in logs:
        span = log["cosine"] + 1.0 * log["geometry"] + log["logit"]
        assert log["loss"] == pytest.approx(0.5 * log["ce"] + 0.5 * span, rel=1e-4)
        assert log["ce"] == pytest.approx(5.8, abs=0.3)  # log 328: an untrained student


def test_a_share_of_the_run_between_two_logs(tmp_path):
    """`logging_steps` under 1: agreement is measured on the steps that are logged, and no other."""
    run = trainer(tmp_path, logging_steps=0.5, max_steps=6)
    measured = []
    forward = run.distiller.forward

    def record(*args, **kwargs):
        measured.append(run.distiller.agreement_spans > 0)
        return forward(*args, **kwargs)

    run.distiller.forward = record
    run.train()
    assert measured == [False, False, True] * 2
    assert len(logged(run, "agreement")) == 2


def test_sums_are_as_wide_as_the_device_has_them(tmp_path, monkeypatch):
    assert _wide(torch.device("cpu")) == torch.float64
    assert _wide(torch.device("mps")) == torch.float32
    run = trainer(tmp_path, max_steps=1)
    monkeypatch.setattr("sra.distiller_trainer._wide", lambda device: torch.float32)
    batch = run.data_collator(tiny.ROWS)
    assert run._get_num_items_in_batch([batch], torch.device("cpu")).dtype == torch.float32
    run.train()
    assert logged(run, "ce")


def test_evaluate_is_bits_per_byte(tmp_path):
    run = trainer(tmp_path)
    student, tokenizer = run.distiller.student, tiny.student_tokenizer()
    want = bits_per_byte(student, tokenizer, tiny.ROWS[:4])
    assert run.evaluate()["eval_bits_per_byte"] == pytest.approx(want, rel=1e-6)
    other = run.evaluate(tiny.ROWS[4:], metric_key_prefix="other")
    want = bits_per_byte(student, tokenizer, tiny.ROWS[4:])
    assert other["other_bits_per_byte"] == pytest.approx(want, rel=1e-6)
    assert logged(run, "eval_bits_per_byte")


def test_several_sets_of_held_out_rows(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=6, load_best_model_at_end=True,
                  metric_for_best_model="eval_en_bits_per_byte", save_strategy="steps",
                  save_steps=6)  # fmt: skip
    assert run.args.greater_is_better is False
    sets = {"en": tiny.ROWS[:4], "zh": tiny.ROWS[4:5]}
    run.eval_dataset = sets
    run.train()
    metrics = run.evaluate()
    student, tokenizer = run.distiller.student, tiny.student_tokenizer()
    for name, rows in sets.items():
        want = pytest.approx(bits_per_byte(student, tokenizer, rows), rel=1e-6)
        assert metrics[f"eval_{name}_bits_per_byte"] == want
        assert logged(run, f"eval_{name}_bits_per_byte") == [want, want]


def test_it_evaluates_while_training(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    run.train()
    assert [log["step"] for log in run.state.log_history if "eval_bits_per_byte" in log] == [
        2,
        4,
        6,
    ]


@pytest.mark.parametrize("recipe", ["paper", "boundary", "respell"])
def test_accumulation_changes_nothing(tmp_path, recipe):
    """8 rows a step as 1, 2 and 4 micro-batches, in float64: the same parameters after 2 steps."""
    ends = []
    for micro in (1, 2, 4):
        run = trainer(
            tmp_path / str(micro), dtype=torch.float64, recipe=recipe, outside=None, max_steps=2,
            per_device_train_batch_size=8 // micro, gradient_accumulation_steps=micro,
            optim="sgd", max_grad_norm=1.0, learning_rate=0.1,
        )  # fmt: skip
        assert next(run.distiller.parameters()).dtype == torch.float64
        start = weights(run)
        run.train()
        ends.append((weights(run), logged(run, "loss"), logged(run, "ce")))
        assert any((ends[-1][0][n] - start[n]).abs().max() > 1e-4 for n in start)
    for end in ends[1:]:
        assert_same(end[0], ends[0][0], rtol=0, atol=1e-9)
        assert end[1] == pytest.approx(ends[0][1], rel=1e-6)
        assert end[2] == pytest.approx(ends[0][2], rel=1e-6)


def test_the_projector_has_its_own_rate_on_the_same_schedule(tmp_path):
    class Rates(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            self.seen.append([group["lr"] for group in optimizer.param_groups])

    run = trainer(tmp_path)
    rates = Rates()
    run.add_callback(rates)
    run.train()
    groups = run.optimizer.param_groups
    projector = run.distiller.projectors[0].weight
    assert [any(p is projector for p in g["params"]) for g in groups] == [False, False, True]
    assert groups[2]["weight_decay"] == 0
    held = sum(len(g["params"]) for g in groups)
    assert held == len(list(run.distiller.parameters()))
    # Linear: up in 2 steps, down in 4. The projector's is twice the student's all along.
    shape = [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert [r[0] for r in rates.seen] == pytest.approx([3e-3 * x for x in shape])
    assert [r[2] for r in rates.seen] == pytest.approx([6e-3 * x for x in shape])


def test_the_seed_decides_everything(tmp_path):
    ends = []
    for seed in (3, 3, 4):
        torch.manual_seed(torch.seed() % 1000)  # whatever was drawn before
        run = trainer(tmp_path / str(seed), seed=seed, max_steps=2)
        start = weights(run)["projectors.0.weight"]
        run.train()
        ends.append((start, weights(run), logged(run, "loss")))
    assert torch.equal(ends[0][0], ends[1][0])
    assert_same(ends[0][1], ends[1][1], rtol=0, atol=0)
    assert ends[0][2] == ends[1][2]
    assert not torch.equal(ends[0][0], ends[2][0])
    assert ends[0][2] != ends[2][2]


def test_a_cached_teacher_trains_to_the_same(tmp_path):
    runs = [
        trainer(tmp_path / name, dtype=torch.float64, teacher=teacher, optim="sgd", max_steps=4)
        for name, teacher in (
            ("live", tiny.teacher_model(torch.float64)),
            ("cached", TeacherCache(tiny.teacher_model(torch.float64))),
        )
    ]
    for run in runs:
        run.train()
    assert_same(weights(runs[1]), weights(runs[0]), rtol=0, atol=1e-9)
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-6)


def test_bf16_autocast(tmp_path):
    runs = [trainer(tmp_path / str(bf16), bf16=bf16) for bf16 in (False, True)]
    for run in runs:
        run.train()
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=0.05)
    assert all(p.dtype == torch.float32 for p in runs[1].distiller.parameters())


# --- checkpoints ---


def test_a_checkpoint_is_a_plain_student_and_the_projector(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert [f.name for f in folders] == ["checkpoint-3", "checkpoint-6"]
    now = weights(run)
    loaded = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    student = {f"student.{n}": p.detach() for n, p in loaded.named_parameters()}
    assert_same(student | {"projectors.0.weight": now["projectors.0.weight"]}, now, rtol=0, atol=0)
    saved = load_file(folders[1] / "projector.safetensors")
    assert torch.equal(saved["0.weight"], now["projectors.0.weight"])
    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    text = tiny.ROWS[2]["completion"]
    assert tokenizer(text).input_ids == tiny.student_tokenizer()(text).input_ids
    teacher_width = 48
    for name, x in load_file(folders[1] / "model.safetensors").items():
        assert teacher_width not in x.shape or name.split(".")[-2] in (
            "up_proj", "gate_proj", "down_proj"  # the student's own width of 48
        ), name  # fmt: skip


def test_without_a_projector_none_is_saved(tmp_path):
    run = trainer(tmp_path, recipe="cross-entropy", outside=None, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student" / "projector.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "student")


def test_adapters_with_names_of_their_own_go_on(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    options = {"recipe": "respell", "outside": None, "save_strategy": "steps", "save_steps": 3}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])

    def adapted():
        torch.manual_seed(0)
        run = trainer(tmp_path, **options)
        student = peft.get_peft_model(run.distiller.student, config, adapter_name="mine")
        student.add_adapter("default", config)
        run.distiller.student = student
        return run

    run = adapted()
    run.train()
    assert (tmp_path / "checkpoint-6" / "mine").is_dir()
    (tmp_path / "checkpoint-6").rename(tmp_path / "later")
    again = adapted()
    again.train(resume_from_checkpoint=True)
    ours, theirs = weights(again), weights(run)
    assert any("lora_B.mine" in name and x.any() for name, x in theirs.items())
    assert_same(ours, theirs, rtol=0, atol=0)


class StopAt(TrainerCallback):
    """Leaves the training loop as an error would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_plateau_is_one_of_bits_per_byte(tmp_path):
    config = SRAConfig(
        str(tmp_path), lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch", use_cpu=True
    )
    assert (config.metric_for_best_model, config.greater_is_better) == ("bits_per_byte", False)
    other = SRAConfig(str(tmp_path), use_cpu=True)
    assert (other.metric_for_best_model, other.greater_is_better) == (None, None)


@pytest.mark.parametrize("metric", [None, "eval_bits_per_byte"])
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, metric):
    """Best by bits per byte, of which less is better; projectors come back too."""
    run = trainer(
        tmp_path, max_steps=50, learning_rate=0.3, warmup_steps=0, load_best_model_at_end=True,
        metric_for_best_model=metric, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    run.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    run.train()
    bits = logged(run, "eval_bits_per_byte")
    assert len(bits) == bits.index(min(bits)) + 3 < 25
    best = tmp_path / f"checkpoint-{2 * (bits.index(min(bits)) + 1)}"
    assert run.state.best_model_checkpoint == str(best)
    assert run.evaluate()["eval_bits_per_byte"] == pytest.approx(min(bits), rel=1e-6)
    (projector,) = run.distiller.projectors
    (saved,) = load_file(best / "projector.safetensors").values()
    assert torch.equal(projector.weight, saved)


@pytest.mark.parametrize("recipe", ["cross-entropy", "paper", "boundary", "respell"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_where_the_other_does(tmp_path, recipe, accumulate):
    options = {
        "recipe": recipe, "outside": None, "max_steps": 10, "save_strategy": "steps",
        "save_steps": 3, "gradient_accumulation_steps": accumulate, "eval_strategy": "steps",
        "eval_steps": 5,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **options)
    whole.train()

    cut = trainer(tmp_path / "cut", **options)
    cut.add_callback(StopAt(8))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert last_checkpoint(tmp_path / "cut").name == "checkpoint-6"

    resumed = trainer(tmp_path / "cut", **options)
    with torch.no_grad():  # nothing of the new process's start may be left
        for p in resumed.distiller.parameters():
            p.add_(1.0)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "cut")))
    assert_same(weights(resumed), weights(whole), rtol=0, atol=0)
    for key in ("loss", "ce", "cosine", "logit", "learning_rate", "eval_bits_per_byte"):
        assert logged(resumed, key) == logged(whole, key), key


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()  # it is written last
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
