"""For TRL: the span loss in `GOLDTrainer`, and a `SpanDistiller` in `SFTTrainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from sra.alignment import shared_spans
from sra.batch import count_items
from sra.data import IGNORED
from sra.token_bytes import ByteTokenizer, TokenBytes, byte_tokenizer
from sra.trainer import SHARES, SRATrainer
from sra.vocabulary import SharedVocabulary
from sra_kernels import span_kl

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


class Pairs(NamedTuple):
    """Where both sides predict what follows the same byte: positions in one row's sequences.

    student, teacher: int64 [S], positions whose logits are compared.
    coverage: share of the student's completion that lies in spans, by bytes.
    """

    student: np.ndarray
    teacher: np.ndarray
    coverage: float


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
        temperature, direction, beta, outside: see `sra_kernels.span_kl`.
        vocabulary_match: see `SharedVocabulary`.
        crossentropy_weight, distillation_weight: of the two terms of the sum.
        skip_student_eos, skip_teacher_eos: leave out where that side predicts its end of sequence.
        step_tokens: gives the number that sums are divided by; None: the labels of the batch.
        log: called with a name and a value: "span_coverage", "shared_mass".

    Raises:
        TypeError: a tokenizer is not a fast one.
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
        outside: Literal["renormalise", "weight", "bucket"] = "weight",
        vocabulary_match: Literal["raw", "normalised"] = "normalised",
        crossentropy_weight: float = 0.0,
        distillation_weight: float = 1.0,
        skip_student_eos: bool = True,
        skip_teacher_eos: bool = True,
        step_tokens: Callable[[], Tensor | None] | None = None,
        log: Callable[[str, float], None] | None = None,
    ) -> None:
        self.student = byte_tokenizer(student_tokenizer)
        self.teacher = byte_tokenizer(teacher_tokenizer)
        self.options: dict[str, Any] = {
            "temperature": temperature, "direction": direction, "beta": beta, "outside": outside,
        }  # fmt: skip
        self.vocabulary_match = vocabulary_match
        self.crossentropy_weight = crossentropy_weight
        self.distillation_weight = distillation_weight
        self.skip_student_eos = skip_student_eos
        self.skip_teacher_eos = skip_teacher_eos
        self.step_tokens = step_tokens
        self.log = log
        self._vocabulary: tuple[Tensor, Tensor] | None = None

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
            self.pairs(*row)
            for row in zip(student_labels.cpu().numpy(), teacher_labels.cpu().numpy(), strict=True)
        ]
        device = student_logits.device
        compared = [
            logits[_index(rows, device)]
            for logits, rows in (
                (student_logits, [pair.student for pair in pairs]),
                (teacher_logits.detach(), [pair.teacher for pair in pairs]),
            )
        ]
        tokens = None if self.step_tokens is None else self.step_tokens()
        if tokens is None:
            tokens = (student_labels[:, 1:] != IGNORED).sum()
        tokens = tokens.clamp(min=1)
        kl, mass = span_kl(
            *compared,
            vocab=self._shared(student_logits.shape[-1], teacher_logits.shape[-1], device),
            return_shared_mass=True,
            **self.options,
        )
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

    def pairs(self, student_labels: np.ndarray, teacher_labels: np.ndarray) -> Pairs:
        """The positions of one row, int64 [Ts] and [Tt], whose logits are compared."""
        at = [np.flatnonzero(labels != IGNORED) for labels in (student_labels, teacher_labels)]
        ids = [
            labels[own] for labels, own in zip((student_labels, teacher_labels), at, strict=True)
        ]
        student, teacher, length = self._tokens(*ids)
        spans = shared_spans(student, teacher, length=length)
        size = _text_length(student)
        coverage = float(np.diff(np.minimum(spans[2], size)).sum() / size) if size else 1.0
        # Each boundary by the token that follows it: of every span the first, and what is behind
        # the last span.
        follows = [np.append(side[:, 0], side[-1:, 1]) for side in spans[:2]]
        keep = np.ones(len(follows[0]), bool)
        eos = (
            self.student.eos_id if self.skip_student_eos else None,
            self.teacher.eos_id if self.skip_teacher_eos else None,
        )
        for own, own_ids, following, end in zip(at, ids, follows, eos, strict=True):
            keep &= following < len(own)
            known = np.minimum(following, len(own) - 1)
            if len(own):
                keep &= (own[known] > 0) & (own_ids[known] != end)
        return Pairs(at[0][follows[0][keep]] - 1, at[1][follows[1][keep]] - 1, coverage)

    def _tokens(
        self, student_ids: np.ndarray, teacher_ids: np.ndarray
    ) -> tuple[TokenBytes, TokenBytes, int]:
        """Both sides' tokens by the bytes of their common text, and its length."""
        student, teacher = _spelt(self.student, student_ids), _spelt(self.teacher, teacher_ids)
        # A tokenizer with word-start marks puts a space before the text.
        variants = [
            (student, teacher),
            (student, _unspaced(teacher)),
            (_unspaced(student), teacher),
        ]
        lengths = [_common_length(one[1], other[1]) for one, other in variants]
        best = int(np.argmax(lengths))
        one, other = variants[best]
        if lengths[best] >= len(_text(one)):
            return one[0], other[0], lengths[best]
        # A tokenizer that normalises text does not spell it; tokenised again, it says what is what.
        for known in (student, _unspaced(student)):
            again = _retokenised(self.teacher, teacher_ids, _text(known))
            if again is not None:
                return known[0], again, len(_text(known))
        for known in (teacher, _unspaced(teacher)):
            again = _retokenised(self.student, student_ids, _text(known))
            if again is not None:
                return again, known[0], len(_text(known))
        return one[0], other[0], lengths[best]

    def _shared(self, student_rows: int, teacher_rows: int, device: Any) -> tuple[Tensor, Tensor]:
        if self._vocabulary is None:
            shared = SharedVocabulary(
                self.student, self.teacher, match=self.vocabulary_match,
                student_rows=student_rows, teacher_rows=teacher_rows,
            )  # fmt: skip
            self._vocabulary = shared.student_ids.to(device), shared.teacher_ids.to(device)
        return self._vocabulary


def _index(rows: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    batch = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return torch.from_numpy(batch).to(device), torch.from_numpy(np.concatenate(rows)).to(device)


def _spelt(tokenizer: ByteTokenizer, ids: np.ndarray) -> tuple[TokenBytes, bytes]:
    """The tokens at the bytes that they spell by themselves, and those bytes."""
    table = tokenizer.token_bytes
    pieces = [table[i] if i < len(table) else b"" for i in ids.tolist()]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    special = np.isin(ids, list(tokenizer.special_ids))
    return TokenBytes(ids, np.append(0, ends)[: len(ids)], ends, special), b"".join(pieces)


def _unspaced(side: tuple[TokenBytes, bytes]) -> tuple[TokenBytes, bytes]:
    """The same without the space that the first token spells, if it does."""
    tokens, spelt = side
    if not spelt.startswith(b" "):
        return side
    starts, ends = (np.maximum(at - 1, 0) for at in (tokens.starts, tokens.ends))
    return TokenBytes(tokens.ids, starts, ends, tokens.special), spelt[1:]


def _text(side: tuple[TokenBytes, bytes]) -> bytes:
    return side[1][: _text_length(side[0])]


def _text_length(tokens: TokenBytes) -> int:
    """Bytes before the control tokens at the end."""
    text = np.flatnonzero(~tokens.special)
    return int(tokens.ends[text[-1]]) if len(text) else 0


def _common_length(one: bytes, other: bytes) -> int:
    size = min(len(one), len(other))
    a, b = (np.frombuffer(raw[:size], np.uint8) for raw in (one, other))
    differ = np.flatnonzero(a != b)
    return int(differ[0]) if len(differ) else size


def _retokenised(tokenizer: ByteTokenizer, ids: np.ndarray, text: bytes) -> TokenBytes | None:
    """`ids` as tokens of `text`, if they are what the tokenizer makes of it (and an end)."""
    tokens = tokenizer(text.decode(errors="replace"))
    if not len(tokens) or not np.array_equal(tokens.ids, ids[: len(tokens)]):
        return None
    more = len(ids) - len(tokens)
    end = np.full(more, tokens.ends[-1])
    return TokenBytes(
        ids,
        np.append(tokens.starts, end),
        np.append(tokens.ends, end),
        np.append(tokens.special, np.ones(more, bool)),
    )


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
