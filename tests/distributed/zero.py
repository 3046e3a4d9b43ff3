"""Checks of DeepSpeed's ZeRO, on the CPU, in float32: it knows no float64."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from sra import count_items
from sra.model import loaded_whole
from tests.distributed import pairs, runs

if find_spec("deepspeed"):
    import deepspeed

    # Its own all-reduce would be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def stage_2(rank: int, world: int, folder: Path) -> None:
    _gradient(rank, world, stage=2, tied=True)


def stage_3(rank: int, world: int, folder: Path) -> None:
    """Parameters in parts: the head and the projectors are used outside of their own modules."""
    _gradient(rank, world, stage=3, tied=True)


def stage_3_untied(rank: int, world: int, folder: Path) -> None:
    _gradient(rank, world, stage=3, tied=False)


def _gradient(rank: int, world: int, *, stage: int, tied: bool) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed("gloo")
    module = pairs.distiller(2, tied=tied)
    for part in (module, *module.teachers):
        part.float()
    make = pairs.collator(2)
    loss, want = pairs.alone(module, make(pairs.ROUTED))
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=options)
    assert any(p.numel() == 0 for p in module.parameters()) == (stage == 3)
    batch = make(pairs.shares(pairs.ROUTED, rank, world))
    counts = pairs.total(count_items([batch]))
    own = engine(**batch, num_items_in_batch=counts).loss
    torch.testing.assert_close(pairs.total(own.detach().clone()), loss)
    engine.backward(own * world)  # it takes the mean over ranks
    found = {name: safe_get_full_grad(p) for name, p in module.named_parameters()}
    pairs.assert_same(found, want, 1e-6)
    engine.step()
    after = engine(**batch, num_items_in_batch=counts).loss
    assert pairs.total(after.detach().clone()) < loss - 1e-3


def stage_2_run(rank: int, world: int, folder: Path) -> None:
    _run(folder / "2", folder, world, stage=2)


def stage_3_run(rank: int, world: int, folder: Path) -> None:
    _run(folder / "3", folder, world, stage=3)


def _run(own: Path, folder: Path, world: int, *, stage: int) -> None:
    """SRATrainer: the losses of one rank, its score, its checkpoint as plain weights; resuming."""
    want = runs.reference(folder)
    whole = _trainer(own / "whole", world, stage)
    whole.train()
    runs.assert_same_logs(whole, want)
    assert abs(whole.evaluate()["eval_bits_per_byte"] - want["bits"]) < 1e-5
    saved = own / "whole" / "checkpoint-4"
    found = {f"student.{name}": p for name, p in load_file(saved / "model.safetensors").items()}
    projectors = load_file(saved / "projector.safetensors")
    found |= {f"projectors.{name}": p for name, p in projectors.items()}
    pairs.assert_same(found, want["weights"], 1e-6)
    if stage == 3:  # the first run's configuration is still there
        with pytest.raises(ValueError, match="Load it before SRAConfig"):
            _trainer(own / "late", world, stage)
        with loaded_whole(whole.args):
            assert not is_deepspeed_zero3_enabled()
            model = AutoModelForCausalLM.from_pretrained(saved)
            assert not any(hasattr(p, "ds_id") for p in model.parameters())
        assert is_deepspeed_zero3_enabled()
    unset_hf_deepspeed_config()
    again = _trainer(own / "again", world, stage)
    again.train(resume_from_checkpoint=str(own / "whole" / "checkpoint-2"))
    assert abs(again.evaluate()["eval_bits_per_byte"] - want["bits"]) < 1e-5


def _trainer(folder: Path, world: int, stage: int) -> Any:
    optimisation = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,  # of float32 here
    }
    automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping")
    config = {
        **dict.fromkeys((*automatic, "gradient_accumulation_steps"), "auto"),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": optimisation,
    }
    saving = {"save_strategy": "steps", "save_steps": 2}
    batch = runs.STEP // world
    return runs.trainer(folder, batch, dtype=torch.float32, deepspeed=config, **saving)


CHECKS = {
    f"zero: {check.__name__}": check
    for check in (stage_2, stage_3, stage_3_untied, stage_2_run, stage_3_run)
}
