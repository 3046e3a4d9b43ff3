"""Predicted bytes and seconds, against counts that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sra.chunks import FEW
from sra.doctor.planner import Heads, Machine, available_memory, measure, predict
from sra.doctor.workload import count_parameters, shrunk, trace
from sra.objective import recipe
from tests import tiny

RATES = Machine(1e10, 1e10, 1e10, 1e9, 1e-5)
SIZES = {"batch_size": 4, "student_tokens": 64, "teacher_tokens": 48, "spans": 30.0}


def wide(layers: int = 4, **more):
    return AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, **more,
    )  # fmt: skip


def plan(student=None, teacher=None, **options):
    given = {**SIZES, "shared": 300, "machine": RATES, **options}
    return predict(student or wide(), teacher or wide(6), **given)


def test_parameters_are_counted_exactly():
    for made in (tiny.student_model(), tiny.student_model(tied=False), tiny.teacher_model()):
        assert count_parameters(made.config) == sum(p.numel() for p in made.parameters())


def test_products_are_those_of_the_layers():
    """A llama layer: q and o [D, D], k and v [D, D/2], three of the feed-forward."""
    layers, tokens = 4, 2 * 32
    work = trace(wide(layers), batch_size=2, tokens=32, dtype=torch.float32)
    linear = 2 * tokens * layers * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    attention = 2 * 2 * layers * 2 * 4 * 32 * 32 * 32  # two products of 2 × 4 heads
    rotary = work.forward.flops() - linear - attention
    assert 0 <= rotary < 0.01 * linear
    # Twice the linear ones; attention makes its scores again, so five products for two.
    backward = 2 * linear + 2.5 * attention
    assert work.backward.flops() == pytest.approx(backward, rel=0.01)


def test_activations_are_those_that_autograd_keeps():
    """Against the real model, run with data."""
    config = wide(3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mask = torch.ones(2, 32, dtype=torch.int64)
        mask[1, 20:] = 0  # as in a batch of two lengths
        model.base_model(input_ids=mask, attention_mask=mask, use_cache=False)
    real = sum(size for size, _ in kept.values())
    predicted = trace(config, batch_size=2, tokens=32, dtype=torch.float32).saved
    assert predicted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(("name", "projector"), [("paper", 128 * 128), ("respell", 0)])
def test_the_parts_that_a_reader_can_count(name, projector):
    student = count_parameters(wide())
    found = plan(objective=recipe(name))
    assert found.memory["optimiser"] == 8 * (student + projector)
    assert found.memory["student"] == 4 * (student + projector)
    assert found.memory["teacher"] == 4 * count_parameters(wide(6))
    assert (found.student_parameters, found.teacher_parameters) == (
        student,
        found.teacher_parameters,
    )
    assert found.peak == sum(found.memory.values())
    assert found.step_seconds == sum(found.seconds.values())


def test_less_is_predicted_for_what_needs_less():
    whole = plan()
    cached = plan(cached=True)
    assert cached.memory["teacher"] == 4 * 512 * 128
    assert "teacher forward" not in cached.seconds
    frugal = plan(optimiser="sgd")
    assert "optimiser" not in frugal.memory
    checkpointed = plan(gradient_checkpointing=True)
    assert checkpointed.peak < whole.peak
    assert checkpointed.seconds["student forward"] == 2 * whole.seconds["student forward"]
    alone = plan(objective=recipe("cross-entropy"))
    assert alone.teacher_parameters == 0
    assert alone.step_seconds < whole.step_seconds


def test_memory_and_time_grow_with_the_batch_and_the_depth():
    small, large = plan(), plan(batch_size=8)
    assert large.peak > small.peak
    for name in ("student forward", "student backward", "teacher forward"):
        assert large.seconds[name] == pytest.approx(2 * small.seconds[name], rel=0.1)
    deep = plan(wide(8))
    assert deep.seconds["student forward"] == pytest.approx(
        2 * small.seconds["student forward"], rel=0.1
    )


def test_logits_of_many_labels_are_never_held_whole():
    def heads(labels):
        return Heads(recipe("cross-entropy"), wide(), None, labels, 0, None, torch.float32)

    few, more, many = (heads(labels) for labels in (FEW // 2, FEW, 8 * FEW))
    assert more.backward - few.backward == 3 * 4 * FEW // 2 * 512
    assert few.forward == more.forward == 0  # what needs most is in the backward
    assert many.forward < 2 * few.backward
    assert many.backward == 4 * (8 * FEW + 2 * 512) * 128  # states' gradients, and twice the head's
    assert many.work.flops() == 8 * more.work.flops()


def test_bfloat16_keeps_smaller_activations():
    full = trace(wide(), batch_size=4, tokens=256, dtype=torch.float32)
    half = trace(wide(), batch_size=4, tokens=256, dtype=torch.bfloat16)
    assert half.saved < 0.9 * full.saved


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_more_expert_a_token_is_so_many_more_products(family, dtype):
    """Three of hidden x inner for each token and layer; twice as many backward."""
    rows, hidden, inner, layers = 2 * 50, 64, 128, 3

    def flops(experts):
        config = AutoConfig.for_model(
            family, vocab_size=1000, hidden_size=hidden, num_hidden_layers=layers,
            intermediate_size=inner, moe_intermediate_size=inner, num_local_experts=8,
            num_experts=8, num_experts_per_tok=experts, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16,
        )  # fmt: skip
        found = trace(config, batch_size=2, tokens=50, dtype=dtype)
        return np.array([found.forward.flops(), found.backward.flops()])

    more = 3 * 2 * rows * hidden * inner * layers
    assert flops(3) - flops(2) == pytest.approx([more, 2 * more])


def test_a_shrunk_configuration_keeps_one_entry_a_layer():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=12)
    small = shrunk(config, 2)
    assert (small.num_hidden_layers, len(small.layer_types)) == (2, 2)
    assert config.num_hidden_layers == 12


def test_what_cannot_be_run_without_data_says_so():
    class Broken(type(wide())):
        model_type = "broken"

    with pytest.raises(ValueError, match="Broken cannot be run without data"):
        trace(Broken(), batch_size=1, tokens=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="optimiser = 'adam'"):
        plan(optimiser="adam")


def test_a_machine_is_measured():
    machine = measure([(64, 64, 64), (64, 128, 64)], rows=64)
    assert set(machine.products) == {(64, 64, 64), (64, 128, 64)}
    for rate in (machine.flops, machine.bandwidth, machine.streaming, machine.exponentials):
        assert rate > 1e6
    assert 0 < machine.overhead < 1e-2
    assert machine.gemm((64, 64, 64)) == machine.products[64, 64, 64]
    assert machine.gemm((10, 10, 10)) == pytest.approx(2000 / machine.flops)


def test_memory_of_this_machine():
    assert 0.1 < available_memory() < 1e5
