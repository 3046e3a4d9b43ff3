"""The student with its teachers as one module whose forward returns the loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sra.agreement import evenly_spaced, top_agreement
from sra.baselines.baseline import Baseline, side_of
from sra.batch import check_teacher_inputs, own_counts, step_counts
from sra.chunks import cross_entropy
from sra.data import IGNORED
from sra.model import (
    Head,
    causal_lm,
    head_of,
    head_rows,
    linear_map,
    state_width,
    trunk_of,
)
from sra.objective import (
    DEFAULT,
    RECIPES,
    LayerPair,
    Objective,
    SpanLosses,
    combine,
    label_weight,
    span_losses,
)
from sra.respelling import Labels
from sra.states import States, model_states, run_trunk, trunk_inputs
from sra.tied import with_tied, without_tied
from sra.vocabulary import SharedVocabulary, check_heads


@dataclass
class DistillerOutput(ModelOutput):
    """Each term as it enters `loss`, before its weight: see `sra.objective`.

    shared_mass: the teacher's probability of the shared vocabulary, or of what the student can
        spell, mean over spans; None for outside="renormalise", which does not compute it.
    coverage: share of the trained text's bytes inside spans.
    agreement: share of a sample of spans at whose ends student and teacher have the same most
        likely entry of the shared vocabulary; None unless `SpanDistiller.agreement_spans` is set.
    bits_per_byte: of the student on the labels of this batch, before the step; None without any.
    """

    loss: Tensor | None = None
    ce: Tensor | None = None
    cosine: Tensor | None = None
    geometry: Tensor | None = None
    logit: Tensor | None = None
    likelihood: Tensor | None = None
    shared_mass: Tensor | None = None
    coverage: Tensor | None = None
    agreement: Tensor | None = None
    bits_per_byte: Tensor | None = None


class SpanDistiller(nn.Module):
    """A student that learns from its labels and, span by span, from one teacher or several.

    Works wherever a module with a loss does: a plain loop, `transformers.Trainer`, TRL, Accelerate,
    Lightning.

    >>> distiller = SpanDistiller(student, teacher, recipe("respell"), vocabulary=vocabulary)
    >>> distiller(**collator(rows)).loss.backward()

    Args:
        student: a causal language model of `transformers`, inside PEFT or not; it is trained.
        teacher: another one, or a `TeacherCache`, or a list of them in the order of the collator's
            aligners. Teachers get no gradient and are in neither `parameters()` nor `state_dict()`;
            each may have a device and a dtype of its own. None if the objective needs none.
        objective: an `Objective`, e.g. `recipe("paper")`, or a method that SRA is compared with,
            e.g. `baseline("uld")`.
        vocabulary: the `SharedVocabulary` of both tokenizers, or a list of one for each teacher;
            None if they have one vocabulary.
        teacher_weights: of each teacher's terms; 1 by default.

    The only parameters beside the student's are the projectors (student to teacher space, linear
    without bias, orthogonal at the start; one for each teacher and pair of layers), and only if the
    objective has a cosine term.

    agreement_spans: spans of each batch at whose ends `DistillerOutput.agreement` is measured; each
        costs a row of both heads.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        student: Any,
        teacher: Any | None,
        objective: Objective | Baseline = RECIPES[DEFAULT],
        *,
        vocabulary: SharedVocabulary | Sequence[SharedVocabulary | None] | None = None,
        teacher_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _warn_if_compiled_in_vain(student)
        self.student = student
        self.config = student.config
        self.objective = objective
        self.agreement_spans = 0
        # In a tuple, so that torch does not register them as parts of this module.
        self.teachers = _each(teacher)
        self.vocabularies: tuple[SharedVocabulary | None, ...] = _each(vocabulary)
        self.teacher_weights = tuple(teacher_weights or [1.0] * len(self.teachers))
        self.projectors = nn.ModuleList()
        self.register_state_dict_post_hook(without_tied)
        self.register_load_state_dict_pre_hook(with_tied)
        if not objective.needs_teacher:
            self.teachers = ()
            return
        self._check_teachers()
        for one, shared in zip(self.teachers, self.vocabularies, strict=True):
            if isinstance(one, nn.Module):
                one.eval().requires_grad_(False)
            if isinstance(objective, Baseline):
                self.projectors.extend(objective.projections(student, one, shared))
            elif objective.cosine:
                self.projectors.extend(self._projector(one, *pair[:2]) for pair in objective.layers)

    def _check_teachers(self) -> None:
        if not self.teachers or None in self.teachers:
            raise ValueError(
                "This objective has span terms, so it needs a teacher. Pass one, or use "
                'recipe("cross-entropy").'
            )
        for name in ("vocabularies", "teacher_weights"):
            if len(getattr(self, name)) != len(self.teachers):
                raise ValueError(
                    f"There are {len(self.teachers)} teachers and {len(getattr(self, name))} "
                    f"{name.replace('_', ' ')}. Pass one for each teacher, in the same order."
                )
        if min(self.teacher_weights) < 0 or not max(self.teacher_weights) > 0:
            raise ValueError(
                f"teacher_weights = {[*self.teacher_weights]}: none may be negative, and one must "
                'be positive. To train without teachers, use recipe("cross-entropy").'
            )
        for teacher, vocabulary in zip(self.teachers, self.vocabularies, strict=True):
            if teacher is self.student:
                raise ValueError(
                    "The student and the teacher are one and the same model; the teacher is "
                    "frozen. Pass copy.deepcopy(student) to learn from where it started."
                )
            check_heads(vocabulary, head_rows(self.student), head_rows(teacher))

    def _projector(self, teacher: Any, own: int, other: int) -> nn.Linear:
        widths = state_width(self.student, own), state_width(teacher, other)
        projector = linear_map(self.student, *widths)
        with torch.no_grad():
            projector.weight.copy_(nn.init.orthogonal_(torch.empty(projector.weight.shape)))
        return projector

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        teachers: Sequence[Mapping[str, Tensor]] = (),
        num_bytes: Tensor | None = None,
        coverage: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> DistillerOutput:
        """The loss of a batch of `SpanCollator`.

        num_items_in_batch: what the sums are divided by: the counts of the whole optimiser step, as
            `count_items` gives them (exact under gradient accumulation); or the number of its label
            tokens alone, as `transformers.Trainer` passes it (the other counts are then taken in
            the proportion of this batch); None: this batch.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel cuts batches by rows, and spans belong to whole ones. Start "
                "a process for each GPU (torchrun), or set CUDA_VISIBLE_DEVICES=0."
            )
        inputs = input_ids, attention_mask, position_ids
        if self.teachers:
            check_teacher_inputs(teachers, len(self.teachers))
            student = model_states(
                self.student, *inputs, layers=self.objective.side(0),
                mass=self.objective.compares_centres,
            )  # fmt: skip
            states = student.hidden[-1]
        else:
            states = run_trunk(self.student, **trunk_inputs(*inputs)).last_hidden_state
        head = head_of(self.student).to(_compute_dtype(states))
        own = own_counts(labels, teachers)
        counts = step_counts(own, num_items_in_batch)
        # Here, where the rows of the labels wait for the device too.
        spells = num_bytes is not None and bool(num_bytes.any())

        terms = agreement = ce = None
        if self.teachers:
            layout = dict(zip(("input_ids", "attention_mask", "position_ids"), inputs, strict=True))
            with_logits = None
            if self.objective.shares_logits:
                behind = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
                with_logits = Labels(behind, label_weight(self.objective, counts))
            terms, agreement = self._span_losses(
                student.rows(), head, layout, teachers, with_logits
            )
            ce = terms.ce
        if ce is None:
            ce = cross_entropy(states, head, labels)
        loss, parts = combine(self.objective, ce, terms, counts)
        shared = None if terms is None else terms.shared_mass
        bits = None
        if num_bytes is not None and spells:
            bits = ce.detach() / math.log(2) / num_bytes.sum()
        return DistillerOutput(
            loss=loss,
            shared_mass=None if shared is None else shared / own[2].clamp(min=1),
            coverage=None if coverage is None else coverage.mean(),
            agreement=agreement,
            bits_per_byte=bits,
            **{name: part.detach() for name, part in parts.items()},
        )

    def _span_losses(
        self,
        student: States,
        head: Head,
        own: Mapping[str, Tensor | None],
        batches: Sequence[Mapping[str, Tensor]],
        labels: Labels | None,
    ) -> tuple[SpanLosses, Tensor | None]:
        """Sums over all teachers by their weights, and the mean agreement.

        labels: of cross-entropy, which one of the teachers' terms then holds.
        """
        sums: list[SpanLosses] = []
        agreements: list[Tensor] = []
        heaviest = self.teacher_weights.index(max(self.teacher_weights))
        for index, (teacher, batch) in enumerate(zip(self.teachers, batches, strict=True)):
            device = student.hidden[-1].device
            batch = {name: x.to(device) for name, x in batch.items()}
            with torch.no_grad():
                states = self._teacher_states(teacher, batch).rows(device)
                teacher_head = head_of(teacher).to_device(device)
            count = len(self.projectors) // len(self.teachers)
            # By name: so DeepSpeed notices that this forward needs them, and gathers them.
            weights = [cast(Tensor, layer.weight) for layer in self.projectors]
            projectors = weights[index * count : (index + 1) * count]
            vocabulary = self.vocabularies[index]
            shared = None
            if vocabulary is not None:
                shared = vocabulary.student_ids.to(device), vocabulary.teacher_ids.to(device)
            mine = student.hidden[-1], head, own, batch["student_spans"]
            others = states.hidden[-1], teacher_head, batch, batch["teacher_spans"]
            objective = self.objective
            if isinstance(objective, Baseline):
                terms = objective.losses(
                    side_of(self.student, *mine),
                    side_of(teacher, *others),
                    batch["span_offsets"],
                    vocabulary,
                    projectors,
                )
            else:
                sides = spelt = its_labels = None
                if labels is not None and index == heaviest:
                    weight = labels.weight / self.teacher_weights[index]
                    its_labels = labels._replace(weight=weight)
                if objective.needs_sides:
                    sides = side_of(self.student, *mine), side_of(teacher, *others)
                if objective.outside == "respell" and vocabulary is not None:
                    spelt = vocabulary.trie(device)
                terms = span_losses(
                    objective,
                    student_hidden=student.hidden[-1],
                    teacher_hidden=states.hidden[-1],
                    student_mass=student.mass[-1] if student.mass else None,
                    teacher_mass=states.mass[-1] if states.mass else None,
                    student_spans=batch["student_spans"],
                    teacher_spans=batch["teacher_spans"],
                    offsets=batch["span_offsets"],
                    student_head=head,
                    teacher_head=teacher_head,
                    vocabulary=shared,
                    pairs=[
                        LayerPair(
                            student.hidden[i], states.hidden[i], student.mass[i], states.mass[i],
                            projector, objective.layers[i][2],
                        )
                        for i, projector in enumerate(projectors)
                    ],
                    sides=sides,
                    spelt=spelt,
                    labels=its_labels,
                )  # fmt: skip
            sums.append(terms.scaled(self.teacher_weights[index]))
            if self.agreement_spans and len(batch["student_spans"]):
                rows = evenly_spaced(len(batch["student_spans"]), self.agreement_spans, device)
                agreements.append(
                    top_agreement(
                        student.hidden[-1][batch["student_spans"][rows, 1] - 1],
                        head,
                        states.hidden[-1][batch["teacher_spans"][rows, 1] - 1],
                        teacher_head,
                        shared,
                    )
                )
        total = sums[0]
        for more in sums[1:]:
            total = total.plus(more)
        return total, torch.stack(agreements).mean() if agreements else None

    def _teacher_states(self, teacher: Any, batch: Mapping[str, Tensor]) -> States:
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        layers, mass = self.objective.side(1), self.objective.compares_centres
        if not isinstance(teacher, nn.Module):
            if inputs["input_ids"].numel():
                return teacher.states(**inputs, layers=layers, mass=mass)
            width = state_width(teacher, -1)
            hidden = batch["input_ids"].new_zeros(1, 1, width, dtype=torch.float32)
            count = len(layers)
            return States((hidden,) * count, (hidden[..., 0],) * count if mass else ())
        if not inputs["input_ids"].numel():
            # No row of this batch is for this teacher. It runs all the same: the shards of one that
            # is sharded are gathered by all ranks together (by `check_packing` too).
            inputs = {n: x.new_zeros(1, 1) for n, x in inputs.items() if n != "attention_mask"}
        device = next(teacher.parameters()).device
        inputs = {name: x.to(device) for name, x in inputs.items()}
        return model_states(teacher, **inputs, layers=layers, mass=mass)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Of the student; a Trainer calls it."""
        self.student.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The same by its newer name."""
        getattr(
            self.student,
            "activation_checkpointing_enable",
            self.student.gradient_checkpointing_enable,
        )(**kwargs)

    def tie_weights(self) -> None:
        """Accelerate calls it, after it has loaded shards."""
        self.student.tie_weights()

    @property
    def _no_split_modules(self) -> Any:
        """FSDP shards the student by its own layers."""
        return causal_lm(self.student)._no_split_modules

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the plain student, which `AutoModelForCausalLM.from_pretrained` loads; of a student
        inside PEFT, its adapter."""
        self.student.save_pretrained(folder, **kwargs)


def _warn_if_compiled_in_vain(student: Any) -> None:
    compiled = hasattr(student, "_orig_mod") or getattr(student, "_compiled_call_impl", None)
    if compiled and trunk_of(student)._compiled_call_impl is None:
        warnings.warn(
            "torch.compile has compiled the student's own forward, which the distiller does not "
            "call: it calls what lies below the head. Use student.base_model.compile() instead.",
            stacklevel=3,
        )


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _compute_dtype(states: Tensor) -> torch.dtype:
    """The dtype in which the heads multiply: autocast's, where it is on."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
