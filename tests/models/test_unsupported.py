"""What cannot be distilled says so, and what is missing, before a step is taken; and no model is
turned away for what nothing reads."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    LlamaModel,
    MambaConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from sra import SpanAligner, SpanCollator, SpanDistiller, TeacherCache, recipe
from sra.baselines import baseline
from sra.model import causal_lm, head_of
from sra.states import model_states
from tests import tiny

WITHOUT_INTERFACE = {
    "falcon-alibi": FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "bloom-alibi": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "mamba": MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
    "rwkv": RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2),
}


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_no_attention_to_read(name):
    model = AutoModelForCausalLM.from_config(WITHOUT_INTERFACE[name])
    with pytest.raises(TypeError) as error:
        model_states(model, torch.tensor([[1, 2, 3]]))
    assert str(error.value) == (
        f"{type(model).__name__} has no decoder layer that calls transformers' AttentionInterface, "
        "so its queries and keys cannot be read. Use a model class that does (Llama, Qwen2, Gemma, "
        "Mistral, GPT-2, ...)."
    )


@pytest.mark.parametrize("objective", [recipe("respell"), baseline("alm")], ids=["respell", "alm"])
@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_what_reads_no_attention_takes_models_without_it(name, objective):
    teacher = tiny.teacher_model()
    sizes = {"student": tiny.student_model(), "teacher": teacher}
    for role, like in sizes.items():
        config = copy.deepcopy(WITHOUT_INTERFACE[name])
        config.vocab_size = like.config.vocab_size
        model = AutoModelForCausalLM.from_config(config)
        pair = {**sizes, role: model, "teacher": teacher if role == "student" else model}
        module = SpanDistiller(
            pair["student"], TeacherCache(pair["teacher"]), objective, vocabulary=tiny.vocabulary()
        )
        batch = tiny.collator()(tiny.ROWS)
        out = module(**batch)
        out.loss.backward()
        assert out.logit.item() > 0
        assert all(p.grad is not None for p in pair["student"].parameters())


def test_sequences_without_padding_need_a_model_that_takes_positions():
    config = copy.deepcopy(WITHOUT_INTERFACE["mamba"])
    config.vocab_size = tiny.student_model().config.vocab_size
    module = SpanDistiller(
        AutoModelForCausalLM.from_config(config), tiny.teacher_model(), recipe("respell"),
        vocabulary=tiny.vocabulary(),
    )  # fmt: skip
    aligner = SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    batch = SpanCollator(aligner, padding="free")(tiny.ROWS)
    with pytest.raises(TypeError, match=r"MambaModel takes no position_ids.* padding_free=False"):
        module(**batch)


def test_an_encoder_decoder_model():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4)
    )
    for role in ((model, tiny.teacher_model()), (tiny.student_model(), model)):
        with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
            SpanDistiller(*role, recipe("paper"), vocabulary=tiny.vocabulary())


def test_a_model_without_a_head():
    with pytest.raises(TypeError, match="LlamaModel has no output embeddings"):
        head_of(LlamaModel(tiny.student_model().config))


def test_virtual_tokens_of_peft():
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TypeError, match="virtual tokens before the text"):
        causal_lm(peft.get_peft_model(tiny.student_model(), config))


def test_a_layer_that_is_not_there():
    with pytest.raises(IndexError, match="LlamaForCausalLM has 2 decoder layers; there is no -3"):
        model_states(tiny.student_model(), torch.tensor([[1, 2, 3]]), layers=(-3,))
