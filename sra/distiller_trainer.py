"""What every Trainer of a `SpanDistiller` does: `SRATrainer`, and TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from sra.batch import count_items
from sra.distiller import SpanDistiller
from sra.model import causal_lm
from sra.progress import Speed, peak_gib, reset_peak

PROJECTOR_FILE = "projector.safetensors"
# Means over a batch; the other terms are sums over it, divided by the counts of the step.
SHARES = ("shared_mass", "coverage", "agreement", "bits_per_byte")
TERMS = ("ce", "cosine", "geometry", "logit", "likelihood", *SHARES)


class DistillerTrainer(Trainer):
    """Divides by the counts of whole steps, logs each term of them, and saves the plain student.

    A subclass appends the terms of each micro-batch that it trains on to `_terms`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._terms: list[dict[str, Tensor]] = []
        self._steps = 0  # that _terms are of
        self._speed = Speed()
        super().__init__(*args, **kwargs)

    @property
    def distiller(self) -> SpanDistiller:
        return self.accelerator.unwrap_model(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        reset_peak()
        self._speed = Speed()
        return super().train(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._speed.paused():
            return super()._evaluate(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """The counts of the whole step, over all micro-batches and ranks."""
        self._steps += 1
        counts = self._own_counts(batch_samples).to(device, _wide(device))
        for batch in batch_samples:
            self._speed.add(batch)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(dim=0)
        return counts

    def _own_counts(self, batch_samples: list) -> Tensor:
        """Of this rank."""
        return count_items(batch_samples)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term to what is logged, as it enters the loss of a step."""
        if "loss" in logs and self._terms:
            found = [[terms[name] for terms in self._terms if name in terms] for name in TERMS]
            # Every rank brings all names: one may have had no span to measure agreement on.
            device = self.args.device
            rows = [[sum(map(float, x)), len(x)] for x in found]
            table = torch.tensor(rows, dtype=_wide(device)).to(device)
            table = self.accelerator.reduce(table, "sum")
            # Without it, each rank has divided by its own counts.
            apart = not self.args.average_tokens_across_devices
            steps = self._steps * self.args.world_size**apart
            for name, (value, count) in zip(TERMS, table.tolist(), strict=True):
                if count:
                    logs[name] = value / (count if name in SHARES else steps)
            self._terms.clear()
            self._steps = 0
            logs["tokens_per_second"] = round(self._speed.read() * self.args.world_size, 1)
            if (peak := peak_gib()) is not None:
                logs["peak_gib"] = round(peak, 3)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        given = {}
        if state_dict:  # gathered from the ranks' shards
            given["state_dict"] = _part(state_dict, "student.")
        self.distiller.save_pretrained(folder, **given)
        cast(Any, self.processing_class).save_pretrained(folder)
        projectors = _part(state_dict or self.distiller.state_dict(), "projectors.")
        if projectors:
            save_file(projectors, folder / PROJECTOR_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        student = self.distiller.student
        if hasattr(student, "peft_config"):
            from peft import set_peft_model_state_dict
            from peft.utils import SAFETENSORS_WEIGHTS_NAME

            for name in student.peft_config:
                # PEFT gives an adapter with a name of its own a folder of its own.
                own = folder if name == "default" else folder / name
                saved = load_file(own / SAFETENSORS_WEIGHTS_NAME)
                set_peft_model_state_dict(student, saved, adapter_name=name)
        else:
            kind = type(causal_lm(student))  # no code of the folder is needed, and none is run
            plain = kind.from_pretrained(folder, dtype=student.dtype, use_safetensors=True)
            student.load_state_dict(plain.state_dict())
        if len(self.distiller.projectors):
            self.distiller.projectors.load_state_dict(load_file(folder / PROJECTOR_FILE))

    def _load_best_model(self) -> None:
        """As on resuming: a checkpoint holds the plain student."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _wide(device: torch.device) -> torch.dtype:
    """Of sums that are small enough for float32, which is the widest that Apple's GPUs have."""
    return torch.float32 if device.type == "mps" else torch.float64


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value.contiguous()
        for name, value in state.items()
        if name.startswith(prefix)
    }
