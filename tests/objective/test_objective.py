"""SpanDistiller on padded batches against the plain objective on single samples, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sra import SharedVocabulary, SpanAligner, SpanCollator, SpanDistiller, count_items, recipe
from sra.model import Head
from sra.objective import LayerPair, Objective, span_losses
from tests import tiny
from tests.objective import plain
from tests.real_models import checkpoint

REAL_ROWS = [
    {"prompt": "Name a river.", "completion": "The Nile; it's 6650 km long.\n"},
    {"prompt": "Grüß mich!", "completion": "Grüße, naïve 🐸🎉!"},
]

OTHERS = ("layers", "pooling", "likelihood", "likelihood_temperature")  # have tests of their own


Samples: TypeAlias = list[tuple[plain.Side, plain.Side]]


class Pair(NamedTuple):
    student: Any
    teacher: Any
    collator: SpanCollator
    vocabulary: SharedVocabulary
    rows: Sequence[dict[str, str]]

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        aligner = self.collator.aligner
        return aligner.student_tokenizer, aligner.teacher_tokenizer

    def distiller(self, objective: Objective) -> SpanDistiller:
        torch.manual_seed(0)
        return SpanDistiller(self.student, self.teacher, objective, vocabulary=self.vocabulary)

    def samples(self) -> Samples:
        return [
            plain.sample(self.student, self.teacher, *self.tokenizers, row) for row in self.rows
        ]

    def plain(self, samples: Samples, distiller: SpanDistiller) -> dict[str, Tensor]:
        heads = self.student.get_output_embeddings(), self.teacher.get_output_embeddings()
        return plain.objective(
            samples,
            student_head=heads[0],
            teacher_head=heads[1],
            projector=next(distiller.projectors.parameters(), None),
            vocabulary=plain.shared_ids(*self.tokenizers, *(len(head.weight) for head in heads)),
            spelling=plain.spellings(*self.tokenizers, len(heads[1].weight)),
            **{k: v for k, v in asdict(distiller.objective).items() if k not in OTHERS},
        )


def first_layers(name: str, layers: int) -> Any:
    """A published model's first layers, final norm and head, in float64."""
    path = checkpoint(name)
    config = AutoConfig.from_pretrained(path)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def real() -> tuple[Pair, Samples]:
    names = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"
    tokenizers = [AutoTokenizer.from_pretrained(checkpoint(name)) for name in names]
    student, teacher = first_layers(names[0], 3), first_layers(names[1], 2)
    vocabulary = SharedVocabulary(
        *tokenizers,
        match="raw",
        student_rows=student.config.vocab_size,
        teacher_rows=teacher.config.vocab_size,
    )
    collator = SpanCollator(SpanAligner(*tokenizers))
    pair = Pair(student, teacher, collator, vocabulary, REAL_ROWS)
    return pair, pair.samples()


@pytest.fixture(scope="module")
def small() -> tuple[Pair, Samples]:
    pair = Pair(
        tiny.student_model(torch.float64).eval(),
        tiny.teacher_model(torch.float64),
        tiny.collator(),
        tiny.vocabulary(),
        tiny.ROWS,
    )
    return pair, pair.samples()


def assert_same_terms(objective: Objective, ours: Any, expected: dict[str, Tensor]) -> None:
    weights = {"cosine": objective.cosine, "geometry": objective.gamma, "logit": objective.logit}
    for name, value in expected.items():
        if weights.get(name, 1):
            assert value > 0
            assert getattr(ours, name).item() == pytest.approx(value.item(), rel=1e-9), name


def assert_same_loss(pair: Pair, samples: Samples, objective: Objective) -> None:
    distiller = pair.distiller(objective)
    with torch.no_grad():
        ours = distiller(**pair.collator(pair.rows))
        assert_same_terms(objective, ours, pair.plain(samples, distiller))


@pytest.mark.models
@pytest.mark.parametrize(
    "objective",
    [
        recipe("paper"),
        recipe("boundary"),
        recipe("respell"),
        recipe("paper", outside="bucket", alpha=0.3, gamma=7.0, power=0.5, temperature=1.7),
    ],
    ids=["paper", "boundary", "respell", "bucket"],
)
def test_loss_and_gradient_on_the_real_pair(real, objective):
    """SmolLM2-135M's first 3 layers, Qwen2.5-Coder-0.5B's first 2, their whole heads: the loss to
    1e-9, the gradients of the tied embedding, a query, a feed-forward and a norm and the
    projector to 1e-8."""
    pair, samples = real
    distiller = pair.distiller(objective)
    layers = pair.student.model.layers
    tensors = {
        "embedding": pair.student.model.embed_tokens.weight,
        "query": layers[0].self_attn.q_proj.weight,
        "down": layers[2].mlp.down_proj.weight,
        "norm": pair.student.model.norm.weight,
    }
    if len(distiller.projectors):
        tensors["projector"] = distiller.projectors[0].weight
    ours = distiller(**pair.collator(pair.rows))
    expected = pair.plain(samples, distiller)
    assert_same_terms(objective, ours, expected)
    gradients = zip(
        tensors,
        torch.autograd.grad(ours.loss, [*tensors.values()]),
        torch.autograd.grad(expected["loss"], [*tensors.values()], retain_graph=True),
        strict=True,
    )
    for name, mine, right in gradients:
        assert right.norm() > 0
        assert (mine - right).norm() <= 1e-8 * right.norm(), name


@pytest.mark.parametrize(
    ("logit_state", "outside", "normaliser", "direction"),
    product(
        ("com", "end"),
        ("renormalise", "weight", "bucket"),
        ("sequences", "spans"),
        ("forward", "reverse", "jsd"),
    ),
)
def test_every_switch(small, logit_state, outside, normaliser, direction):
    assert_same_loss(
        *small,
        recipe(
            "paper",
            logit_state=logit_state,
            outside=outside,
            normaliser=normaliser,
            direction=direction,
            beta=0.3 if direction == "jsd" else None,
        ),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 0.0},
        {"gamma": 0.0},
        {"gamma": 3.0, "power": 0.5},
        {"power": 0.0},
        {"power": 2.0},
        {"temperature": 0.8},
        {"cosine": 0.0},
        {"cosine": 4.0, "logit": 0.25},
        {"logit": 0.0},
    ],
    ids=str,
)
def test_every_number(small, changes):
    assert_same_loss(*small, recipe("paper", **changes))


@pytest.mark.parametrize("normaliser", ["sequences", "tokens"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_respelling(small, normaliser, temperature):
    changes = {"normaliser": normaliser, "temperature": temperature, "cosine": 0.5}
    assert_same_loss(*small, recipe("respell", **changes))


def gradient(distiller: SpanDistiller, micro_batches: list[dict[str, Tensor]]) -> list[Tensor]:
    distiller.zero_grad()
    items = count_items(micro_batches)
    for batch in micro_batches:
        distiller(**batch, num_items_in_batch=items).loss.backward()
    return [parameter.grad.clone() for parameter in distiller.parameters()]


@pytest.mark.parametrize("pieces", [2, 4, 8])
@pytest.mark.parametrize("name", ["paper", "boundary", "respell", "cross-entropy"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(small, name, pieces):
    """8 rows of unequal lengths at once, and in 2, 4 and 8 pieces: 1e-12 in float64."""
    pair, _ = small
    distiller = pair._replace(student=copy.deepcopy(pair.student)).distiller(recipe(name))
    whole = gradient(distiller, [pair.collator(pair.rows)])
    size = len(pair.rows) // pieces
    split = [pair.collator(pair.rows[i : i + size]) for i in range(0, len(pair.rows), size)]
    assert len(split) == pieces
    for right, mine in zip(whole, gradient(distiller, split), strict=True):
        assert (mine - right).norm() <= 1e-12 * right.norm()


def test_one_micro_batch_counts_for_itself(small):
    pair, _ = small
    distiller = pair.distiller(recipe("paper"))
    batch = pair.collator(pair.rows)
    with torch.no_grad():
        assert (
            distiller(**batch).loss
            == distiller(**batch, num_items_in_batch=count_items([batch])).loss
        )


@pytest.mark.parametrize("name", ["paper", "boundary", "respell"])
@pytest.mark.parametrize("padding", ["right", "left", "free"])
def test_a_teacher_that_teaches_twice_weighs_once(small, name, padding):
    """Two teachers that are one: every term is a mean over them. And of rows of their own."""
    pair, _ = small
    both = pair.distiller(recipe(name))
    options = {"max_length": pair.collator.max_length, "padding": padding}
    one = SpanCollator(pair.collator.aligner, **options)(pair.rows)
    aligners = [pair.collator.aligner] * 2
    collator = SpanCollator(aligners, **options)
    twin = SpanDistiller(
        both.student, [pair.teacher] * 2, recipe(name), vocabulary=[*both.vocabularies] * 2
    )
    twin.projectors.load_state_dict(
        {f"{i}.weight": layer.weight for i, layer in enumerate([*both.projectors] * 2)}
    )
    with torch.no_grad():
        want = both(**one)
        got = twin(**collator(pair.rows))
        for term in ("loss", "ce", "cosine", "geometry", "logit"):
            assert getattr(got, term).item() == pytest.approx(getattr(want, term).item(), rel=1e-12)
        halves = [{**row, "teacher": str(i % 2)} for i, row in enumerate(pair.rows)]
        got = twin(**collator(halves))
        assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["paper", "boundary", "respell"])
def test_a_long_neighbour_changes_nothing(small, name):
    """One row's terms alone, and as their share of a batch that a long row pads out: 1e-12."""
    pair, _ = small
    distiller = pair.distiller(recipe(name))
    long = {"prompt": "Count.", "completion": ", ".join(map(str, range(60)))}
    alone = [pair.collator([pair.rows[0]]), pair.collator([long])]
    both = pair.collator([pair.rows[0], long])
    assert both["input_ids"].shape[1] > 4 * alone[0]["input_ids"].shape[1]
    items = count_items([both])
    with torch.no_grad():
        together = distiller(**both, num_items_in_batch=items).loss
        apart = sum(distiller(**batch, num_items_in_batch=items).loss for batch in alone)
    assert together.item() == pytest.approx(apart.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["paper", "boundary", "respell"])
def test_what_stands_in_the_padding_changes_nothing(small, name):
    pair, _ = small
    distiller = pair.distiller(recipe(name))
    batch = pair.collator(pair.rows)
    other = {**batch, "teachers": [dict(batch["teachers"][0])]}
    for side in (other, other["teachers"][0]):
        assert (side["attention_mask"] == 0).any()
        side["input_ids"] = torch.where(side["attention_mask"] == 0, 7, side["input_ids"])
    with torch.no_grad():
        assert distiller(**batch).loss.item() == pytest.approx(
            distiller(**other).loss.item(), rel=1e-12
        )


@pytest.mark.parametrize("name", ["paper", "boundary", "respell"])
def test_attention_implementations_agree(small, name):
    """ "eager" forms its softmax in float32, so 1e-6; "exact" (float64) and "sdpa" to 1e-12."""
    pair, _ = small
    models = copy.deepcopy(pair.student), copy.deepcopy(pair.teacher)
    pair = pair._replace(student=models[0], teacher=models[1])
    distiller = pair.distiller(recipe(name))
    batch = pair.collator(pair.rows)
    losses = {}
    for implementation in ("sdpa", "exact", "eager"):
        for model in models:
            model.set_attn_implementation(implementation)
        with torch.no_grad():
            losses[implementation] = distiller(**batch).loss.item()
    assert losses["exact"] == pytest.approx(losses["sdpa"], rel=1e-12)
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-6)


def test_plain_means_are_those_of_even_attention():
    """Where the spans are not weighed either, the attention is then of no account."""
    batch = tiny.collator()(tiny.ROWS)
    (given,) = batch["teachers"]
    torch.manual_seed(0)
    hidden = [torch.randn(x["input_ids"].numel(), 32, dtype=torch.float64) for x in (batch, given)]

    def losses(pooling, masses):
        objective = recipe("paper", pooling=pooling, power=0.0)
        projector = torch.eye(32, dtype=torch.float64)
        return span_losses(
            objective,
            student_hidden=hidden[0], teacher_hidden=hidden[1],
            student_mass=masses[0], teacher_mass=masses[1],
            student_spans=given["student_spans"], teacher_spans=given["teacher_spans"],
            offsets=given["span_offsets"],
            student_head=Head(torch.randn(50, 32, dtype=torch.float64, generator=seeded())),
            teacher_head=Head(torch.randn(50, 32, dtype=torch.float64, generator=seeded())),
            vocabulary=None,
            pairs=[LayerPair(*hidden, *masses, projector)],
        )  # fmt: skip

    def seeded():
        return torch.Generator().manual_seed(3)

    uneven = [torch.rand(len(x), dtype=torch.float64) for x in hidden]
    even = [torch.ones(len(x), dtype=torch.float64) for x in hidden]
    plain, attended = losses("mean", uneven), losses("attention", even)
    for name in ("cosine", "geometry", "logit"):
        torch.testing.assert_close(getattr(plain, name), getattr(attended, name))
        assert getattr(losses("attention", uneven), name) != getattr(plain, name)
