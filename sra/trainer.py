"""`SRATrainer`: the transformers Trainer with a teacher and spans; it saves the plain student."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from sra.alignment import SpanAligner
from sra.data import SpanCollator, check_coverage, check_row
from sra.distiller import SpanDistiller, count_items
from sra.evaluation import bits_per_byte
from sra.objective import Objective, recipe
from sra.vocabulary import SharedVocabulary

PROJECTOR_FILE = "projector.safetensors"
OBJECTIVE_FIELDS = (
    "alpha",
    "gamma",
    "power",
    "temperature",
    "logit_state",
    "outside",
    "normaliser",
)


@dataclass
class SRAConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what distillation adds; None keeps the recipe's."""

    recipe: str = field(
        default="boundary",
        metadata={"help": 'The objective: "cross-entropy", "paper", "boundary".'},
    )
    alpha: float | None = field(default=None, metadata={"help": "Share of cross-entropy, 0 to 1."})
    gamma: float | None = field(default=None, metadata={"help": "Weight of the geometry term."})
    power: float | None = field(default=None, metadata={"help": "Exponent of span salience."})
    temperature: float | None = field(default=None, metadata={"help": "Of the span logits."})
    logit_state: str | None = field(default=None, metadata={"help": '"com" or "end".'})
    outside: str | None = field(
        default=None, metadata={"help": '"renormalise", "weight" or "bucket".'}
    )
    normaliser: str | None = field(default=None, metadata={"help": '"sequences" or "spans".'})
    vocabulary_match: Literal["raw", "normalised"] = field(
        default="raw", metadata={"help": 'Shared vocabulary: "raw" strings or "normalised".'}
    )
    granularity: Literal["token", "word", "sentence"] = field(
        default="token", metadata={"help": '"token", "word" or "sentence".'}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens kept of each side of a row."})
    min_coverage: float = field(
        default=0.9, metadata={"help": "Refuse to train when spans cover less of the data."}
    )
    projector_learning_rate: float = field(
        default=5e-4, metadata={"help": "Of the projector; it has no weight decay."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator needs the text."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would remove the text. Leave it false.")
        self.objective()

    def objective(self) -> Objective:
        changes = {name: getattr(self, name) for name in OBJECTIVE_FIELDS}
        return recipe(self.recipe, **{k: v for k, v in changes.items() if v is not None})


class SRATrainer(Trainer):
    """Distils `teacher_model` into `model` on rows of `prompt` and `completion`.

    Everything that the transformers Trainer does, it does. Checkpoints hold the plain student,
    which `AutoModelForCausalLM.from_pretrained` loads, and the projector beside it. `evaluate`
    measures held-out bits per byte, which compares across tokenizers.

    Args:
        model, teacher_model: causal language models; the teacher may be a `TeacherCache`, or None
            for the recipe "cross-entropy".
        args: an `SRAConfig`.
        train_dataset, eval_dataset: sequences of ``{"prompt": str, "completion": str}``.
        processing_class, teacher_processing_class: their fast tokenizers.

    Raises:
        ValueError: alignment covers less of the training data than `args.min_coverage`, or a row is
            broken; before anything is written.
    """

    def __init__(
        self,
        model: Any,
        teacher_model: Any | None = None,
        args: SRAConfig | None = None,
        *,
        train_dataset: Sequence[Mapping[str, str]] | None = None,
        eval_dataset: Sequence[Mapping[str, str]] | None = None,
        processing_class: Any,
        teacher_processing_class: Any | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or SRAConfig(output_dir="runs/sra")
        objective = args.objective()
        teacher_tokenizer = teacher_processing_class or processing_class
        aligner = SpanAligner(processing_class, teacher_tokenizer, granularity=args.granularity)
        collator = SpanCollator(aligner, max_length=args.max_length)
        self.coverage: float | None = None
        vocabulary = None
        if train_dataset is not None:
            minimum = args.min_coverage if objective.needs_teacher else 0.0
            coverage = check_coverage(train_dataset, collator, minimum)
            self.coverage = coverage if objective.needs_teacher else None
        for number, row in enumerate(eval_dataset or ()):
            check_row(row, f"Row {number} of eval_dataset")
        if objective.needs_teacher and teacher_model is not None:
            vocabulary = SharedVocabulary(
                processing_class,
                teacher_tokenizer,
                match=args.vocabulary_match,
                student_rows=model.get_output_embeddings().weight.shape[0],
                teacher_rows=teacher_model.get_output_embeddings().weight.shape[0],
            )
        if teacher_model is not None and not args.deepspeed and not args.fsdp:
            teacher_model.to(args.device)  # the Trainer moves the student alone
        self._terms: list[dict[str, Tensor]] = []
        self._steps = 0  # that _terms are of
        set_seed(args.seed)  # the Trainer's own call comes after the projector's random start
        super().__init__(
            model=SpanDistiller(model, teacher_model, objective, vocabulary=vocabulary),
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LiveTerms())

    @property
    def sra_args(self) -> SRAConfig:
        return cast(SRAConfig, self.args)

    @property
    def distiller(self) -> SpanDistiller:
        return self.accelerator.unwrap_model(self.model)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Tokens, sequences and spans of the whole step, over all micro-batches and ranks."""
        self._steps += 1
        counts = count_items(batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(dim=0)
        return counts

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._terms.append({k: v.detach() for k, v in outputs.items() if k != "loss"})
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term to what is logged, as it enters the loss of a step."""
        if "loss" in logs and self._terms:
            for name in self._terms[0]:
                values = torch.stack([terms[name].double() for terms in self._terms])
                # A term is a sum over its micro-batch divided by the counts of the step; the
                # shares are means.
                share = name in ("shared_mass", "coverage")
                logs[name] = float(values.mean() if share else values.sum() / self._steps)
            self._terms.clear()
            self._steps = 0
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Bits per byte of the student on held-out rows."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        bits = bits_per_byte(
            self.distiller.student,
            self.processing_class,
            cast(Iterable[Mapping[str, str]], rows),
            batch_size=self.args.per_device_eval_batch_size,
            max_length=self.sra_args.max_length,
        )
        metrics = {f"{metric_key_prefix}_bits_per_byte": bits}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As usual, but the projector has its own learning rate (SRA trains it faster)."""
        projector = self.distiller.projector
        if projector is None or self.optimizer is not None:
            return super().create_optimizer(model)
        projector.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        projector.requires_grad_(True)
        optimizer.add_param_group(
            {
                "params": list(projector.parameters()),
                "lr": self.sra_args.projector_learning_rate,
                "weight_decay": 0.0,
            }
        )
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.distiller.save_pretrained(folder)
        cast(Any, self.processing_class).save_pretrained(folder)
        if self.distiller.projector is not None:
            save_file({"weight": self.distiller.projector.weight.data}, folder / PROJECTOR_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        student = self.distiller.student
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=student.dtype)
        student.load_state_dict(saved.state_dict())
        if self.distiller.projector is not None:
            self.distiller.projector.load_state_dict(load_file(folder / PROJECTOR_FILE))


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end; None if there is none.

    A run that is killed while it saves leaves a checkpoint without its last file.
    """
    found = {int(path.name[11:]): path for path in Path(folder).glob("checkpoint-[0-9]*")}
    for _, checkpoint in sorted(found.items(), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
            return checkpoint
    return None


class LiveTerms(ProgressCallback):
    """The progress bar, with the latest value of each term at its end."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            shown = ("loss", "ce", "cosine", "geometry", "logit", "eval_bits_per_byte")
            latest = {k.removeprefix("eval_"): f"{logs[k]:.3g}" for k in shown if k in logs}
            if latest:
                self._latest = {**getattr(self, "_latest", {}), **latest}
                self.training_bar.set_postfix(self._latest)
