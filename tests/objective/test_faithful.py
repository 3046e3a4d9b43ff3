"""Where the authors' recipe (`faithful.py`) and ours differ: one test states each difference.

The first test shows that nothing else differs: where no accident triggers, all terms are equal.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sra import SharedVocabulary, SpanAligner, SpanCollator, SpanDistiller, recipe
from sra.chat import render_prompt
from sra.objective import salience
from sra.states import model_states
from sra_kernels import span_com
from tests import tiny
from tests.objective import faithful
from tests.real_models import checkpoint
from tests.real_tokenizers import load

Row: TypeAlias = dict[str, str]

NILE, COUNT, SUM, FROG = (tiny.ROWS[i] for i in (0, 1, 5, 6))
SKY = {
    "prompt": "Why is the sky blue?",
    "completion": "Sunlight meets the air, and the air scatters blue light far more than red "
    "light, so that blue reaches the eye from every direction.",
}


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    path = checkpoint("SmolLM2-135M-Instruct")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


@functools.cache
def distiller() -> SpanDistiller:
    return SpanDistiller(
        tiny.student_model(torch.float64).eval(),
        tiny.teacher_model(torch.float64),
        recipe("paper"),
        vocabulary=tiny.vocabulary(),
    )


def collator() -> SpanCollator:
    """The authors show both models the bare prompt, without a chat template."""
    return SpanCollator(tiny.collator().aligner, chat_template=False)


@torch.no_grad()
def ours(rows: Sequence[Row]) -> dict[str, float]:
    out = distiller()(**collator()(rows))
    return {name: out[name].item() for name in ("loss", "ce", "cosine", "geometry", "logit")}


@torch.no_grad()
def theirs(rows: Sequence[Row], **options: Any) -> dict[str, float]:
    module = distiller()
    aligner = collator().aligner
    terms = faithful.loss(
        module.student,
        module.teachers[0],
        aligner.student_tokenizer,
        aligner.teacher_tokenizer,
        rows,
        module.projectors[0].weight,
        **options,
    )
    return {name: value.item() for name, value in terms.items()}


def excess(rows: Sequence[Row], **options: Any) -> dict[str, float]:
    """Their value of each term over ours, minus 1."""
    right = ours(rows)
    return {name: value / right[name] - 1 for name, value in theirs(rows, **options).items()}


def both_spans(student: Any, teacher: Any, text: str) -> tuple[tuple, tuple]:
    """Spans of a text (student's, teacher's ranges) as the authors and as we find them."""
    ends = [[end for _, end in side.encode(text).offsets] for side in (student, teacher)]
    table = SpanAligner(student, teacher)(text)
    ranges = tuple([*map(tuple, side.tolist())] for side in (table.student, table.teacher))
    return faithful.spans(*ends, 0, 0), ranges


def test_equal_where_no_accident_triggers():
    """ASCII rows of one length, two of them, no tiny mass, fewer than 1,024 spans: every term of
    the authors' loss is ours to 1e-12."""
    assert excess([NILE, NILE]) == pytest.approx(dict.fromkeys(ours([NILE, NILE]), 0.0), abs=1e-12)


def test_query_is_a_padding_token_of_a_short_sample():
    """Theirs reads w from the last column of the batch, which is padding for all but the longest
    sample, so a sample's w depends on its neighbours. On a batch of two the loss is off by 12 %,
    geometry by 32 %. Ours reads the last real token: a batch is the mean of its samples."""
    wrong = excess([COUNT, SUM])
    assert wrong["loss"] == pytest.approx(0.12, abs=0.04)
    assert wrong["geometry"] == pytest.approx(0.32, abs=0.1)
    assert wrong["ce"] == pytest.approx(0, abs=1e-12)

    (their_batch, their_samples), (our_batch, our_samples) = (
        [loss([COUNT, SUM])["geometry"], sum(loss([r, r])["geometry"] for r in (COUNT, SUM)) / 2]
        for loss in (theirs, ours)
    )
    assert their_batch - their_samples > 0.02
    assert our_batch == pytest.approx(our_samples, rel=1e-12)


@pytest.mark.models
def test_query_is_a_padding_token_in_a_real_model(smollm2):
    """SmolLM2-135M: 21 % of the short sample's mass moves (total variation 0.22); its answer keeps
    11 % of the attention where the real last token pays it 32 %. The longest sample is right."""
    short = {"prompt": "Name a river.", "completion": "The Nile flows northward through Egypt."}
    model, tokenizer = smollm2
    side = faithful.encode(tokenizer, [short, SKY], 512)
    with torch.no_grad():
        attention = faithful.run(model, side, "post-norm")[0].attentions[-1]
        (right,) = model_states(model, side.input_ids, side.attention_mask).mass
    wrong = faithful.token_weights(attention)
    variation = (wrong - right).abs().sum(1) / 2
    assert variation[0].item() == pytest.approx(0.217, abs=0.01)
    assert variation[1] < 1e-5
    answer = slice(side.starts[0], None)
    assert wrong[0, answer].sum().item() == pytest.approx(0.111, abs=0.01)
    assert right[0, answer].sum().item() == pytest.approx(0.325, abs=0.01)


@pytest.mark.parametrize("mass", [1e-6, 1e-7, 1e-9])
def test_centre_shrinks_where_mass_is_below_1e_5(mass):
    """Theirs divides by max(mass, 1e-5), so the centre of a span of mass m is m / 1e-5 of what it
    should be: cosines stay, logits flatten (at m = 1e-7, the head's distribution comes from 0.87
    nats to 0.0001 nats near uniform). Ours divides by the true mass."""
    hidden = torch.randn(6, 8, dtype=torch.float64)
    weights = torch.full((6,), mass / 3, dtype=torch.float64)
    weights[3:] = 1 / 3
    right, _ = span_com(hidden, torch.tensor([[0, 3], [3, 6]]), weights)
    wrong, _ = faithful.centres(
        hidden[None], weights[None], *faithful.gather_index([[(0, 3), (3, 6)]])
    )
    wrong = wrong[0]
    torch.testing.assert_close(wrong[0], right[0] * mass / 1e-5, rtol=1e-12, atol=0)
    torch.testing.assert_close(wrong[1], right[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(right[0], hidden[:3].mean(0), rtol=1e-12, atol=0)

    head = torch.randn(50, 8, dtype=torch.float64)
    uniform = torch.full((50,), 1 / 50, dtype=torch.float64)
    from_uniform = [
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=head @ centre),
            torch.distributions.Categorical(uniform),
        )
        for centre in (right[0], wrong[0])
    ]
    assert from_uniform[0] > 0.5
    assert from_uniform[1] < from_uniform[0] * 2 * mass / 1e-5


def test_bytes_of_a_split_character_fall_into_the_next_span():
    """Theirs compares character offsets, which all byte tokens of one character share. GPT-2 spells
    the second emoji with three tokens, Qwen with one: theirs pairs Qwen's emoji with GPT-2's first
    byte token and puts the other two into the span of " done". Ours counts bytes."""
    gpt2, qwen = load("gpt2"), load("qwen")
    text = "café 🐸🎉 done"
    tokens = [side.encode(text).tokens for side in (gpt2, qwen)]
    wrong, right = both_spans(gpt2, qwen, text)
    assert [tokens[0][slice(*wrong[0][-k])] for k in (2, 1)] == [["ðŁ"], ["İ", "ī", "Ġdone"]]
    assert [tokens[1][slice(*wrong[1][-k])] for k in (2, 1)] == [["ðŁİī"], ["Ġdone"]]
    assert [tokens[0][slice(*right[0][-k])] for k in (2, 1)] == [["ðŁ", "İ", "ī"], ["Ġdone"]]
    assert right[1] == wrong[1]


def test_every_chinese_span_starts_late():
    """Where one side spells each character with several byte tokens (GPT-2 on Chinese), theirs
    shifts every boundary inside the text: 2 of 2. Ours: none."""
    text = "你好，世界"
    gpt2, qwen = load("gpt2"), load("qwen")
    wrong, right = both_spans(gpt2, qwen, text)
    assert wrong == ([(0, 3), (3, 5), (5, 10)], [(0, 1), (1, 2), (2, 3)])
    assert right == ([(0, 4), (4, 7), (7, 11)], [(0, 1), (1, 2), (2, 3)])


def test_split_characters_change_the_loss():
    """One emoji in a row that is otherwise ASCII, as it often is: geometry is off by 6 %."""
    assert excess([FROG, FROG])["geometry"] == pytest.approx(0.06, abs=0.02)


def test_a_single_span_has_no_geometry():
    """Theirs divides the weights of pairs by their sum, guarded: 0, as ours is, so that of two
    samples the longer one's alone is left."""
    word = {"prompt": NILE["prompt"], "completion": "a"}
    assert len(collator()([word])["teachers"][0]["student_spans"]) == 1
    right = ours([NILE, word])["geometry"]
    assert right == pytest.approx(ours([NILE, NILE])["geometry"] / 2, rel=1e-12)
    assert theirs([NILE, word])["geometry"] == pytest.approx(right, rel=1e-12)


def test_a_sample_without_spans_gives_nan():
    """Theirs divides saliences by their sum, unguarded: one sample that truncation leaves without
    spans makes the batch's loss NaN, and with it the student. Ours: that sample's terms are 0."""
    long_prompt = {"prompt": "Name a river of Egypt. " * 3, "completion": "The Nile."}
    assert theirs([NILE, NILE], max_length=30)["loss"] > 0
    cut = theirs([NILE, long_prompt], max_length=30)
    assert torch.tensor([cut["cosine"], cut["geometry"], cut["loss"]]).isnan().all()

    batch = collator()([NILE, SUM])
    teacher = batch["teachers"][0]
    kept = int(teacher["span_offsets"][1])
    teacher["span_offsets"][2] = kept
    for name in ("student_spans", "teacher_spans"):
        teacher[name] = teacher[name][:kept]
    module = distiller()
    module.zero_grad()
    out = module(**batch)
    out.loss.backward()
    alone = ours([NILE])
    for name in ("cosine", "geometry", "logit"):
        assert out[name].item() == pytest.approx(alone[name] / 2, rel=1e-12)
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_one_sample_or_one_span_loses_a_dimension():
    """Theirs squeezes the masses, so a batch of one sample raises, and where every sample has one
    span the saliences are normalised over the batch instead of within each sample."""
    with pytest.raises(IndexError):
        theirs([NILE])
    mass = torch.tensor([[[0.2]], [[0.6]]])
    torch.testing.assert_close(faithful.salience(mass, 1.0), torch.tensor([0.25, 0.75]))
    offsets = torch.tensor([0, 1, 2])
    torch.testing.assert_close(salience(mass.flatten(), offsets, 1.0), torch.ones(2))
    assert ours([NILE])["loss"] > 0


def test_padding_counts_as_spans_under_a_biased_head():
    """Theirs knows a padded span by logits that are all 0. A head with a bias has none: a batch of
    3 and 30 spans is charged for 27 spans that do not exist. Ours has no padding."""
    student, teacher = torch.randn(2, 30, 5), torch.randn(2, 30, 5)
    student[0, 3:] = teacher[0, 3:] = 0
    bias = torch.tensor([3.0, 0, 0, 0, 0])
    padding = faithful.span_logit_loss(bias.expand(1, 27, 5), torch.zeros(1, 27, 5), 2.0)
    right = faithful.span_logit_loss(student, teacher, 2.0)
    student[0, 3:] = bias
    wrong = faithful.span_logit_loss(student, teacher, 2.0)
    torch.testing.assert_close(wrong - right, padding / 2)
    assert padding > 1


def test_more_than_1024_boundaries_are_thinned():
    """Theirs keeps every (n / 1024)-th boundary: 2,484 spans become 1,023 of up to 3 tokens. Ours
    has no limit."""
    wrong, right = both_spans(load("gpt2"), load("qwen"), " ".join(map(str, range(1500))))
    assert len(right[0]) == 2484
    assert len(wrong[0]) == 1023
    assert max(b - a for a, b in wrong[0]) == 3
    assert max(b - a for a, b in right[0]) == 1


def test_left_padding_puts_prompt_and_padding_into_the_first_span():
    """Theirs starts at token `prompt length` of the padded row: with a teacher that pads on the
    left, a short sample's first span begins that many tokens early, in padding and prompt, and
    here the loss falls by 16 %. Ours pads on the right whatever the tokenizer says, and spans are
    found before padding."""
    aligner = collator().aligner
    rows = [COUNT, SUM]
    own = faithful.encode(aligner.student_tokenizer, rows, 512)
    first = []
    for padding in ("right", "left"):
        other = faithful.encode(aligner.teacher_tokenizer, rows, 512, padding)
        _, found = faithful.spans(own.ends[0], other.ends[0], own.starts[0], other.starts[0])
        first.append(found[0])
    assert first == [(7, 8), (7, 13)]
    change = theirs(rows, teacher_padding="left")["loss"] / theirs(rows)["loss"] - 1
    assert change == pytest.approx(-0.16, abs=0.05)


@pytest.mark.models
def test_states_before_the_final_norm_meet_the_head(smollm2):
    """Their newer student takes states by a hook on the last block, before the final norm, and
    feeds them to the head, while the teacher's are after it. In SmolLM2-135M those are 19 times
    longer and point elsewhere (cosine 0.55): the head's next-token distribution is 472 nats away
    from the model's own and has 0.14 nats of entropy instead of 2.9. Ours: after the norm, both."""
    model, tokenizer = smollm2
    side = faithful.encode(tokenizer, [SKY], 512)
    with torch.no_grad():
        states = [
            faithful.run(model, side, kind)[1][0, side.starts[0] :]
            for kind in ("post-norm", "pre-norm")
        ]
        right, wrong = (model.lm_head(state).log_softmax(-1) for state in states)
        (mine,) = model_states(model, side.input_ids, side.attention_mask).hidden
    torch.testing.assert_close(mine[0, side.starts[0] :], states[0], rtol=1e-3, atol=1e-3)
    length = (states[1].norm(dim=-1) / states[0].norm(dim=-1)).mean()
    assert length.item() == pytest.approx(18.7, abs=1)
    assert torch.cosine_similarity(*states, dim=-1).mean().item() == pytest.approx(0.55, abs=0.03)
    distance = (right.exp() * (right - wrong)).sum(-1).mean()
    assert distance.item() == pytest.approx(472, rel=0.05)
    entropy = [-(log.exp() * log).sum(-1).mean().item() for log in (right, wrong)]
    assert entropy == pytest.approx([2.88, 0.14], rel=0.1)


def test_without_span_weights_saliences_are_only_nearly_equal():
    """Theirs switches the span weighting off by raising masses to 1e-5: spans whose masses differ a
    million times still differ by 0.014 %. Ours, power=0: exactly equal."""
    mass = torch.tensor([1e-6, 1e-3, 1.0], dtype=torch.float64)
    wrong = faithful.salience(mass[None, :, None].expand(2, 3, 1), faithful.WSL_OFF)[0]
    right = salience(mass, torch.tensor([0, 3]), 0.0)
    assert (right == right[0]).all()
    assert (wrong.max() / wrong.min() - 1).item() == pytest.approx(1.38e-4, rel=0.01)


def test_raw_strings_lose_the_vocabulary_across_families():
    """Theirs pairs equal raw strings, so across families "Ġthe" is not "▁the": GPT-2 and Mistral
    share 8,020 entries, 21,240 by what they spell. Ours offers both (the paper's recipe means raw
    strings). Within a family, as GPT-2 and Qwen, nothing is lost (tests/vocabulary)."""
    gpt2, mistral = load("gpt2"), load("mistral-v1")
    assert len(gpt2.get_vocab().keys() & mistral.get_vocab().keys()) == 8_020
    assert len(SharedVocabulary(gpt2, mistral, match="raw")) == 8_020
    assert len(SharedVocabulary(gpt2, mistral, match="normalised")) == 21_240


def test_the_student_s_start_token_becomes_text():
    """Theirs cuts the prompt by encoding and decoding it with the student's tokenizer. One that
    adds a start token writes it into the text: the teacher (GPT-2) reads 9 tokens of prose, the
    student gets it twice. Ours renders each side's prompt by itself."""
    student = PreTrainedTokenizerFast(
        tokenizer_object=load("llama3"), bos_token="<|begin_of_text|>"
    )
    prompt = "Name a river of Egypt."
    shown = faithful.truncated_prompt(student, prompt, 160)
    assert shown == "<|begin_of_text|>" + prompt
    extra = len(load("gpt2").encode(shown).ids) - len(load("gpt2").encode(prompt).ids)
    assert extra == 9
    start = student.bos_token_id
    assert student(shown).input_ids[:2] == [start, start]
    mine = student(render_prompt(student, prompt), add_special_tokens=False).input_ids
    assert mine.count(start) == 1


def test_padded_gather_against_rows_read_in_place():
    """Theirs copies hidden states into `[B, N, longest span]`: on 8 short rows 3.5 times the
    tokens that spans hold (a long row beside short ones makes it worse). Ours copies none."""
    batch = collator()(tiny.ROWS)
    (teacher,) = batch["teachers"]
    offsets = teacher["span_offsets"].tolist()
    pairs = teacher["student_spans"].tolist()
    samples = [pairs[a:b] for a, b in pairwise(offsets)]
    index, mask = faithful.gather_index(samples)
    assert index.numel() / mask.sum().item() == pytest.approx(3.5, abs=0.3)


def test_attention_weights_need_every_layer_s_matrix():
    """Theirs asks for `output_attentions`: layers x heads x T x T numbers a sample, where T of them
    are used. Ours reads one row of one layer (see tests/attention)."""
    module, batch = distiller(), collator()([SUM])
    side = faithful.encode(collator().aligner.student_tokenizer, [SUM], 512)
    out, _ = faithful.run(module.student, side, "post-norm")
    tokens = side.input_ids.shape[1]
    assert sum(layer.numel() for layer in out.attentions) == 2 * 4 * tokens**2
    states = model_states(module.student, batch["input_ids"], batch["attention_mask"])
    assert states.mass[0].numel() == tokens
