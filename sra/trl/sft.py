"""A `SpanDistiller` in TRL's `SFTTrainer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from sra.distiller_trainer import DistillerTrainer

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(
        f"sra.trl needs TRL 1.16 or newer ({error}). Install it: pip install 'trl>=1.16'."
    ) from error


class SpanSFTTrainer(DistillerTrainer, SFTTrainer):
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

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        terms = {name: value.detach() for name, value in outputs.items() if name != "loss"}
        if model.training:
            self._terms.append(terms)
        else:
            for name, value in terms.items():
                self._metrics["eval"][name].append(float(value))
        return (loss, outputs) if return_outputs else loss
