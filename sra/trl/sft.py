"""A `SpanDistiller` in TRL's `SFTTrainer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from sra.batch import count_items
from sra.trainer import SHARES, SRATrainer

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(
        f"sra.trl needs TRL 1.16 or newer ({error}). Install it: pip install 'trl>=1.16'."
    ) from error


class SpanSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` for a `SpanDistiller` as its model, with batches of `SpanCollator`.

    `SFTTrainer` computes cross-entropy by itself and never asks the model for its loss; here the
    loss is the distiller's, over the counts of the whole optimiser step. Checkpoints hold the plain
    student (of a student inside PEFT, its adapter). Needs
    ``dataset_kwargs={"skip_prepare_dataset": True}`` and ``remove_unused_columns=False``.

    Raises:
        ValueError: one of these two is not set.
    """

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        if args.remove_unused_columns or not (args.dataset_kwargs or {}).get(
            "skip_prepare_dataset"
        ):
            raise ValueError(
                "SpanCollator needs the text of each row. Set remove_unused_columns=False and "
                'dataset_kwargs={"skip_prepare_dataset": True} in SFTConfig.'
            )
        model.add_model_tags = model.student.add_model_tags  # which SFTTrainer calls
        super().__init__(model, args, **kwargs)

    # The student and the projectors are saved and loaded as SRATrainer does it.
    distiller = SRATrainer.distiller
    _save = SRATrainer._save
    _load_from_checkpoint = SRATrainer._load_from_checkpoint
    _load_best_model = SRATrainer._load_best_model

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        # A term is a sum over its micro-batch divided by the counts of the step.
        parts = self.current_gradient_accumulation_steps if model.training else 1
        for name, value in outputs.items():
            if name != "loss":
                whole = float(value) * (1 if name in SHARES else parts)
                self._metrics["train" if model.training else "eval"][name].append(whole)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        counts = count_items(batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(dim=0)
        return counts
