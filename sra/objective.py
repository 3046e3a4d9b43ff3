"""The objective on tensors: centres of mass, their geometry, and span logits. Knows no model.

SRA, arXiv 2605.01205. Symbols: w, a token's attention mass; C_i, the centre of mass of span i;
lambda_i, the salience of span i, from the teacher's mass. docs/method.md has every formula, and
where ours differs from the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sra.likelihood import span_likelihood
from sra.model import Head
from sra.respelling import Labels, respelled_kl
from sra.side import Side
from sra.spelling import Trie
from sra.vocabulary import SharedVocabulary
from sra_kernels import linear_span_kl, span_com, span_geometry


@dataclass(frozen=True)
class Objective:
    """loss = alpha * CE
        + (1 - alpha) * (cosine * L_cos + gamma * L_geo + logit * L_logit + likelihood * L_like).

    The defaults are the paper's. Three switches say how the logit term is formed:

    logit_state: "com" applies both heads to the centres of mass (paper); "end" to the state of each
        span's last token, which on both sides predicts what follows the shared boundary.
    outside: "renormalise" compares inside the shared vocabulary alone (paper); "weight" multiplies
        each span's KL by the teacher's probability of the shared vocabulary; "bucket" makes
        everything outside one more class; "respell" gives the probability of each of the teacher's
        tokens to the student's that spell it, inside spans too (`sra.respelling`); it goes with
        "end" and "forward".
    normaliser: L_logit is a sum over spans divided by the number of "sequences" (paper), "spans" or
        the student's "tokens".

    likelihood, likelihood_temperature: weight and temperature of `sra.likelihood`, a mean over
        spans, which needs no shared vocabulary; not in the paper, whose weight is 0.

    pooling: the centre of a span is the mean of its states by "attention" (paper), or their plain
        "mean". With power = 0 as well, nothing is weighed by attention.

    layers: pairs (student's, teacher's, weight) of the cosine term, which is a mean over them by
        weight; each layer's spans are weighed by that layer's attention. Negative ones count from
        the last, -1, which the other terms use always and whose states are after the final norm.
    """

    alpha: float = 0.5
    gamma: float = 50.0
    power: float = 1.0
    temperature: float = 2.0
    cosine: float = 1.0
    logit: float = 1.0
    direction: Literal["forward", "reverse", "jsd"] = "forward"
    beta: float | None = None
    logit_state: Literal["com", "end"] = "com"
    outside: Literal["renormalise", "weight", "bucket", "respell"] = "renormalise"
    normaliser: Literal["sequences", "spans", "tokens"] = "sequences"
    pooling: Literal["attention", "mean"] = "attention"
    likelihood: float = 0.0
    likelihood_temperature: float = 100.0
    layers: tuple[tuple[int, int, float], ...] = ((-1, -1, 1.0),)

    vocabulary: ClassVar[Any] = SharedVocabulary

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha = {self.alpha}: it is the share of cross-entropy, 0 to 1.")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: it must be positive.")
        if not self.likelihood_temperature > 0:
            raise ValueError(
                f"likelihood_temperature = {self.likelihood_temperature}: it must be positive."
            )
        for name in ("gamma", "cosine", "logit", "power", "likelihood"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it must not be negative.")
        for name, values in (
            ("direction", ("forward", "reverse", "jsd")),
            ("logit_state", ("com", "end")),
            ("outside", ("renormalise", "weight", "bucket", "respell")),
            ("normaliser", ("sequences", "spans", "tokens")),
            ("pooling", ("attention", "mean")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r}: choose one of {', '.join(values)}."
                )
        if self.outside == "respell" and (self.logit_state, self.direction) != ("end", "forward"):
            raise ValueError(
                f'outside = "respell" with logit_state = {self.logit_state!r}, direction = '
                f'{self.direction!r}: it goes with logit_state = "end" and direction = "forward".'
            )
        layers = tuple((int(s), int(t), float(weight)) for s, t, weight in self.layers)
        object.__setattr__(self, "layers", layers)
        if not layers or any(weight <= 0 for _, _, weight in layers):
            raise ValueError(
                f"layers = {self.layers}: give one or more pairs (student's layer, teacher's "
                "layer, weight), with positive weights."
            )
        if (self.direction == "jsd") != (self.beta is not None):
            raise ValueError(
                f"beta = {self.beta} with direction = {self.direction!r}: beta, the teacher's "
                'share of the mixture, belongs to direction = "jsd", which needs it.'
            )
        if self.beta is not None and not 0 < self.beta < 1:
            raise ValueError(f"beta = {self.beta}: it must lie between 0 and 1.")

    @property
    def compares_centres(self) -> bool:
        """Whether a term reads the centres of mass, and so the attention on the tokens."""
        return bool(self.cosine or self.gamma or (self.logit and self.logit_state == "com"))

    @property
    def needs_sides(self) -> bool:
        """Whether a term reads the tokens themselves."""
        return self.likelihood > 0 or self.outside == "respell"

    @property
    def shares_logits(self) -> bool:
        """Whether the logit term forms cross-entropy too, of the same logits of the student."""
        return self.logit > 0 and self.outside == "respell"

    @property
    def needs_teacher(self) -> bool:
        weights = self.cosine, self.gamma, self.logit, self.likelihood
        return self.alpha < 1 and any(weight > 0 for weight in weights)

    def side(self, index: Literal[0, 1]) -> list[int]:
        """Layers to read from the student (0) or a teacher (1): the pairs', and the last."""
        return [*(pair[index] for pair in self.layers if self.cosine), -1]


RECIPES = {
    "cross-entropy": Objective(alpha=1.0),
    "paper": Objective(),
    "boundary": Objective(
        gamma=0.0, temperature=1.0, logit_state="end", outside="weight", normaliser="spans"
    ),
    "respell": Objective(
        alpha=0.2,
        gamma=0.0,
        temperature=1.0,
        cosine=0.0,
        logit_state="end",
        outside="respell",
        normaliser="tokens",
    ),
}

# What docs/evidence.md found best.
DEFAULT = "respell"


def vocabulary_match(name: str) -> Literal["raw", "normalised"]:
    """How a recipe pairs two vocabularies: the paper's by equal strings, all others by equal bytes
    (`SharedVocabulary`)."""
    return "raw" if name == "paper" else "normalised"


def recipe(name: str, **changes: Any) -> Objective:
    """A named objective, with changes.

    "cross-entropy" needs no teacher; "paper" is arXiv 2605.01205 exactly; "boundary" and "respell"
    are ours: they compare predictions where both tokenizers end a token, on the vocabulary that
    both share, and on all of the student's (docs/method.md says why).

    >>> recipe("paper", gamma=10.0)
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}. Choose one of {', '.join(RECIPES)}.")
    known = [field.name for field in fields(Objective)]
    for key in changes:
        if key not in known:
            raise TypeError(f"An objective has no {key!r}. It has {', '.join(known)}.")
    return replace(RECIPES[name], **changes)


class LayerPair(NamedTuple):
    """States and attention mass of one layer on both sides, as in `span_losses`; `projector`
    ``[Dt, Ds]``, student to teacher space; its weight in the cosine term."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    student_mass: Tensor
    teacher_mass: Tensor
    projector: Tensor
    weight: float = 1.0


class SpanLosses(NamedTuple):
    """Sums, not means: the caller divides by the counts of the whole optimiser step.

    shared_mass: the teacher's probability of the shared vocabulary, or of what the student can
        spell, where `outside` computes it.
    ce: of the labels, where the logit term forms it, and its gradient (`Objective.shares_logits`);
        with several teachers, one of them does.
    """

    cosine: Tensor
    geometry: Tensor
    logit: Tensor
    shared_mass: Tensor | None
    likelihood: Tensor
    ce: Tensor | None = None

    def scaled(self, weight: float) -> SpanLosses:
        """Every loss times `weight`; the share of the vocabulary is no loss."""
        return self._replace(
            cosine=weight * self.cosine, geometry=weight * self.geometry,
            logit=weight * self.logit, likelihood=weight * self.likelihood,
        )  # fmt: skip

    def plus(self, other: SpanLosses) -> SpanLosses:
        shared = None
        if self.shared_mass is not None and other.shared_mass is not None:
            shared = self.shared_mass + other.shared_mass
        return SpanLosses(
            self.cosine + other.cosine,
            self.geometry + other.geometry,
            self.logit + other.logit,
            shared,
            self.likelihood + other.likelihood,
            self.ce if other.ce is None else other.ce,
        )


def salience(mass: Tensor, offsets: Tensor, power: float) -> Tensor:
    """lambda [S]: mass^power, normalised to sum 1 within each sample (0 where a sample has none).

    A matrix of membership instead of scatter: no atomics, so the same bits every time.
    """
    raised = mass.pow(power) if power else torch.ones_like(mass)
    index = torch.arange(len(mass), device=mass.device)
    member = (index >= offsets[:-1, None]) & (index < offsets[1:, None])
    total = torch.where(member, raised, 0).sum(dim=1)
    own = (member * total[:, None]).sum(dim=0)
    return torch.where(own > 0, raised / own.clamp(min=torch.finfo(own.dtype).tiny), 0)


def span_losses(
    objective: Objective,
    *,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_mass: Tensor | None,
    teacher_mass: Tensor | None,
    student_spans: Tensor,
    teacher_spans: Tensor,
    offsets: Tensor,
    student_head: Head,
    teacher_head: Head,
    vocabulary: tuple[Tensor, Tensor] | None,
    pairs: Sequence[LayerPair],
    sides: tuple[Side, Side] | None = None,
    spelt: Trie | None = None,
    labels: Labels | None = None,
) -> SpanLosses:
    """The span terms as sums over the batch.

    Args:
        student_hidden, teacher_hidden: ``[N, Ds]``, ``[M, Dt]`` post-final-norm states, rows of all
            sequences flattened. Gradient to the student's only.
        student_mass, teacher_mass: ``[N]``, ``[M]`` attention mass of each row; None if no term
            reads it (`Objective.compares_centres`).
        student_spans, teacher_spans: ``[S, 2]`` row ranges into each.
        offsets: ``[B + 1]``, the spans of each sequence.
        vocabulary: ids ``([K], [K])`` of the shared entries, or None for one vocabulary.
        pairs: the layers of the cosine term.
        sides: student and teacher with their tokens, which the likelihood term and "respell" need.
        spelt: how the student spells the teacher's vocabulary, which "respell" needs; None for one
            vocabulary.
        labels: what "respell" forms cross-entropy of.
    """

    def centres(hidden: Tensor, spans: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Of each span; and its attention mass, which the plain mean does not use."""
        if objective.pooling == "attention":
            return span_com(hidden, spans, mass)
        com, rows = span_com(hidden, spans)
        return com, span_com(mass[:, None], spans)[0][:, 0] * rows

    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    zero = student_hidden.new_zeros((), dtype=wide)
    cosine = geometry = logit = zero
    if objective.compares_centres:
        assert student_mass is not None
        assert teacher_mass is not None
        student_com, _ = centres(student_hidden, student_spans, student_mass)
        teacher_com, span_mass = centres(teacher_hidden, teacher_spans, teacher_mass)
        weight = salience(span_mass, offsets, objective.power).to(wide)
    if objective.cosine:
        for pair in pairs:
            own, other, share = student_com, teacher_com, weight
            if pair.student_hidden is not student_hidden:
                own, _ = centres(pair.student_hidden, student_spans, pair.student_mass)
            if pair.teacher_hidden is not teacher_hidden:
                other, mass = centres(pair.teacher_hidden, teacher_spans, pair.teacher_mass)
                share = salience(mass, offsets, objective.power).to(weight.dtype)
            projected = F.linear(own, pair.projector.to(own.dtype)).to(weight.dtype)
            similarity = F.cosine_similarity(projected, other.to(weight.dtype), dim=-1)
            cosine = cosine + pair.weight * (share * (1 - similarity)).sum()
        cosine = cosine / sum(pair.weight for pair in pairs)
    if objective.gamma:
        geometry = span_geometry(student_com, teacher_com, weight, offsets).sum()
    shared: Tensor | None = None
    ce: Tensor | None = None
    if objective.logit and objective.outside == "respell":
        assert sides is not None
        logit, shared, summed = respelled_kl(*sides, offsets, spelt, objective.temperature, labels)
        ce = None if labels is None else summed
    elif objective.logit:
        if objective.logit_state == "com":
            states = student_com, teacher_com
        else:
            states = (
                student_hidden[student_spans[:, 1] - 1],
                teacher_hidden[teacher_spans[:, 1] - 1],
            )
        options: dict[str, Any] = {
            "temperature": objective.temperature,
            "direction": objective.direction,
            "beta": objective.beta,
            "vocab": vocabulary,
            "outside": objective.outside,
            "reduction": "sum",
            "student_bias": student_head.bias,
            "student_softcap": student_head.softcap,
            "student_scale": student_head.scale,
            "teacher_bias": teacher_head.bias,
            "teacher_softcap": teacher_head.softcap,
            "teacher_scale": teacher_head.scale,
        }
        heads = (
            states[0].to(student_head.weight.dtype), student_head.weight,
            states[1].to(teacher_head.weight.dtype), teacher_head.weight,
        )  # fmt: skip
        if objective.outside == "renormalise":  # the teacher's other rows are not multiplied
            logit = linear_span_kl(*heads, **options)
        else:
            logit, mass = linear_span_kl(*heads, **options, return_shared_mass=True)
            shared = mass.sum()
    likelihood = zero
    if objective.likelihood:
        assert sides is not None
        likelihood = span_likelihood(*sides, objective.likelihood_temperature)
    return SpanLosses(cosine, geometry, logit, shared, likelihood, ce)


def label_weight(objective: Any, counts: Tensor) -> Tensor:
    """Of the sum of cross-entropy, beside the sum of the logit term, in the loss of `combine`."""
    tokens, _, _, of_logit = _divisors(objective, counts)
    return objective.alpha / ((1 - objective.alpha) * objective.logit) * of_logit / tokens


def _divisors(objective: Any, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Label tokens, sequences and spans; and which of these the logit term is divided by."""
    tokens, sequences, spans, told = counts.clamp(min=1).unbind()
    by = {"tokens": told, "sequences": sequences, "spans": spans}
    return tokens, sequences, spans, by[objective.normaliser]


def combine(
    objective: Any, ce: Tensor, terms: SpanLosses | None, counts: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and each term as it enters it.

    Args:
        objective: an `Objective` or a `Baseline`.
        ce: sum of the tokens' negative log-likelihoods.
        counts: ``[4]``, as `count_items` gives them, of the WHOLE optimiser step (with several
            teachers: of all of them together), so that the gradient does not depend on how the step
            is split into micro-batches or ranks.
    """
    tokens, sequences, spans, of_logit = _divisors(objective, counts)
    ce = ce / tokens
    if terms is None:
        return objective.alpha * ce, {"ce": ce}
    cosine, geometry = terms.cosine / sequences, terms.geometry / sequences
    logit = terms.logit / of_logit
    span = objective.cosine * cosine + objective.gamma * geometry + objective.logit * logit
    parts = {"ce": ce, "cosine": cosine, "geometry": geometry, "logit": logit}
    if objective.likelihood:
        likelihood = terms.likelihood / spans
        span = span + objective.likelihood * likelihood
        parts["likelihood"] = likelihood
    return objective.alpha * ce + (1 - objective.alpha) * span, parts
