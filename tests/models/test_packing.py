"""Sequences without padding: every family either keeps them apart, or is refused."""

from __future__ import annotations

import pytest
import torch

from sra import SRAConfig, SRATrainer
from sra.model import trunk_of
from sra.packing import check_packing
from sra.states import model_states
from tests import tiny
from tests.models.families import FAMILIES, NAMES, build

CPU = torch.device("cpu")
MIXES = {
    "opt", "opt-post-norm", "gpt-oss-sinks", "qwen2.5-vl", "qwen3-next-hybrid",
    "lfm2-convolution-last",
}  # fmt: skip


def packed_and_alone(model, texts=((1, 9, 3, 7, 5, 4, 8, 2), (11, 2, 8), (1, 5, 5, 6, 13))):
    """States of texts one behind the other, from the trunk itself, and of each by itself."""
    trunk = trunk_of(model)
    texts = [torch.tensor([text]) for text in texts]
    positions = [torch.arange(text.shape[1])[None] for text in texts]
    with torch.no_grad():
        packed = trunk(
            input_ids=torch.cat(texts, 1), position_ids=torch.cat(positions, 1), use_cache=False
        )
        alone = [trunk(input_ids=text, use_cache=False).last_hidden_state for text in texts]
    return packed.last_hidden_state, torch.cat(alone, 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_keeps_them_apart_or_is_refused(name):
    model = build(name, 97)
    packed, alone = packed_and_alone(model)
    same = torch.allclose(packed, alone, rtol=1e-3, atol=1e-4)
    assert same == (name not in MIXES)
    for dtype in (torch.float32, torch.bfloat16):
        model = build(name, 97).to(dtype)
        if same:
            check_packing(model, CPU)
            continue
        with pytest.raises(TypeError, match=r"changes its states, by \d+%.*padding_free=False"):
            check_packing(model, CPU)


def test_another_attention_is_asked_again():
    model = build("llama", 97)
    check_packing(model, CPU)
    calls = []
    hook = trunk_of(model).register_forward_hook(lambda *_: calls.append(1))
    check_packing(model, CPU)
    assert not calls
    model.set_attn_implementation("eager")
    check_packing(model, CPU)
    hook.remove()
    assert len(calls) == 4


def test_dropout_is_no_leak_and_comes_back():
    model = build("gpt2", 97, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    frozen = trunk_of(model).h[0].eval()
    state = torch.get_rng_state()
    check_packing(model, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert trunk_of(model).h[1].training
    assert not frozen.training


def test_autocast_rounds_more():
    """What a convolution hardly passes on is seen in float32, and rounding in bfloat16."""
    model = build("lfm2-convolution-last", 97)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv1d):
                module.weight.mul_(0.02)
    with torch.autocast("cpu", torch.bfloat16):
        check_packing(model, CPU)
    model.set_attn_implementation("eager")  # so that it is asked again
    with pytest.raises(TypeError, match=r"changes its states"):
        check_packing(model, CPU)


def test_the_check_leaves_the_mass_of_the_batch():
    model, ids = build("llama", 97), torch.tensor([[1, 9, 3, 7, 5, 4]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    first, again = (model_states(model, ids, position_ids=positions) for _ in range(2))
    assert first.mass[0].shape == ids.shape
    assert torch.equal(first.mass[0], again.mass[0])


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", ["lfm2-convolution-last", "gpt-oss-sinks"])
def test_a_run_without_padding_is_refused(tmp_path, name, role):
    if name not in NAMES:
        pytest.skip(f"this transformers has no {FAMILIES[name][0]}")
    models = {"student": tiny.student_model(), "teacher": tiny.teacher_model()}
    models[role] = build(name, models[role].config.vocab_size)

    def run(**options):
        return SRATrainer(
            models["student"], models["teacher"],
            SRAConfig(
                output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none",
                save_strategy="no", disable_tqdm=True, recipe="respell", **options,
            ),
            train_dataset=tiny.ROWS,
            processing_class=tiny.student_tokenizer(),
            teacher_processing_class=tiny.teacher_tokenizer(),
        )  # fmt: skip

    with pytest.raises(TypeError, match=r"does not begin anew.*Pad them: padding_free=False"):
        run(padding_free=True).train()
    run(padding_free=False).train()
