"""Checks of SRATrainer: as many ranks as you like, the run of one."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import PrinterCallback

from sra import SpanDistiller, SRAConfig, SRATrainer, recipe
from sra.data import stream_rows
from tests import tiny
from tests.distributed import pairs
from tests.distributed.ranks import fresh_accelerate

STEP = 4  # rows of an optimiser step, over all ranks and micro-batches


def trainer(folder: Path, batch: int, accumulate: int = 1, **options: Any) -> SRATrainer:
    if options.pop("fresh", True):
        fresh_accelerate()
    options = {
        "recipe": "paper", "gamma": 1.0, "outside": "weight", "max_steps": 4,
        "learning_rate": 0.05, "projector_learning_rate": 0.1, "optim": "sgd", "logging_steps": 2,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "seed": 3, "agreement_spans": 4,
    } | options  # fmt: skip
    rows, dtype = options.pop("rows", tiny.ROWS), options.pop("dtype", torch.float64)
    run = SRATrainer(
        tiny.student_model(dtype),
        options.pop("teacher", None) or tiny.teacher_model(dtype),
        SRAConfig(
            output_dir=str(folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            **options,
        ),
        train_dataset=rows,
        eval_dataset=tiny.ROWS[:4],
        processing_class=tiny.student_tokenizer(),
        teacher_processing_class=tiny.teacher_tokenizer(),
    )
    run.pop_callback(PrinterCallback)
    return run


def weights(run: SRATrainer) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in run.distiller.named_parameters():
        found[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    return found


def logs(run: SRATrainer) -> list[dict[str, float]]:
    names = ("loss", "ce", "cosine", "geometry", "logit", "shared_mass", "coverage")
    return [{n: log[n] for n in names} for log in run.state.log_history if "loss" in log]


def assert_same_run(run: SRATrainer, reference: dict[str, Any]) -> None:
    pairs.assert_same(weights(run), reference["weights"], 1e-9)
    assert_same_logs(run, reference)


def assert_same_logs(run: SRATrainer, reference: dict[str, Any]) -> None:
    ours = logs(run)
    assert len(ours) == len(reference["logs"]) > 0
    for got, want in zip(ours, reference["logs"], strict=True):
        # Shares are means over batches, not over rows: batches differ with the number of ranks.
        for name, value in want.items():
            tolerance = 0.2 if name in ("shared_mass", "coverage") else 1e-5
            assert abs(got[name] - value) <= tolerance * abs(value), (name, got[name], value)


def references(folder: Path, dtype: torch.dtype = torch.float64) -> None:
    """One rank's runs, made before the others start."""
    for step in (STEP, 2 * STEP):
        run = trainer(folder / "alone", step, dtype=dtype)
        start = weights(run)
        run.train()
        end = weights(run)
        assert all((end[name] - start[name]).abs().max() > 1e-5 for name in end)
        kept = {"weights": end, "logs": logs(run), "bits": run.evaluate()["eval_bits_per_byte"]}
        torch.save(kept, folder / f"alone-{step}.pt")


def reference(folder: Path, step: int = STEP) -> dict[str, Any]:
    return torch.load(folder / f"alone-{step}.pt")


def assert_same_score(run: SRATrainer, want: dict[str, Any]) -> None:
    assert abs(run.evaluate()["eval_bits_per_byte"] - want["bits"]) < 1e-9


def one_micro_batch(rank: int, world: int, folder: Path) -> None:
    run = trainer(folder / "one", STEP // world)
    run.train()
    assert_same_run(run, reference(folder))
    assert_same_score(run, reference(folder))


def two_micro_batches(rank: int, world: int, folder: Path) -> None:
    run = trainer(folder / "two", STEP // world, accumulate=2, padding_free=True)
    run.train()
    assert_same_run(run, reference(folder, 2 * STEP))


def means_of_means(rank: int, world: int, folder: Path) -> None:
    """With average_tokens_across_devices=False each rank divides by its own counts; what is logged
    still adds up."""
    run = trainer(folder / "means", 1, average_tokens_across_devices=False, logging_steps=1)
    run.train()
    for log in logs(run):
        span = log["cosine"] + log["geometry"] + log["logit"]
        total = 0.5 * log["ce"] + 0.5 * span
        assert abs(log["loss"] - total) < 1e-4 * total, log


def in_trl(rank: int, world: int, folder: Path) -> None:
    """What SpanSFTTrainer logs of each rank's part adds up to the loss."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if find_spec("trl") is None or find_spec("datasets") is None:
        return
    from datasets import Dataset
    from trl import SFTConfig

    from sra.trl import SpanSFTTrainer

    objective = recipe("boundary", cosine=0.0)
    run = SpanSFTTrainer(
        SpanDistiller(
            tiny.student_model(), tiny.teacher_model(), objective, vocabulary=tiny.vocabulary()
        ),
        SFTConfig(
            output_dir=str(folder / "trl"), dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False, bf16=False, max_steps=2, per_device_train_batch_size=1,
            gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", use_cpu=True,
            disable_tqdm=True, report_to="none",
        ),
        train_dataset=Dataset.from_list(tiny.ROWS),
        data_collator=tiny.collator(),
        processing_class=tiny.student_tokenizer(),
    )  # fmt: skip
    run.pop_callback(PrinterCallback)
    run.train()
    found = [log for log in run.state.log_history if "loss" in log]
    assert len(found) == 2
    for log in found:
        total = objective.alpha * log["ce"]
        total += (1 - objective.alpha) * objective.logit * log["logit"]
        assert abs(log["loss"] - total) < 1e-4 * total, log


def streamed(rank: int, world: int, folder: Path) -> None:
    """Under the Trainer, and in a loop of one's own: all ranks together see each row once."""
    path = folder / "rows.jsonl"
    if rank == 0:
        tiny.write_jsonl(path, tiny.ROWS)
    torch.distributed.barrier()
    seen: list[str] = []
    run = trainer(folder / "streamed", 1, max_steps=8 // world, rows=stream_rows(path))
    collate = run.data_collator

    def record(rows: Any) -> Any:
        seen.extend(row["prompt"] for row in rows)
        return collate(rows)

    run.data_collator = record
    run.train()
    # It reads ahead, into what would be the next epoch.
    every = gathered([*dict.fromkeys(seen)][: 8 // world])
    assert sorted(every) == sorted(row["prompt"] for row in tiny.ROWS)
    own = [row["prompt"] for row in stream_rows(path, rank=rank, world_size=world)]
    assert sorted(gathered(own)) == sorted(every)


def gathered(values: list[str]) -> list[str]:
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def a_rank_without_spans(rank: int, world: int, folder: Path) -> None:
    """The ranks log together, also when one of them has nothing to measure agreement on."""
    long = [{**row, "prompt": "Name a river of Egypt. " * 4} for row in tiny.ROWS[:4]]
    run = trainer(
        folder / "none", 1, rows=long + tiny.ROWS[4:], teacher_max_length=40, min_coverage=0.0,
        logging_steps=1, max_steps=8 // world,
    )  # fmt: skip
    kept = []
    forward = run.distiller.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        kept.append(len(kwargs["teachers"][0]["student_spans"]) > 0)
        return forward(*args, **kwargs)

    run.distiller.forward = record
    run.train()
    steps = [sum(step) for step in zip(*gathered([kept]), strict=True)]
    assert any(0 < count < world for count in steps), steps  # else nothing is tried here
    assert all(0 <= log["agreement"] <= 1 for log in run.state.log_history if "agreement" in log)


def teachers_that_differ(rank: int, world: int, folder: Path) -> None:
    """As they do where rank 0 alone reads weights."""
    teacher = tiny.teacher_model(torch.float64, seed=rank)
    with pytest.raises(RuntimeError, match="teacher's weights differ between ranks"):
        trainer(folder / "differ", 1, teacher=teacher)


def sharded(folder: Path, batch: int, **options: Any) -> SRATrainer:
    """FSDP2 by Accelerate's plugin. Accelerate has it for GPUs alone, so it is told of several;
    devices and the process group stay what they are."""
    fresh_accelerate()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    state = {"use_configured_state": True}
    return trainer(folder, batch, fsdp=True, fresh=False, accelerator_config=state, **options)


def fully_sharded(rank: int, world: int, folder: Path) -> None:
    """Losses, weights and score are those of one rank; a checkpoint holds the plain student."""
    run = sharded(folder / "fsdp", STEP // world, save_strategy="steps", save_steps=2)
    run.train()
    assert run.accelerator.is_fsdp2
    assert all(isinstance(p, DTensor) for p in run.distiller.parameters())
    want = reference(folder)
    assert_same_run(run, want)
    assert_same_score(run, want)
    whole = weights(run)
    saved = folder / "fsdp" / "checkpoint-4"
    student = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64)
    found = {f"student.{name}": p.detach() for name, p in student.named_parameters()}
    projectors = load_file(saved / "projector.safetensors")
    found |= {f"projectors.{name}": p for name, p in projectors.items()}
    pairs.assert_same(found, whole, 0)


def fully_sharded_from_rank_0(rank: int, world: int, folder: Path) -> None:
    """cpu_ram_efficient_loading: the student goes over the meta device; its head is tied anew."""
    config = {"cpu_ram_efficient_loading": True}
    run = sharded(folder / "from-0", STEP // world, fsdp_config=config)
    run.train()
    assert_same_run(run, reference(folder))
    assert_same_score(run, reference(folder))


def fully_sharded_and_resumed(rank: int, world: int, folder: Path) -> None:
    options = {"optim": "adamw_torch", "learning_rate": 1e-3}
    run = sharded(folder / "whole", STEP // world, save_strategy="steps", save_steps=2, **options)
    run.train()
    again = sharded(folder / "again", STEP // world, **options)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    assert again.state.global_step == run.state.global_step == 4
    pairs.assert_same(weights(again), weights(run), 1e-12)


CHECKS = {
    f"trainer: {check.__name__}": check
    for check in (
        one_micro_batch,
        two_micro_batches,
        means_of_means,
        in_trl,
        streamed,
        a_rank_without_spans,
        teachers_that_differ,
        fully_sharded,
        fully_sharded_from_rank_0,
        fully_sharded_and_resumed,
    )
}
