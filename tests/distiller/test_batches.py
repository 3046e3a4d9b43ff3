"""The same gradient whatever the batch looks like: padding, packing, teachers, layers."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

from sra import Objective, SpanAligner, SpanCollator, SpanDistiller, count_items, recipe
from sra.agreement import top_agreement
from sra.model import Head
from sra.states import model_states
from tests import tiny

ALL = recipe("paper", gamma=2.0, outside="weight", layers=((0, 1, 2.0), (-1, -1, 1.0)))


def collator(**options):
    aligner = SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    return SpanCollator(aligner, max_length=256, **options)


def distiller(objective=ALL, teachers=1, student=None, weights=None):
    torch.manual_seed(0)
    given = [tiny.teacher_model(torch.float64, seed=seed) for seed in range(1, 1 + teachers)]
    return SpanDistiller(
        student or tiny.student_model(torch.float64),
        given,
        objective,
        vocabulary=[tiny.vocabulary()] * teachers,
        teacher_weights=weights,
    )


def gradient(module, batch, **more):
    module.zero_grad()
    out = module(**batch, **more)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same(ours, theirs, rtol=1e-9, atol=1e-12):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol)


def family(name):
    """A tiny student: learnt positions, windows, softcaps, scaled embeddings."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": tiny.STUDENT_ROWS, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "sliding_window": 8,
    }  # fmt: skip
    config, dtype, implementation = {
        "llama": (LlamaConfig, torch.float64, "sdpa"),
        "gpt2": (GPT2Config, torch.float64, "sdpa"),
        "mistral": (MistralConfig, torch.float64, "sdpa"),
        # Eager, for its softcap; in float64 its softmax in float32 makes -inf of the mask.
        "gemma2": (Gemma2Config, torch.float32, "eager"),
    }[name]
    return AutoModelForCausalLM.from_config(
        config(**sizes), dtype=dtype, attn_implementation=implementation
    )


@pytest.mark.parametrize("padding", ["left", "free"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_padding_on_a_side_or_none(padding, name):
    module = distiller(student=family(name).eval())
    want, wanted = gradient(module, collator()(tiny.ROWS))
    got, gotten = gradient(module, collator(padding=padding)(tiny.ROWS))
    tolerance = (1e-4, 1e-5) if name == "gemma2" else (1e-9, 1e-12)
    assert_same(dict(got), dict(want), *tolerance)
    assert_same(gotten, wanted, *tolerance)


@pytest.mark.parametrize("padding", ["left", "free"])
def test_cross_entropy_alone_under_any_padding(padding):
    module = distiller(recipe("cross-entropy"), student=family("gpt2").eval())
    _, want = gradient(module, collator()(tiny.ROWS))
    _, got = gradient(module, collator(padding=padding)(tiny.ROWS))
    assert_same(got, want)


@pytest.mark.parametrize("padding", ["right", "left", "free"])
def test_rows_that_are_left_out_change_nothing(padding):
    long = {"prompt": "a long one " * 40, "completion": "short"}
    module, make = distiller(), collator(padding=padding)
    want, wanted = gradient(module, make(tiny.ROWS))
    got, gotten = gradient(module, make([long, *tiny.ROWS[:3], long, *tiny.ROWS[3:]]))
    assert_same(gotten, wanted)
    assert_same(*({k: v for k, v in out.items() if k != "coverage"} for out in (got, want)))
    nothing, zeros = gradient(module, make([long, long]))
    assert nothing.loss == 0
    assert nothing.bits_per_byte is None
    assert not any(grad.any() for grad in zeros.values())


def test_packed_sequences_do_not_see_each_other():
    batch = collator(padding="free")(tiny.ROWS)
    (teacher,) = batch["teachers"]
    model = tiny.teacher_model(torch.float64)
    ids, positions = teacher["input_ids"], teacher["position_ids"]
    starts = (positions[0] == 0).nonzero()[:, 0].tolist()
    assert len(starts) == len(tiny.ROWS)
    with torch.no_grad():
        packed = model_states(model, ids, position_ids=positions)
        for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            alone = model_states(model, ids[:, start:end])
            torch.testing.assert_close(packed.hidden[0][:, start:end], alone.hidden[0])
            torch.testing.assert_close(packed.mass[0][:, start:end], alone.mass[0])
            torch.testing.assert_close(
                packed.mass[0][:, start:end].sum(), torch.ones((), dtype=torch.float64)
            )


@pytest.mark.parametrize("padding", ["right", "free"])
def test_micro_batches_of_any_kind(padding):
    module = distiller(teachers=2)
    make = two_teachers(padding=padding)
    _, want = gradient(module, make(tiny.ROWS))
    parts = [make(tiny.ROWS[:1]), make(tiny.ROWS[1:6]), make(tiny.ROWS[6:])]
    counts = count_items(parts)
    module.zero_grad()
    for part in parts:
        module(**part, num_items_in_batch=counts).loss.backward()
    assert_same({name: p.grad for name, p in module.named_parameters()}, want)


# --- several teachers ---


def two_teachers(**options):
    """Both with one tokenizer here; the collator does not know that."""
    aligners = [SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer()) for _ in range(2)]
    return SpanCollator(aligners, max_length=256, teacher_names=["one", "two"], **options)


def test_two_teachers_are_the_weighted_mean_of_each():
    """Each sees every row, so each has half of the sequences and spans that the sums are divided
    by."""
    both = distiller(teachers=2, weights=[0.5, 1.5])
    want = gradient(both, two_teachers()(tiny.ROWS))[0]
    single = []
    for index, teacher in enumerate(both.teachers):
        alone = distiller(student=both.student)
        alone.teachers = (teacher,)
        pairs = len(ALL.layers)
        alone.projectors = both.projectors[index * pairs : (index + 1) * pairs]
        single.append(alone(**collator()(tiny.ROWS)))
    for name in ("cosine", "geometry", "logit"):
        mean = (0.5 * single[0][name] + 1.5 * single[1][name]) / 2
        torch.testing.assert_close(want[name], mean)
    torch.testing.assert_close(want.ce, single[0].ce)


def test_a_row_goes_to_the_teacher_that_it_names():
    module = distiller(teachers=2)
    rows = [{**row, "teacher": "one" if i < 3 else "two"} for i, row in enumerate(tiny.ROWS)]
    out, grads = gradient(module, two_teachers()(rows))
    sums = dict.fromkeys(("cosine", "geometry", "logit"), 0.0)
    counts = count_items([collator()(tiny.ROWS)])
    for teacher, part, pairs in ((0, rows[:3], slice(0, 2)), (1, rows[3:], slice(2, 4))):
        alone = distiller(student=module.student)
        alone.teachers, alone.projectors = (module.teachers[teacher],), module.projectors[pairs]
        plain = [{key: row[key] for key in ("prompt", "completion")} for row in part]
        terms = alone(**collator()(plain), num_items_in_batch=counts)
        for name in sums:
            sums[name] = sums[name] + terms[name]
    for name, value in sums.items():
        torch.testing.assert_close(out[name], value)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_a_batch_without_a_row_for_one_of_the_teachers():
    module = distiller(teachers=2)
    rows = [{**row, "teacher": "one"} for row in tiny.ROWS]
    out, grads = gradient(module, two_teachers()(rows))
    assert out.loss.isfinite()
    assert grads["projectors.2.weight"].abs().max() == 0  # present: DDP waits for it
    assert grads["projectors.0.weight"].abs().max() > 0


@pytest.mark.parametrize("seen_by", [None, "one", "two"])
@pytest.mark.parametrize("normaliser", ["tokens", "sequences", "spans"])
def test_cross_entropy_of_the_logit_term_s_logits_is_the_same(monkeypatch, seen_by, normaliser):
    """Where the same rows meet the student's head once instead of twice, whoever teaches them."""
    objective = recipe("respell", alpha=0.3, logit=0.7, normaliser=normaliser)
    module = distiller(objective, teachers=2, weights=[0.5, 2.0])
    rows = [{**row, "teacher": seen_by} if seen_by and i else row for i, row in
            enumerate(tiny.ROWS)]  # fmt: skip
    batch = two_teachers()(rows)
    counts = 3 * count_items([batch])
    logits, met = Head.logits, []

    def counted(head, states):
        if len(head.weight) == tiny.STUDENT_ROWS:
            met.append(len(states))
        return logits(head, states)

    monkeypatch.setattr(Head, "logits", counted)
    got, gotten = gradient(module, batch, num_items_in_batch=counts)
    together = sum(met)
    monkeypatch.setattr(Objective, "shares_logits", False)
    want, wanted = gradient(module, batch, num_items_in_batch=counts)
    assert_same(dict(got), dict(want))
    assert_same(gotten, wanted)
    apart = sum(met) - together
    assert apart - together > (0 if seen_by else 0.8 * int(counts[0] / 3))


def test_teachers_and_vocabularies_must_be_as_many():
    teachers = [tiny.teacher_model(), tiny.teacher_model()]
    with pytest.raises(ValueError, match="2 teachers and 1 vocabularies"):
        SpanDistiller(tiny.student_model(), teachers, ALL, vocabulary=tiny.vocabulary())
    with pytest.raises(ValueError, match="2 teachers and 1 teacher weights"):
        SpanDistiller(
            tiny.student_model(), teachers, ALL,
            vocabulary=[tiny.vocabulary()] * 2, teacher_weights=[1.0],
        )  # fmt: skip
    for weights in ([1.0, -0.5], [0.0, 0.0]):
        with pytest.raises(ValueError, match="none may be negative, and one must be positive"):
            distiller(teachers=2, weights=weights)
    with pytest.raises(ValueError, match="holds 1 'teachers' and the distiller 2"):
        distiller(teachers=2)(**collator()(tiny.ROWS))


# --- layers ---


def test_a_layer_s_states_are_its_own_and_the_last_is_normed():
    model = tiny.teacher_model(torch.float64)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        every = model.base_model(input_ids=ids, output_hidden_states=True)
        out = model_states(model, ids, layers=[0, 1, -1, -2])
    torch.testing.assert_close(out.hidden[0], every.hidden_states[1])
    torch.testing.assert_close(out.hidden[1], every.last_hidden_state)
    assert out.hidden[1] is out.hidden[2]
    assert out.hidden[0] is out.hidden[3]
    assert out.mass[0] is out.mass[3]
    assert not torch.allclose(out.mass[0], out.mass[1])


def test_layers_are_a_mean_by_weight():
    batch = collator()(tiny.ROWS)
    whole = distiller()
    want = whole(**batch)
    singles = []
    for index, pair in enumerate(ALL.layers):
        one = recipe("paper", gamma=2.0, outside="weight", layers=(pair,))
        module = distiller(one, student=whole.student)
        module.projectors = whole.projectors[index : index + 1]
        singles.append(module(**batch))
    torch.testing.assert_close(want.cosine, (2 * singles[0].cosine + singles[1].cosine) / 3)
    for name in ("geometry", "logit", "ce"):
        torch.testing.assert_close(want[name], singles[0][name])
    assert singles[0].cosine != singles[1].cosine


@pytest.mark.parametrize("layers", [(), ((-1, -1, 0.0),), ((-1, -1, -1.0),)])
def test_layers_that_are_none(layers):
    with pytest.raises(ValueError, match="give one or more pairs"):
        recipe("paper", layers=layers)


def test_last_states_that_are_narrower_than_the_layers():
    """OPT-350m: the head reads 16 of what the layers hold in 32."""
    config = OPTConfig(
        vocab_size=tiny.STUDENT_ROWS, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48,
        num_hidden_layers=2, num_attention_heads=4, dropout=0.0, do_layer_norm_before=False,
        max_position_embeddings=256,
    )  # fmt: skip
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    out, grads = gradient(distiller(student=student), collator()(tiny.ROWS))
    assert out.loss.isfinite()
    assert [tuple(grads[f"projectors.{i}.weight"].shape) for i in (0, 1)] == [(48, 32), (48, 16)]


def test_a_layer_that_is_not_there():
    module = distiller(recipe("paper", layers=((5, -1, 1.0),)))
    with pytest.raises(IndexError, match="2 decoder layers; there is no 5"):
        module(**collator()(tiny.ROWS))


# --- agreement and bits per byte ---


def test_agreement_counts_equal_tops():
    eye = Head(torch.eye(4))
    states = torch.eye(4)
    other = states[[0, 1, 3, 2]]
    assert top_agreement(states, eye, other, eye, None) == 0.5
    # Inside the shared entries alone, renamed: 3 of the student's are 2, 1, 0 of the teacher's.
    shared = torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])
    flipped = Head(torch.eye(4)[[2, 1, 0, 3]])
    assert top_agreement(states[:3], eye, states[:3], flipped, shared) == 1.0


def test_agreement_is_measured_when_asked_for():
    module = distiller(teachers=2)
    batch = two_teachers()(tiny.ROWS)
    assert module(**batch).agreement is None
    module.agreement_spans = 8
    assert 0 <= module(**batch).agreement <= 1
    same = copy.deepcopy(module.teachers[0])
    module = SpanDistiller(same, module.teachers[0], recipe("boundary"))
    module.agreement_spans = 8
    aligner = SpanAligner(tiny.teacher_tokenizer(), tiny.teacher_tokenizer())
    assert module(**SpanCollator(aligner, max_length=256)(tiny.ROWS)).agreement == 1.0


def test_bits_per_byte_of_a_batch():
    module = distiller(recipe("cross-entropy"))
    batch = collator()(tiny.ROWS)
    out = module(**batch)
    tokens = count_items([batch])[0]
    nats = out.ce * tokens
    size = sum(len(row["completion"].encode()) for row in tiny.ROWS)
    assert batch["num_bytes"].sum() == size
    torch.testing.assert_close(out.bits_per_byte, nats / torch.tensor(2.0).double().log() / size)
