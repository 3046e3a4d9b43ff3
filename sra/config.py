"""`SRAConfig`: what a run is made of, under the names that transformers and TRL use."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from transformers import TrainingArguments

from sra.baselines import METHODS, Baseline, baseline
from sra.objective import DEFAULT, Objective, recipe, vocabulary_match

OBJECTIVE_FIELDS = (
    "alpha",
    "gamma",
    "power",
    "temperature",
    "cosine",
    "logit",
    "logit_state",
    "outside",
    "normaliser",
    "pooling",
    "likelihood",
    "likelihood_temperature",
    "direction",
    "beta",
)
BITS_PER_BYTE = "bits_per_byte"


@dataclass
class SRAConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what distillation adds; None keeps the recipe's."""

    recipe: str = field(
        default=DEFAULT,
        metadata={"help": 'The objective: "respell", "boundary", "paper", "cross-entropy".'},
    )
    method: str = field(
        default="sra",
        metadata={
            "help": '"sra", by its recipe, or one that it is compared with: '
            + f"{', '.join(METHODS)}."
        },
    )
    alpha: float | None = field(default=None, metadata={"help": "Share of cross-entropy, 0 to 1."})
    gamma: float | None = field(default=None, metadata={"help": "Weight of the geometry term."})
    power: float | None = field(default=None, metadata={"help": "Exponent of span salience."})
    temperature: float | None = field(default=None, metadata={"help": "Of the span logits."})
    cosine: float | None = field(default=None, metadata={"help": "Weight of the cosine term."})
    logit: float | None = field(default=None, metadata={"help": "Weight of the logit term."})
    logit_state: str | None = field(
        default=None,
        metadata={"help": 'Span logits are of centres of mass ("com") or of last states ("end").'},
    )
    outside: str | None = field(
        default=None,
        metadata={
            "help": "What becomes of probability outside of the shared vocabulary: it is left out "
            '("renormalise"), leaves a smaller weight ("weight"), is one more entry ("bucket"), or '
            'is spelt in tokens of the student ("respell").'
        },
    )
    normaliser: str | None = field(
        default=None,
        metadata={"help": 'The logit term is a mean over "sequences", "spans" or "tokens".'},
    )
    pooling: str | None = field(
        default=None, metadata={"help": 'Of the states of a span: "attention" or "mean".'}
    )
    likelihood: float | None = field(
        default=None, metadata={"help": "Weight of the likelihood of the spans' texts."}
    )
    likelihood_temperature: float | None = field(default=None, metadata={"help": "Of that term."})
    direction: str | None = field(
        default=None, metadata={"help": 'KL of the span logits: "forward", "reverse" or "jsd".'}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Share of the teacher in the mixture of jsd, or of GOLD."}
    )
    layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers of the cosine term, each STUDENT:TEACHER or STUDENT:TEACHER:WEIGHT; "
            "negative ones count from the last, -1."
        },
    )
    vocabulary_match: Literal["raw", "normalised"] | None = field(
        default=None,
        metadata={
            "help": 'Entries are shared if their strings ("raw", for the paper\'s recipe) or their '
            'bytes are equal ("normalised", for all else).'
        },
    )
    granularity: Literal["token", "word", "sentence"] = field(
        default="token", metadata={"help": 'Spans: "token", "word" or "sentence".'}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens kept of the student's side."})
    teacher_max_length: int | None = field(
        default=None, metadata={"help": "Tokens kept of the teacher's side (max_length if unset)."}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Sequences one behind the other, without padding, on both sides."},
    )
    train_turns: Literal["assistant", "last", "all"] = field(
        default="assistant",
        metadata={"help": 'Turns of "messages" that are learnt: "assistant", "last", "all".'},
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Of the terms of each teacher, if there are several."}
    )
    min_coverage: float = field(
        default=0.9, metadata={"help": "Refuse to train when spans cover less of the data."}
    )
    agreement_spans: int = field(
        default=32, metadata={"help": "Spans that agreement is measured on when a step is logged."}
    )
    projector_learning_rate: float = field(
        default=5e-4, metadata={"help": "Of the projectors; they have no weight decay."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator needs the text."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept; the older ones are removed."}
    )

    def __post_init__(self) -> None:
        metric, greater = self.metric_for_best_model, self.greater_is_better
        super().__post_init__()
        if metric is None and self.metric_for_best_model:  # the loss, which is not measured
            self.metric_for_best_model = BITS_PER_BYTE
        if greater is None and str(self.metric_for_best_model).endswith(BITS_PER_BYTE):
            self.greater_is_better = False
        if self.n_gpu > 1:  # transformers would cut batches by rows, and spans belong to whole ones
            warnings.warn(
                f"This is one process on a machine with {self.n_gpu} GPUs; it uses one. To use "
                f"all: torchrun --nproc_per_node {self.n_gpu} (of `sra distill`: -m sra.cli "
                "distill ...).",
                stacklevel=2,
            )
            self._n_gpu = 1
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would remove the text. Leave it false.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor = {self.label_smoothing_factor}: a Trainer that smooths "
                "takes the labels away from the distiller, whose loss needs them. Leave it 0; the "
                "teacher's predictions are soft labels."
            )
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha = {self.neftune_noise_alpha}: the noise on the embeddings "
                "would be in the states and logits that the teacher's are compared with. Leave it "
                "unset."
            )
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"min_coverage = {self.min_coverage}: it is a share, 0 to 1.")
        self.objective()
        if self.vocabulary_match is None:
            name = self.recipe if self.method == "sra" else self.method
            self.vocabulary_match = vocabulary_match(name)
        # A batch is made of rows of text: it cannot be cut into the ranks' parts afterwards.
        cast(Any, self.accelerator_config).dispatch_batches = False

    def objective(self) -> Objective | Baseline:
        """The recipe, or the method, with the changes that are set.

        Raises:
            ValueError: a value that is out of its range, with its name.
            TypeError: the method has no such option.
        """
        changes = {name: getattr(self, name) for name in OBJECTIVE_FIELDS}
        layers = ",".join(map(str, self.layers or ())).split(",")
        changes["layers"] = tuple(map(_layer_pair, layers)) if self.layers else None
        changes = {name: value for name, value in changes.items() if value is not None}
        return (
            recipe(self.recipe, **changes)
            if self.method == "sra"
            else baseline(self.method, **changes)
        )


def _layer_pair(text: str) -> tuple[int, int, float]:
    parts = text.split(":")
    try:
        student, teacher, weight = (*parts, "1")[:3] if len(parts) < 4 else parts
        return int(student), int(teacher), float(weight)
    except ValueError:
        raise ValueError(
            f"layers: {text!r} is no pair of layers. Write STUDENT:TEACHER or "
            'STUDENT:TEACHER:WEIGHT, such as "-1:-1" or "10:20:0.5".'
        ) from None
