"""What stands for a layer: the residual stream after its block, and an attention layer's mass."""

from __future__ import annotations

import pytest
import torch

from sra.attention import record_attention_mass
from sra.model import check_head, trunk_of
from sra.states import model_states
from tests.models.families import NAMES, build

IDS = torch.arange(3, 20)[None]


def blocks(model):
    """The decoder blocks: the one list of modules that is as long as the model is deep."""
    count = model.config.get_text_config().num_hidden_layers
    (found,) = [
        module
        for module in trunk_of(model).modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
        and any("ttn" in name or "ttention" in name for name, _ in module.named_modules())
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_s_states_leave_its_block_and_the_last_are_what_the_head_gets(name):
    model = build(name, 64)
    check_head(model)  # so that the hooks see nothing of it
    left, to_head = [], []
    for block in blocks(model):
        block.register_forward_hook(
            lambda _, args, out: left.append(out[0] if isinstance(out, tuple) else out)
        )
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: to_head.append(args[0]))
    with torch.no_grad():
        got = model_states(model, IDS, layers=(0, -1))
        model(input_ids=IDS, use_cache=False)
    assert torch.equal(got.hidden[0], left[0])
    torch.testing.assert_close(got.hidden[1], to_head[0], atol=1e-6, rtol=1e-6)


@pytest.mark.skipif("lfm2-convolution-last" not in NAMES, reason="transformers has no Lfm2 yet")
def test_a_layer_without_attention_has_the_mass_of_the_one_before_it():
    model = build(
        "lfm2-convolution-last",
        64,
        num_hidden_layers=5,
        layer_types=["conv", "full_attention", "conv", "full_attention", "conv"],
    )
    masses = []
    with torch.no_grad():
        for layer in (0, 1):
            with record_attention_mass(model, layer) as record:
                model.base_model(input_ids=IDS, use_cache=False)
            masses.append(record.mass)
        got = model_states(model, IDS, layers=(0, 1, 2, 3, -1)).mass
    assert not torch.equal(*masses)
    for mass, own in zip(got, (0, 0, 0, 1, 1), strict=True):
        assert torch.equal(mass, masses[own])
