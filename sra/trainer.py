"""`SRATrainer`: the transformers Trainer with teachers and spans; it saves the plain student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import ProgressCallback, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sra import run_record
from sra.alignment import SpanAligner
from sra.collator import SpanCollator, check_coverage, sequence_ids
from sra.config import SRAConfig
from sra.data import Passes, RowStream, check_row
from sra.distiller import SpanDistiller
from sra.distiller_trainer import DistillerTrainer
from sra.evaluation import bits_per_byte
from sra.model import call_inside, head_rows, place_teacher
from sra.progress import LiveTerms
from sra.teacher_cache import check_caches

PATIENCE = 50  # batches without enough spans, or steps without a label, before a run is stopped
CHECKED_ROWS = 10_000  # of a larger data set, so many are aligned before the run


class SRATrainer(DistillerTrainer):
    """Distils one teacher or several into `model`.

    Everything that the transformers Trainer does, it does. Checkpoints hold the plain student (or
    its PEFT adapter), which `AutoModelForCausalLM.from_pretrained` loads, and the projectors beside
    it. `evaluate` measures held-out bits per byte, which compares across tokenizers. The run's
    folder also holds run.json: the command, the configuration and the versions.

    Args:
        model: a causal language model; with `peft_config`, or inside PEFT already, its adapter is
            trained.
        teacher_model: another, or a `TeacherCache`, or a list of them; None for the recipe
            "cross-entropy".
        args: an `SRAConfig`.
        train_dataset, eval_dataset: rows as `SpanCollator` takes them: a sequence, a
            `datasets.Dataset`, or for training an iterable that streams. To evaluate on, also
            several sets of rows by their names: {"en": rows} gives eval_en_bits_per_byte.
        processing_class, teacher_processing_class: their fast tokenizers; a list for a list of
            teachers.
        teacher_names: what a row's "teacher" calls them, if it has one; see `SpanCollator`.

    Raises:
        ValueError: alignment covers less of the training data than `args.min_coverage`, or a row is
            broken; before anything is written (of more than 10,000 rows, as many evenly spaced ones
            are looked at; of a stream none, but see below). A row whose prompt fills
            `args.max_length` is left out; `left_out` counts them, of those that were looked at.
        RuntimeError: while training: a loss that is not finite, coverage that stays under
            `args.min_coverage`, a checkpoint that cannot be written. The last whole checkpoint is
            left, to resume from.
    """

    def __init__(
        self,
        model: Any,
        teacher_model: Any | None = None,
        args: SRAConfig | None = None,
        *,
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        processing_class: Any,
        teacher_processing_class: Any | None = None,
        teacher_names: Sequence[str] | None = None,
        peft_config: Any | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or SRAConfig(output_dir="runs/sra")
        objective = args.objective()
        tokenizers = _listed(teacher_processing_class or processing_class)
        collator = SpanCollator(
            [
                SpanAligner(processing_class, tokenizer, granularity=args.granularity)
                for tokenizer in tokenizers
            ],
            max_length=args.max_length,
            teacher_max_length=args.teacher_max_length,
            padding="free" if args.padding_free else "right",
            train_turns=args.train_turns,
            teacher_names=teacher_names,
        )
        self.coverage: float | None = None
        self.left_out: int | None = None
        if train_dataset is not None and hasattr(train_dataset, "__len__"):
            minimum = args.min_coverage if objective.needs_teacher else 0.0
            numbers = _evenly(len(train_dataset), CHECKED_ROWS)
            whole = len(numbers) == len(train_dataset)
            checked = [*train_dataset] if whole else [train_dataset[i] for i in numbers]
            coverage, self.left_out = check_coverage(checked, collator, minimum, numbers)
            check_caches(_listed(teacher_model), collator, checked, objective.side(1))
            self.coverage = coverage if objective.needs_teacher else None
        for place, rows in _held_out(eval_dataset).items():
            for number, row in enumerate(rows):
                check_row(row, f"Row {number} of {place}")
        teachers = _listed(teacher_model) if objective.needs_teacher else [None]
        vocabularies: list[Any] = [None] * len(teachers)
        if teacher_model is not None and objective.needs_teacher:
            if len(teachers) != len(tokenizers):
                raise ValueError(
                    f"There are {len(teachers)} teachers and {len(tokenizers)} tokenizers of "
                    "teachers. Pass teacher_processing_class=[...], one for each, in their order."
                )
            vocabularies = [
                objective.vocabulary(
                    processing_class,
                    tokenizer,
                    match=args.vocabulary_match,
                    student_rows=head_rows(model),
                    teacher_rows=head_rows(teacher),
                )
                for teacher, tokenizer in zip(teachers, tokenizers, strict=True)
            ]
            for teacher in teachers:
                place_teacher(teacher, args.device)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self._barren = 0  # steps without a label, in a row
        self._covered: list[float] = []
        stream = Passes(train_dataset) if isinstance(train_dataset, RowStream) else None
        set_seed(args.seed)  # the Trainer's own call comes after the projectors' random start
        super().__init__(
            model=SpanDistiller(
                model,
                teachers,
                objective,
                vocabulary=vocabularies,
                teacher_weights=args.teacher_weights,
            ),
            args=args,
            data_collator=collator,
            train_dataset=stream or train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LiveTerms())

    @property
    def sra_args(self) -> SRAConfig:
        return cast(SRAConfig, self.args)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's; True resumes from the last whole checkpoint. Half-written ones are
        removed, and the run's record is written first."""
        folder = Path(str(self.args.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(run_record.resumable(folder))
        if resume_from_checkpoint:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            bare = sharded or self.args.save_only_model
            needed = () if bare else (OPTIMIZER_NAME, SCHEDULER_NAME)
            step = run_record.check_checkpoint(str(resume_from_checkpoint), needed)
            if isinstance(self.train_dataset, Passes) and step >= self.args.max_steps:
                self.train_dataset.rows = ()  # the Trainer would make one step more
        if self.args.should_save:
            run_record.remove_halves(folder)
            run_record.write_record(
                folder,
                **run_record.describe_run(self.args.to_dict()),
                student=self.distiller.student.name_or_path,
                teachers=[getattr(t, "name_or_path", None) for t in self.distiller.teachers],
                coverage=self.coverage,
                left_out=self.left_out,
            )
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        except (ValueError, RuntimeError, OSError, EOFError) as error:
            said = run_record.worker_failure(error) if self.args.dataloader_num_workers else None
            if said is None:
                raise
            raise (ValueError if isinstance(error, ValueError) else RuntimeError)(said) from error
        self._check_weights()
        return output

    def _own_counts(self, batch_samples: list) -> Tensor:
        counts = super()._own_counts(batch_samples)
        self._barren = 0 if counts[0] else self._barren + 1
        if self._barren == PATIENCE:
            raise RuntimeError(
                f"There was nothing to learn in {PATIENCE} steps: the prompts of all their rows "
                f"fill max_length = {self.sra_args.max_length}. Raise it."
            )
        return counts

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        every = max(1, self.state.logging_steps)  # which may be given as a share of the run
        logged = (self.state.global_step + 1) % every == 0
        self.distiller.agreement_spans = self.sra_args.agreement_spans if logged else 0
        try:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        except ValueError:  # operations refuse NaN before there is a loss
            self._check_weights()
            raise
        terms = {k: v.detach() for k, v in outputs.items() if k != "loss"}
        if not loss.isfinite():
            self._refuse(terms)
        self._watch_coverage(inputs)
        self._terms.append(terms)
        return (loss, outputs) if return_outputs else loss

    def _refuse(self, terms: Mapping[str, Tensor]) -> None:
        listed = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
        raise RuntimeError(
            f"The loss of step {self.state.global_step + 1} is not finite ({listed}). "
            + run_record.MEND_NAN
        )

    def _check_weights(self) -> None:
        """Raise if a step left weights that are not finite: no checkpoint may hold them."""
        history = self.state.log_history
        run_record.check_weights(self.distiller, self.state.global_step, (history or [{}])[-1])

    def _watch_coverage(self, inputs: Mapping[str, Any]) -> None:
        """Stop when spans cover too little, as data that streams may turn."""
        if not self.distiller.teachers or "coverage" not in inputs:
            return
        shares = inputs["coverage"].tolist()
        self._covered = [*self._covered, sum(shares) / max(len(shares), 1)][-PATIENCE:]
        mean = sum(self._covered) / len(self._covered)
        if len(self._covered) == PATIENCE and mean < self.sra_args.min_coverage:
            worst = min(range(len(shares)), key=shares.__getitem__)
            snippet = cast(Any, self.processing_class).decode(sequence_ids(inputs, worst)[-60:])
            raise RuntimeError(
                f"Spans cover {mean:.1%} of the last {PATIENCE} batches (minimum "
                f"{self.sra_args.min_coverage:.0%}). Worst of the last one, with "
                f"{shares[worst]:.1%}, ends in {snippet!r}. Look at it with `sra align`, or lower "
                "min_coverage and resume."
            )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Bits per byte of the student on held-out rows; of several sets of them, by their names,
        each under its name. What the assistant says is scored, whatever `train_turns` is."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, Mapping):
            found = [
                self.evaluate(own, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, own in rows.items()
            ]
            return {name: value for metrics in found for name, value in metrics.items()}
        bits = call_inside(
            self.distiller,
            bits_per_byte,
            model=self.distiller.student,
            tokenizer=self.processing_class,
            rows=cast(Iterable[Mapping[str, str]], rows),
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
        """As usual, but the projectors have their own learning rate (SRA trains them faster)."""
        projectors = self.distiller.projectors
        if not len(projectors) or self.optimizer is not None:
            return super().create_optimizer(model)
        projectors.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        projectors.requires_grad_(True)
        optimizer.add_param_group(
            {
                "params": list(projectors.parameters()),
                "lr": self.sra_args.projector_learning_rate,
                "weight_decay": 0.0,
            }
        )
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As usual; one that cannot be written to its end is removed."""
        self._check_weights()
        half = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # of an older run: it is the mark of a whole one
            (half / run_record.TRAINER_STATE).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # each writer has its own
            if run_record.is_whole(half):  # what came after it failed
                raise
            raise RuntimeError(run_record.remove_half(half, error)) from error


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _held_out(given: Any) -> dict[str, Any]:
    """Each set of held-out rows, by where it is."""
    if isinstance(given, Mapping):
        return {f"eval_dataset[{name!r}]": rows for name, rows in given.items()}
    return {"eval_dataset": given or ()}


def _evenly(count: int, most: int) -> Sequence[int]:
    """Up to `most` of `count` numbers, evenly spaced."""
    return range(count) if count <= most else [i * count // most for i in range(most)]
