"""Bits per byte: known answers, an independent float64 loop, truncation and rendering."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from sra.chat import render_prompt
from sra.evaluation import bits_per_byte
from sra.model import head_of
from tests.real_models import checkpoint

ALPHABET = ["a", "b", "é", "\n"]


class Bigram(nn.Module):
    """p(next | current) is a table: the states are one-hot rows, the head holds the log table."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    device = torch.device("cpu")

    def __init__(self, probabilities):
        super().__init__()
        self.head = nn.Linear(len(ALPHABET), len(ALPHABET), bias=False)
        self.head.weight.data = torch.tensor(probabilities).log().T.contiguous()

    def base_model(self, input_ids, attention_mask, use_cache):
        states = nn.functional.one_hot(input_ids, len(ALPHABET)).float()
        return SimpleNamespace(last_hidden_state=states)

    def get_output_embeddings(self):
        return self.head


@pytest.fixture
def bigram():
    half, quarter, eighth = 1 / 2, 1 / 4, 1 / 8
    return Bigram(
        [
            [half, quarter, eighth, eighth],  # after a
            [quarter, quarter, quarter, quarter],  # after b
            [eighth, eighth, quarter, half],  # after é
            [quarter, half, eighth, eighth],  # after the line break
        ]
    )


@pytest.fixture
def characters():
    """One token for each character of the alphabet."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def byte_tokenizer():
    """One token for each byte, with a chat template and a start token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "<s>", "<|turn|>"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    wrapped.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<|turn|>model: {% endif %}"
    )
    return wrapped


def tiny_llama(vocab_size):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).double().eval()


def naive(model, tokenizer, rows, chat_template=True):
    """One row at a time, whole logits, one token after the other."""
    bits = count = 0
    for row in rows:
        prefix = render_prompt(tokenizer, row["prompt"], chat_template=chat_template)
        start = len(tokenizer(prefix, add_special_tokens=False).input_ids)
        ids = tokenizer(prefix + row["completion"], add_special_tokens=False).input_ids
        logits = model(torch.tensor([ids])).logits[0].double()
        for position in range(start, len(ids)):
            probability = logits[position - 1].softmax(-1)[ids[position]].item()
            bits -= math.log2(probability)
        count += len(row["completion"].encode())
    return bits / count


def test_known_answers(bigram, characters):
    # The prompt "b" is rendered "b\n"; then a, a, é cost 2 + 1 + 3 bits for 1 + 1 + 2 bytes.
    assert bits_per_byte(
        bigram, characters, [{"prompt": "b", "completion": "aaé"}]
    ) == pytest.approx(6 / 4)
    rows = [
        {"prompt": "b", "completion": "aaé"},
        {"prompt": "aab", "completion": "b"},  # 1 bit, 1 byte
        {"prompt": "", "completion": "éé\n"},  # 3 + 2 + 1 bits, 5 bytes
        {"prompt": "a", "completion": ""},
    ]
    for batch_size in (1, 2, 8):
        assert bits_per_byte(bigram, characters, rows, batch_size=batch_size) == pytest.approx(
            13 / 10
        )


def test_truncation_counts_what_was_scored(bigram, characters):
    row = {"prompt": "b", "completion": "aaéb"}
    assert bits_per_byte(bigram, characters, [row], max_length=5) == pytest.approx(6 / 4)
    assert bits_per_byte(bigram, characters, [row], max_length=3) == pytest.approx(2 / 1)
    with pytest.raises(ValueError, match="fills max_length=2 tokens"):
        bits_per_byte(bigram, characters, [row], max_length=2)
    with pytest.raises(ValueError, match="No completion to score"):
        bits_per_byte(bigram, characters, [])


def test_truncation_never_splits_a_character(byte_tokenizer):
    model = tiny_llama(len(byte_tokenizer))
    prefix = len(byte_tokenizer(render_prompt(byte_tokenizer, "x")).input_ids) - 1
    whole = naive(model, byte_tokenizer, [{"prompt": "x", "completion": "ab"}])
    row = {"prompt": "x", "completion": "ab🙂c"}
    for kept in range(2, 6):
        found = bits_per_byte(model, byte_tokenizer, [row], max_length=prefix + kept)
        assert found == pytest.approx(whole, rel=1e-6)
    emoji = naive(model, byte_tokenizer, [{"prompt": "x", "completion": "ab🙂"}])
    found = bits_per_byte(model, byte_tokenizer, [row], max_length=prefix + 6)
    assert found == pytest.approx(emoji, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("chat_template", [True, False])
def test_equals_a_plain_loop(byte_tokenizer, batch_size, chat_template, monkeypatch):
    monkeypatch.setattr("sra.evaluation.likelihood.CHUNK_ELEMENTS", 5 * len(byte_tokenizer))
    model = tiny_llama(len(byte_tokenizer))
    rows = [{"prompt": "p" * n, "completion": "Grüße, 世界 " * (n % 3 + 1)} for n in range(7)]
    expected = naive(model, byte_tokenizer, rows, chat_template)
    found = bits_per_byte(
        model, byte_tokenizer, rows, batch_size=batch_size, chat_template=chat_template
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_training_mode_and_gradients_are_left_alone(byte_tokenizer):
    model = tiny_llama(len(byte_tokenizer)).train()
    bits_per_byte(model, byte_tokenizer, [{"prompt": "x", "completion": "y"}])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(KeyError):
        bits_per_byte(model, byte_tokenizer, [{"prompt": "x"}])


def test_rendering(byte_tokenizer):
    assert render_prompt(byte_tokenizer, "hi") == "<s><|turn|>user: hi<|turn|>model: "
    assert render_prompt(byte_tokenizer, "hi", chat_template=False) == "<s>hi\n"
    byte_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert render_prompt(byte_tokenizer, "hi", chat_template=False) == "hi\n"


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(final_logit_softcapping=3.0, head_dim=8),
        CohereConfig(logit_scale=0.25),
        GraniteConfig(logits_scaling=7.0),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_of_the_head_are_the_models(config):
    config.update(
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["full_attention"],
            "pad_token_id": None,
        }
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(6)[None]
    hidden = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(head_of(model).logits(30 * hidden), logits_of(model, 30 * hidden))


def logits_of(model, hidden):
    """The model's own forward, with its trunk's output replaced."""
    replace = model.base_model.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=hidden)
    )
    try:
        return model(torch.arange(hidden.shape[1])[None]).logits
    finally:
        replace.remove()


@pytest.mark.models
def test_token_across_the_boundary_is_left_out():
    """SmolLM2 joins the prompt's line break with the completion's into one token."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("SmolLM2-135M-Instruct"))
    model = tiny_llama(len(tokenizer))
    row = {"prompt": "A question", "completion": "\n\nAn answer."}
    ids = tokenizer("A question\n\n\nAn answer.").input_ids
    joined = ids.index(tokenizer.convert_tokens_to_ids("ĊĊ"))
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    nats = -sum(logits[i - 1, ids[i]].item() for i in range(joined + 1, len(ids)))
    found = bits_per_byte(model, tokenizer, [row], chat_template=False)
    assert found == pytest.approx(nats / math.log(2) / len(b"\nAn answer."), rel=1e-6)


def test_a_text_is_predicted_from_its_first_token_on(bigram, characters):
    # The first token has nothing before it: a, é cost 1 and 3 bits of "aaé", 1 + 2 bytes.
    assert bits_per_byte(bigram, characters, [{"text": "aaé"}]) == pytest.approx(4 / 3)


def test_of_a_conversation_what_the_assistant_says_counts(byte_tokenizer):
    model = tiny_llama(len(byte_tokenizer))
    said = [("user", "Grüße"), ("assistant", "ja, é"), ("user", "x y"), ("assistant", "🙂!")]
    messages = [{"role": role, "content": content} for role, content in said]
    text = "<s>" + "".join(f"<|turn|>{role}: {content}" for role, content in said)
    ids = byte_tokenizer(text, add_special_tokens=False).input_ids
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    # One token a byte but for the two special ones.
    before = len("<|turn|>user: Grüße<|turn|>assistant: ".encode()) - 2 * len("<|turn|>") + 3
    first = range(before, before + len("ja, é".encode()))
    last = range(len(ids) - len("🙂!".encode()), len(ids))
    bits = -sum(logits[i - 1, ids[i]].item() for i in [*first, *last]) / math.log(2)
    found = bits_per_byte(model, byte_tokenizer, [{"messages": messages}])
    assert found == pytest.approx(bits / (len(first) + len(last)), rel=1e-6)
    one = [{"messages": messages[:2]}]
    same = [{"prompt": "Grüße", "completion": "ja, é"}]
    # The template writes another word for the assistant's role when it opens its turn.
    assert bits_per_byte(model, byte_tokenizer, one, chat_template=False) == pytest.approx(
        bits_per_byte(model, byte_tokenizer, same, chat_template=False), rel=1e-9
    )


def test_a_space_alone_counts_where_offsets_leave_it_out():
    """Byte-level tokenizers that trim offsets give a lone space no width."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert trimmed("a b", return_offsets_mapping=True).offset_mapping[1] == (2, 2)
    model = tiny_llama(len(trimmed))
    rows = [{"prompt": "q", "completion": " a  b "}]
    assert bits_per_byte(model, trimmed, rows) == pytest.approx(naive(model, trimmed, rows))
