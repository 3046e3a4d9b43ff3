"""The student with its teacher as one module whose forward returns the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sra.attention import record_attention_mass
from sra.data import IGNORED
from sra.head import Head, head_of
from sra.objective import RECIPES, Objective, SpanLosses, combine, span_losses
from sra.vocabulary import SharedVocabulary


@dataclass
class DistillerOutput(ModelOutput):
    """Each term as it enters `loss`, before its weight: see `sra.objective`.

    shared_mass: the teacher's probability of the shared vocabulary, mean over spans; None for
        outside="renormalise", which does not compute it.
    coverage: share of the completions' bytes inside spans.
    """

    loss: Tensor | None = None
    ce: Tensor | None = None
    cosine: Tensor | None = None
    geometry: Tensor | None = None
    logit: Tensor | None = None
    shared_mass: Tensor | None = None
    coverage: Tensor | None = None


def model_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Post-final-norm states ``[B, T, D]`` and attention mass ``[B, T]`` (fp32, detached).

    The mass is the last layer's attention row of the last real token, summed over heads and
    normalised over the sample's tokens (arXiv 2605.01205), under any attention implementation.
    """
    with record_attention_mass(model) as record:
        states = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
    return states, record.mass


def count_items(batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """``[3]`` float64: label tokens, sequences and spans of the micro-batches of one step."""
    tokens = sequences = spans = 0
    for batch in batches:
        tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
        sequences += len(batch["labels"])
        spans += len(batch["student_spans"])
    return torch.tensor([tokens, sequences, spans], dtype=torch.float64)


class SpanDistiller(nn.Module):
    """A student that learns from its labels and, span by span, from a teacher.

    Works wherever a module with a loss does: a plain loop, `transformers.Trainer`, Accelerate.

    >>> distiller = SpanDistiller(student, teacher, recipe("boundary"), vocabulary=vocabulary)
    >>> distiller(**collator(rows)).loss.backward()

    Args:
        student: a causal language model of `transformers`; it is trained.
        teacher: another one, or a `TeacherCache` over one. It gets no gradient and is in neither
            `parameters()` nor `state_dict()`. None if the objective needs none.
        objective: an `Objective`, e.g. `recipe("paper")`.
        vocabulary: the `SharedVocabulary` of both tokenizers; None if they have one vocabulary.

    The only parameters beside the student's are the projector's (student to teacher space, linear
    without bias, orthogonal at the start), and only if the objective has a cosine term.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        student: Any,
        teacher: Any | None,
        objective: Objective = RECIPES["boundary"],
        *,
        vocabulary: SharedVocabulary | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.config = student.config
        self.objective = objective
        self.vocabulary = vocabulary
        self.projector: nn.Linear | None = None
        # In a tuple, so that torch does not register it as a part of this module.
        self._teacher = (teacher,)
        self.register_state_dict_post_hook(_without_tied)
        self.register_load_state_dict_pre_hook(_with_tied)
        if not objective.needs_teacher:
            return
        if teacher is None:
            raise ValueError(
                "This objective has span terms, so it needs a teacher. Pass one, or use "
                'recipe("cross-entropy").'
            )
        if teacher is student:
            raise ValueError(
                "The student and the teacher are one and the same model; the teacher is frozen. "
                "Pass copy.deepcopy(student) to learn from where it started."
            )
        self._check_vocabulary(teacher)
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
        if objective.cosine:
            width = teacher.config.get_text_config().hidden_size
            weight = next(student.parameters())
            self.projector = nn.Linear(
                student.config.get_text_config().hidden_size,
                width,
                bias=False,
                dtype=weight.dtype,
                device=weight.device,
            )
            with torch.no_grad():
                self.projector.weight.copy_(
                    nn.init.orthogonal_(torch.empty(self.projector.weight.shape))
                )

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def _check_vocabulary(self, teacher: Any) -> None:
        sizes = (
            self.student.get_output_embeddings().weight.shape[0],
            teacher.get_output_embeddings().weight.shape[0],
        )
        if self.vocabulary is None:
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"The student's head has {sizes[0]} rows and the teacher's {sizes[1]}, so they "
                    "do not share one vocabulary. Pass vocabulary=SharedVocabulary("
                    "student_tokenizer, teacher_tokenizer)."
                )
            return
        for side, ids, rows in zip(
            ("student", "teacher"),
            (self.vocabulary.student_ids, self.vocabulary.teacher_ids),
            sizes,
            strict=True,
        ):
            if int(ids.max()) >= rows:
                raise ValueError(
                    f"The shared vocabulary names id {int(ids.max())} of the {side}, whose "
                    f"head has {rows} rows. Build it with {side}_rows={rows}."
                )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        teacher_input_ids: Tensor | None = None,
        teacher_attention_mask: Tensor | None = None,
        student_spans: Tensor | None = None,
        teacher_spans: Tensor | None = None,
        span_offsets: Tensor | None = None,
        coverage: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> DistillerOutput:
        """The loss of a batch of `SpanCollator`.

        num_items_in_batch: what the sums are divided by: ``[3]`` (tokens, sequences, spans) of the
            whole optimiser step, as `count_items` gives them (exact under gradient accumulation);
            or the number of label tokens of the step alone, as `transformers.Trainer` passes it
            (the other two counts are then taken in the proportion of this batch); None: this batch.
        """
        if self.objective.needs_teacher:
            states, mass = model_states(self.student, input_ids, attention_mask)
        else:
            states, mass = (
                self.student.base_model(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=False
                ).last_hidden_state,
                None,
            )
        head = head_of(self.student).to(_compute_dtype(states))
        ce = _cross_entropy(states, head, labels)

        terms = None
        if mass is not None:
            span_inputs = {
                "teacher_input_ids": teacher_input_ids,
                "teacher_attention_mask": teacher_attention_mask,
                "student_spans": student_spans,
                "teacher_spans": teacher_spans,
                "span_offsets": span_offsets,
            }
            given = {name: x for name, x in span_inputs.items() if x is not None}
            if len(given) < len(span_inputs):
                missing = next(name for name in span_inputs if name not in given)
                raise ValueError(
                    f"The batch holds no {missing!r}, which the span terms need. Make batches with "
                    "SpanCollator; a transformers Trainer needs remove_unused_columns=False."
                )
            terms = self._span_losses(states, mass, head, **given)
        spans = 0 if student_spans is None else len(student_spans)
        counts = self._counts(labels, spans, num_items_in_batch)
        loss, parts = combine(self.objective, ce, terms, counts.to(states.device))
        shared = None
        if terms is not None and terms.shared_mass is not None:
            shared = terms.shared_mass / max(spans, 1)
        return DistillerOutput(
            loss=loss,
            shared_mass=shared,
            coverage=None if coverage is None else coverage.mean(),
            **{name: part.detach() for name, part in parts.items()},
        )

    def _span_losses(
        self,
        states: Tensor,
        mass: Tensor,
        head: Head,
        teacher_input_ids: Tensor,
        teacher_attention_mask: Tensor,
        student_spans: Tensor,
        teacher_spans: Tensor,
        span_offsets: Tensor,
    ) -> SpanLosses:
        with torch.no_grad():
            if isinstance(self.teacher, nn.Module):
                teacher_states, teacher_mass = model_states(
                    self.teacher, teacher_input_ids, teacher_attention_mask
                )
            else:
                teacher_states, teacher_mass = self.teacher.states(
                    teacher_input_ids, teacher_attention_mask
                )
            teacher_head = head_of(self.teacher)
        vocabulary = None
        if self.vocabulary is not None:
            vocabulary = (
                self.vocabulary.student_ids.to(states.device),
                self.vocabulary.teacher_ids.to(states.device),
            )
        return span_losses(
            self.objective,
            student_hidden=states.flatten(0, 1),
            teacher_hidden=teacher_states.flatten(0, 1),
            student_mass=mass.flatten(),
            teacher_mass=teacher_mass.flatten(),
            student_spans=student_spans,
            teacher_spans=teacher_spans,
            offsets=span_offsets,
            student_head=head,
            teacher_head=teacher_head,
            vocabulary=vocabulary,
            projector=states if self.projector is None else self.projector.weight,
        )

    @staticmethod
    def _counts(labels: Tensor, spans: int, given: Tensor | int | None) -> Tensor:
        tokens = (labels[:, 1:] != IGNORED).sum().double()
        own = torch.stack(
            [tokens, torch.full_like(tokens, len(labels)), torch.full_like(tokens, spans)]
        )
        if given is None:
            return own
        given = torch.as_tensor(given, dtype=own.dtype, device=own.device)
        return given if given.numel() == 3 else own * given / tokens.clamp(min=1)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the plain student, which `AutoModelForCausalLM.from_pretrained` loads."""
        self.student.save_pretrained(folder, **kwargs)


def _tied(module: nn.Module) -> list[tuple[str, str]]:
    """(name, other name) of each parameter that has two, as a head tied to the embedding has."""
    first: dict[int, str] = {}
    every = module.named_parameters(remove_duplicate=False)
    names = [(first.setdefault(id(p), name), name) for name, p in every]
    return [(name, other) for name, other in names if name != other]


def _without_tied(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A parameter is saved once: safetensors, which Trainers write, refuses shared memory."""
    for _name, other in _tied(module):
        state.pop(prefix + other, None)


def _with_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, other in _tied(module):
        if prefix + name in state:
            state.setdefault(prefix + other, state[prefix + name])


def _compute_dtype(states: Tensor) -> torch.dtype:
    """The dtype in which the heads multiply: autocast's, where it is on."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _cross_entropy(states: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Sum over label tokens. Rows without a label never meet the head."""
    wanted = labels[:, 1:] != IGNORED
    logits = head.logits(states[:, :-1][wanted])
    return F.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum")
