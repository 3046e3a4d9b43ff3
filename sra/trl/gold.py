"""The span loss in TRL's `GOLDTrainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sra.chunks import ROWS
from sra.data import IGNORED
from sra.respelling import Places, in_order, in_spans, respelled_kl_of_logits
from sra.trl.samples import Pairs, SampleAligner
from sra.vocabulary import SharedVocabulary
from sra_kernels import span_kl


class SpanULDLoss:
    """A drop-in for the `uld_loss_fn` of TRL's `GOLDTrainer`: exact spans, one distribution each.

    At every byte of the completion where both tokenizers end a token, and before its first token,
    the student's and the teacher's distribution of what comes next are compared on the shared
    vocabulary. Tokenizers may be of any kind, SentencePiece included; set
    ``use_extended_uld=False`` in `GOLDConfig` for those, so that TRL does not refuse them.

    >>> trainer = GOLDTrainer(..., args=GOLDConfig(use_uld_loss=True, use_extended_uld=False))
    >>> trainer.uld_loss_fn = SpanULDLoss.for_trainer(trainer)

    The sums are divided by the number of completion tokens of the whole optimiser step, so that the
    gradient does not depend on how a step is cut into micro-batches.

    Args:
        student_tokenizer, teacher_tokenizer: fast tokenizers.
        temperature, direction, beta: see `sra_kernels.span_kl`.
        outside: see `sra_kernels.span_kl`; or "respell", which says the teacher's predictions in
            the student's tokens, inside spans too (`sra.respelling`), and goes with "forward".
        vocabulary_match: see `SharedVocabulary`.
        crossentropy_weight, distillation_weight: of the two terms of the sum.
        skip_student_eos, skip_teacher_eos: leave out where that side predicts its end of sequence.
        step_tokens: gives the number that sums are divided by; None: the labels of the batch.
        log: called with a name and a value: "span_coverage", "shared_mass".

    Raises:
        TypeError: a tokenizer is not a fast one.
        ValueError: "respell" with another direction than "forward".
    """

    use_extended_uld = False  # GOLDTrainer: make no byte offsets, which need byte-level BPE

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        temperature: float = 1.0,
        direction: Literal["forward", "reverse", "jsd"] = "forward",
        beta: float | None = None,
        outside: Literal["renormalise", "weight", "bucket", "respell"] = "weight",
        vocabulary_match: Literal["raw", "normalised"] = "normalised",
        crossentropy_weight: float = 0.0,
        distillation_weight: float = 1.0,
        skip_student_eos: bool = True,
        skip_teacher_eos: bool = True,
        step_tokens: Callable[[], Tensor | None] | None = None,
        log: Callable[[str, float], None] | None = None,
    ) -> None:
        self.aligner = SampleAligner(
            student_tokenizer, teacher_tokenizer,
            skip_student_eos=skip_student_eos, skip_teacher_eos=skip_teacher_eos,
        )  # fmt: skip
        if outside == "respell" and direction != "forward":
            raise ValueError(
                f'outside = "respell" with direction = {direction!r}: what it does not teach has '
                'no probability, so it goes with "forward" alone. Set beta=0.0 in GOLDConfig.'
            )
        self.options: dict[str, Any] = {
            "temperature": temperature, "direction": direction, "beta": beta, "outside": outside,
        }  # fmt: skip
        self.tokenizers = student_tokenizer, teacher_tokenizer
        self.vocabulary_match = vocabulary_match
        self.crossentropy_weight = crossentropy_weight
        self.distillation_weight = distillation_weight
        self.step_tokens = step_tokens
        self.log = log
        self._vocabulary: SharedVocabulary | None = None

    @classmethod
    def for_trainer(cls, trainer: Any, **changes: Any) -> SpanULDLoss:
        """The loss of a `GOLDTrainer`, by its own configuration, counting over its steps.

        ``beta`` means what it means there: 0 is the forward KL, 1 the reverse, between them the
        generalised Jensen-Shannon divergence. The token merge strategy and hybrid weights have no
        meaning here. The trainer is told not to divide the loss by its accumulation steps.

        Args:
            changes: arguments of this class.

        Raises:
            ValueError: a trainer without ULD, with hybrid loss, with two temperatures or of
                vision-language models.
        """
        args = trainer.args
        if not args.use_uld_loss:
            raise ValueError("This trainer has one tokenizer. Set use_uld_loss=True in GOLDConfig.")
        if args.uld_use_hybrid_loss:
            raise ValueError(
                "The span loss has no unmatched part. Set uld_use_hybrid_loss=False; "
                'outside="bucket" counts what lies outside the shared vocabulary.'
            )
        if args.uld_student_temperature != args.uld_teacher_temperature:
            raise ValueError(
                f"uld_student_temperature = {args.uld_student_temperature} and "
                f"uld_teacher_temperature = {args.uld_teacher_temperature}: the span loss has one "
                "temperature. Set both to the same."
            )
        if trainer._is_vlm:
            raise ValueError("The span loss is for language models without images.")
        directions: dict[float, Any] = {0.0: "forward", 1.0: "reverse"}
        direction = directions.get(args.beta, "jsd")
        options = {
            "temperature": args.uld_student_temperature,
            "direction": direction,
            "beta": args.beta if direction == "jsd" else None,
            "crossentropy_weight": args.uld_crossentropy_weight,
            "distillation_weight": args.uld_distillation_weight,
            "skip_student_eos": args.uld_skip_student_eos,
            "skip_teacher_eos": args.uld_skip_teacher_eos,
            "step_tokens": lambda: _step_tokens(trainer),
            "log": lambda name, value: _mode(trainer)[name].append(value),
        }
        trainer.loss_is_scaled_for_ga = True
        return cls(trainer.processing_class, trainer.teacher_tokenizer, **options | changes)

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_labels: Tensor,
        teacher_labels: Tensor,
        student_input_ids: Tensor,
        teacher_input_ids: Tensor,
        student_byte_offsets: Tensor | None = None,
        teacher_byte_offsets: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            student_logits, teacher_logits: ``[B, Ts, Vs]``, ``[B, Tt, Vt]``.
            student_labels, teacher_labels: ``[B, Ts]``, ``[B, Tt]``: the completion's ids, -100
                elsewhere; label i belongs to the logits of i - 1.
            student_input_ids, teacher_input_ids, student_byte_offsets, teacher_byte_offsets: not
                read; `GOLDTrainer` passes them.
        """
        pairs = [
            self.aligner(*row)
            for row in zip(student_labels.cpu().numpy(), teacher_labels.cpu().numpy(), strict=True)
        ]
        if self.options["outside"] == "respell":
            labels = student_labels, teacher_labels
            kl, mass = self._respelt(student_logits, teacher_logits.detach(), labels, pairs)
        else:
            kl, mass = self._compared(student_logits, teacher_logits.detach(), pairs)
        tokens = None if self.step_tokens is None else self.step_tokens()
        if tokens is None:
            tokens = (student_labels[:, 1:] != IGNORED).sum()
        tokens = tokens.clamp(min=1)
        loss = self.distillation_weight * kl.sum() / tokens
        if self.crossentropy_weight:
            ce = F.cross_entropy(
                student_logits[:, :-1].flatten(0, 1).to(kl.dtype),
                student_labels[:, 1:].flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            loss = loss + self.crossentropy_weight * ce / tokens
        if self.log is not None:
            self.log("span_coverage", float(np.mean([pair.coverage for pair in pairs])))
            if len(mass):
                self.log("shared_mass", float(mass.mean()))
        return loss

    def _compared(
        self, student_logits: Tensor, teacher_logits: Tensor, pairs: list[Pairs]
    ) -> tuple[Tensor, Tensor]:
        """Divergences where both sides predict, and the teacher's shared mass there."""
        shared = self._shared(student_logits, teacher_logits)
        device = student_logits.device
        return span_kl(
            _rows(student_logits, _flat([pair.student for pair in pairs], student_logits)),
            _rows(teacher_logits, _flat([pair.teacher for pair in pairs], teacher_logits)),
            vocab=(shared.student_ids.to(device), shared.teacher_ids.to(device)),
            return_shared_mass=True,
            **self.options,
        )

    def _respelt(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: tuple[Tensor, Tensor],
        pairs: list[Pairs],
    ) -> tuple[Tensor, Tensor]:
        """The same in the student's tokens, inside spans too.

        Among the tokens of spellings alone: what the student said itself is no label that could
        speak for the others.
        """
        spelt = self._shared(student_logits, teacher_logits).trie(student_logits.device)
        own = _flat([pair.student[len(pair.student_spans) :] for pair in pairs], student_logits)
        other = _flat([pair.teacher[len(pair.teacher_spans) :] for pair in pairs], teacher_logits)
        within = in_spans(
            labels[0].where(labels[0] != IGNORED, spelt.size).flatten(),  # no token of a spelling
            labels[1].flatten(),
            _flat([pair.student_spans for pair in pairs], student_logits),
            _flat([pair.teacher_spans for pair in pairs], teacher_logits),
            spelt,
        )
        at = in_order([*within, Places(own, other, torch.zeros_like(own))])

        def of_teacher(rows: Tensor) -> Tensor:
            logits = _rows(teacher_logits, rows)
            return logits.to(torch.promote_types(logits.dtype, torch.float32))

        parts = [_rows(student_logits, at.rows).split(ROWS), *(x.split(ROWS) for x in at)]
        temperature, used = self.options["temperature"], (spelt.used, spelt.used)
        found = [
            respelled_kl_of_logits(logits, of_teacher, Places(*here), spelt, temperature, used)
            for logits, *here in zip(*parts, strict=True)
        ]
        kl, mass = (torch.cat(x) for x in zip(*found, strict=True))
        return kl, mass

    def _shared(self, student_logits: Tensor, teacher_logits: Tensor) -> SharedVocabulary:
        if self._vocabulary is None:
            self._vocabulary = SharedVocabulary(
                *self.tokenizers, match=self.vocabulary_match,
                student_rows=student_logits.shape[-1], teacher_rows=teacher_logits.shape[-1],
            )  # fmt: skip
        return self._vocabulary


def _flat(positions: list[np.ndarray], logits: Tensor) -> Tensor:
    """Positions in each row's sequence as rows of all sequences, one behind the other."""
    length = logits.shape[1]
    rows = [own + i * length for i, own in enumerate(positions)]
    return torch.from_numpy(np.concatenate(rows)).to(logits.device)


def _rows(logits: Tensor, rows: Tensor) -> Tensor:
    return logits[rows // logits.shape[1], rows % logits.shape[1]]


def _step_tokens(trainer: Any) -> Tensor | None:
    """Completion tokens of all micro-batches of a `GOLDTrainer`'s step, over the ranks' mean.

    The mean, because gradients are averaged over ranks. None while it evaluates.
    """
    if not trainer.model.training or trainer._buffered_inputs is None:
        return None
    counts = [(batch["labels"][:, 1:] != IGNORED).sum() for batch in trainer._buffered_inputs]
    total = torch.stack(counts).sum().to(trainer.accelerator.device)
    if trainer.accelerator.num_processes > 1:
        total = trainer.accelerator.gather(total[None]).double().mean()
    return total


def _mode(trainer: Any) -> dict[str, list[float]]:
    return trainer._metrics["train" if trainer.model.training else "eval"]
