"""The recorded attention mass against eager `output_attentions`, for the model classes we name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from sra.attention import AttentionMass, record_attention_mass
from tests.real_models import checkpoint

VOCABULARY, LENGTHS = 97, (23, 14, 1)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "smollm2": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "mistral-window": MistralConfig(**SIZES, sliding_window=5),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=6, n_positions=64),
    "gpt2-layer-scaled": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=3,
        n_head=6,
        n_positions=64,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gemma2-softcap": Gemma2Config(
        **SIZES, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6),
}
CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}")
    for name in CONFIGS
    for implementation in ("eager", "sdpa")
    # transformers' own sdpa refuses a softcap.
    if (name, implementation) != ("gemma2-softcap", "sdpa")
]


def build(name, implementation):
    """A model with random weights, large enough that attention is far from uniform."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model.eval()


def batch(padding):
    """[3, 23] token ids and their mask, with two samples padded."""
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids, (mask if padding == "right" else mask.flip(1)).long()


def eager_mass(model, ids, mask, layer=-1):
    """The definition: full attention matrices, row of the last real token, heads summed."""
    model.set_attn_implementation("eager")
    attentions = model(ids, attention_mask=mask, output_attentions=True).attentions[layer].double()
    rows = []
    for attention, real in zip(attentions, mask.bool(), strict=True):
        last = real.nonzero().max()
        row = attention[:, last].sum(0) * real
        rows.append(row / row.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_equals_output_attentions(name, implementation, padding):
    model = build(name, implementation)
    ids, mask = batch(padding)
    for layer in (-1, 1):
        with record_attention_mass(model, layer) as record:
            model(ids, attention_mask=mask)
        expected = eager_mass(model, ids, mask, layer)
        model.set_attn_implementation(implementation)
        assert record.mass.dtype == torch.float32
        torch.testing.assert_close(record.mass.double(), expected, atol=1e-5, rtol=0)
        assert expected[0].max() > 1.5 / max(LENGTHS), "uniform attention would prove nothing"
        assert (record.mass[mask == 0] == 0).all()
        torch.testing.assert_close(record.mass.sum(1), torch.ones(len(LENGTHS)))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_padded_batch_equals_single_samples(name, implementation, padding):
    model = build(name, implementation)
    ids, mask = batch(padding)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with record_attention_mass(model) as record:
        model.base_model(ids, attention_mask=mask, position_ids=positions)
        together = record.mass
        for index, real in enumerate(mask.bool()):
            model.base_model(ids[index][real][None])
            torch.testing.assert_close(together[index][real], record.mass[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_outputs_and_gradients_are_untouched(name, implementation):
    model = build(name, implementation)
    ids, mask = batch("right")
    plain = model(ids, attention_mask=mask, labels=ids)
    expected = torch.autograd.grad(plain.loss, list(model.parameters()))
    with record_attention_mass(model) as record:
        output = model(ids, attention_mask=mask, labels=ids)
    assert torch.equal(output.logits, plain.logits)
    assert not record.mass.requires_grad
    found = torch.autograd.grad(output.loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradient_checkpointing():
    model = build("smollm2", "sdpa").train()
    ids, mask = batch("right")
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with record_attention_mass(model) as record:
        loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        record.mass.double(), eager_mass(model.eval(), ids, mask), atol=1e-5, rtol=0
    )


def test_restores_the_layer_even_after_an_exception():
    model = build("smollm2", "sdpa")
    configs = [layer.self_attn.config for layer in model.model.layers]

    def run_and_fail():
        with record_attention_mass(model):
            model(torch.ones(1, 3, dtype=torch.int64))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_and_fail()
    for layer, config in zip(model.model.layers, configs, strict=True):
        assert layer.self_attn.config is config
    assert model.config._attn_implementation == "sdpa"
    assert not model.model._forward_pre_hooks
    with record_attention_mass(model) as record:
        model(torch.ones(1, 3, dtype=torch.int64))
    assert record.mass.shape == (1, 3)


def test_layers_are_counted_and_checked():
    model = build("qwen2", "sdpa")
    ids, _ = batch("right")
    masses = []
    for layer in (2, -1):
        with record_attention_mass(model, layer) as record:
            model(ids)
        masses.append(record.mass)
    assert torch.equal(*masses)
    with (
        pytest.raises(IndexError, match="has 3 self-attention layers; there is no 3"),
        record_attention_mass(model, 3),
    ):
        pass


def test_errors():
    bloom = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=1, n_head=6)
    )
    with (
        pytest.raises(TypeError, match="BloomForCausalLM has no decoder layer that calls"),
        record_attention_mass(bloom),
    ):
        pass
    model = build("smollm2", "sdpa")
    ids, mask = batch("right")
    with record_attention_mass(model) as record:
        with pytest.raises(RuntimeError, match="run the model inside"):
            record.mass  # noqa: B018
        with pytest.raises(RuntimeError, match="nest no record"), record_attention_mass(model):
            pass
        past = model(ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="sees 1 queries and 5 keys"):
            model(ids[:, 4:5], past_key_values=past)
        square = mask[:, None, :, None] * mask[:, None, None]
        with pytest.raises(ValueError, match="two-dimensional mask"):
            model(ids, attention_mask=square.bool())
    keys, record = torch.randn(3, 2, 23, 8), AttentionMass(attend=None)
    for options, message in (
        ({"position_bias": torch.zeros(2)}, "NoneType uses 'position_bias'"),
        ({"s_aux": torch.zeros(2), "softcap": 2.0}, "both attention sinks and a softcap"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            record.read(None, keys, keys, None, {"scaling": 1.0, **options})


def test_scale_where_the_model_passes_none():
    """GPT-2 left its scale to the attention function before transformers 5."""
    record = AttentionMass(attend=None)
    query, key = torch.randn(2, 6, 2, 5, 16).double()
    for module, scale in (
        (SimpleNamespace(), 1 / 4),
        (SimpleNamespace(scale_attn_weights=False), 1),
        (SimpleNamespace(scale_attn_by_inverse_layer_idx=True, layer_idx=2), 1 / 12),
    ):
        record.read(module, query, key, None, {"scaling": None})
        row = (scale * query[:, :, -1:] @ key.mT).softmax(-1).mean(1)[:, 0]
        torch.testing.assert_close(record.mass, row)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_sample_without_real_tokens_has_no_mass(implementation):
    model = build("smollm2", implementation)
    ids, mask = batch("right")
    mask[2] = 0
    with record_attention_mass(model) as record:
        model(ids, attention_mask=mask)
    assert record.mass.sum(1).tolist() == pytest.approx([1, 1, 0])


@pytest.mark.models
@pytest.mark.parametrize("padding", ["right", "left"])
def test_real_smollm2(padding):
    folder = checkpoint("SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config._attn_implementation == "sdpa"
    texts = ["The Danube rises in the Black Forest and ends in a delta.", "Γειά σου, κόσμε!"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad(), record_attention_mass(model) as record:
        model.base_model(**inputs)
    with torch.no_grad():
        expected = eager_mass(model, inputs.input_ids, inputs.attention_mask)
    torch.testing.assert_close(record.mass.double(), expected, atol=1e-5, rtol=0)
