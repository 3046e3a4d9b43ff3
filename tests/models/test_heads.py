"""The output layer in every form it has: what it predicts, and what its gradient costs."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForCausalLM

from sra import SpanDistiller, recipe
from sra.model import check_head, head_of
from sra.states import model_states, run_trunk, trunk_inputs
from tests import tiny
from tests.models.families import FAMILIES, NAMES, build
from tests.objective import plain

IDS = torch.arange(3, 20)[None]


def distiller(student, teacher=None, objective="paper", **changes):
    torch.manual_seed(0)
    return SpanDistiller(
        student,
        teacher or tiny.teacher_model(torch.float64),
        recipe(objective, **changes),
        vocabulary=tiny.vocabulary(),
    )


def lora(student, **options):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    wrapped = peft.get_peft_model(student, peft.LoraConfig(r=3, **options)).double()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "tokens_delta")):
                p.add_(0.1 * torch.randn_like(p))
    return wrapped


HEADS = {
    "tied": lambda: tiny.student_model(torch.float64, tied=True),
    "untied": lambda: tiny.student_model(torch.float64, tied=False),
    "LoRA": lambda: lora(tiny.student_model(torch.float64, tied=False), target_modules=["lm_head"]),
    "some rows": lambda: lora(
        tiny.student_model(torch.float64, tied=True),
        target_modules=["q_proj"],
        trainable_token_indices=[3, 7],
    ),
    "saved whole": lambda: lora(
        tiny.student_model(torch.float64, tied=False),
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_logits_of_a_wrapped_head(name):
    model = HEADS[name]().eval()
    with torch.no_grad():
        logits = head_of(model).logits(model_states(model, IDS).hidden[0])
        torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)


def test_trained_rows_of_a_tied_head_have_the_gradients_of_both_its_uses():
    wrapped = HEADS["some rows"]()
    plain = copy.deepcopy(wrapped).merge_and_unload().requires_grad_(True)
    batch = tiny.collator()(tiny.ROWS)
    want = distiller(plain)(**batch).loss
    got = distiller(wrapped)(**batch).loss
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    want.backward()
    got.backward()
    (rows,) = (p for name, p in wrapped.named_parameters() if "tokens_delta" in name)
    torch.testing.assert_close(rows.grad, plain.lm_head.weight.grad[[3, 7]], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "said"), [("use_dora", "DoraLinearVariant"), ("lora_bias", "lora_bias")]
)
def test_an_adapter_of_the_head_that_is_no_product(kind, said):
    model = build("phi-partial-rotary-bias", tiny.STUDENT_ROWS)  # its output layer has a bias
    elsewhere = lora(copy.deepcopy(model), target_modules=["q_proj"], **{kind: True})
    assert head_of(elsewhere).bias is not None
    wrapped = lora(model, target_modules=["lm_head"], **{kind: True})
    with pytest.raises(TypeError, match=rf"'default' of the output layer \({said}\).*plain LoRA"):
        head_of(wrapped)
    with wrapped.disable_adapter():
        head_of(wrapped)


def test_a_tied_head_has_the_gradients_of_both_its_uses():
    tied = tiny.student_model(torch.float64, tied=True)
    untied = tiny.student_model(torch.float64, tied=False)
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        distiller(model)(**tiny.collator()(tiny.ROWS)).loss.backward()
    both = untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad
    torch.testing.assert_close(tied.lm_head.weight.grad, both)


class OfShape(TorchDispatchMode):
    """Counts the tensors of a shape that operations make."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        self.count += sum(x.shape in (self.shape, self.shape[::-1]) for x in tensors)
        return out


@pytest.mark.parametrize("objective", ["paper", "boundary", "respell"])
def test_no_gradient_of_a_frozen_head_is_computed(objective):
    made = {}
    for trained in (True, False):
        student = tiny.student_model(torch.float64, tied=False)
        student.lm_head.requires_grad_(trained)
        student.model.embed_tokens.requires_grad_(False)  # of the same shape
        loss = distiller(student, objective=objective)(**tiny.collator()(tiny.ROWS)).loss
        with OfShape(student.lm_head.weight.shape) as counter:
            loss.backward()
        made[trained] = counter.count
        assert (student.lm_head.weight.grad is not None) == trained
        assert student.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    views = made[False]  # the weight itself, transposed for the gradient of the states
    assert made[True] > views
    student.lm_head.weight.requires_grad_(False)
    assert views <= 4


@pytest.mark.parametrize("outside", ["renormalise", "weight"])
def test_rows_that_no_token_has_change_no_span_term(outside):
    """Heads are padded to round sizes; whatever such a row predicts, spans do not see it."""
    teacher = tiny.teacher_model(torch.float64)
    student = tiny.student_model(torch.float64, tied=False)
    batch = tiny.collator()(tiny.ROWS)
    with torch.no_grad():
        want = distiller(student, teacher, outside="renormalise")(**batch)
        student.lm_head.weight[tiny.STUDENT_ENTRIES :] *= 30
        teacher.lm_head.weight[tiny.TEACHER_ENTRIES :] *= 30
        got = distiller(student, teacher, outside=outside)(**batch)
    assert got.ce > want.ce
    for term in ("cosine", "geometry"):
        torch.testing.assert_close(got[term], want[term])
    if outside == "renormalise":
        torch.testing.assert_close(got.logit, want.logit)
    else:  # the teacher's probability that lies on such rows is not shared
        assert got.logit < want.logit


SPECIAL = ["phi-partial-rotary-bias", "cohere-logit-scale", "gemma2-softcaps-windows"]


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("outside", ["renormalise", "bucket"])
def test_the_logit_term_is_that_of_the_model_s_own_logits(name, outside):
    """A bias, a scale and a softcap on both sides, against the softmax of `model(...).logits`."""
    assert name in NAMES
    student, teacher = build(name, tiny.STUDENT_ROWS), build(name, tiny.TEACHER_ROWS)
    module = distiller(student, teacher, logit_state="end", outside=outside, normaliser="spans")
    batch = tiny.collator()(tiny.ROWS)
    with torch.no_grad():
        got = module(**batch).logit
        own = student(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1).double()
        (of,) = batch["teachers"]
        other = teacher(of["input_ids"], of["attention_mask"]).logits.flatten(0, 1).double()
        ids = tiny.vocabulary().student_ids, tiny.vocabulary().teacher_ids
        values = [
            plain.divergence(
                own[a - 1], other[b - 1], ids,
                temperature=2.0, outside=outside, direction="forward", beta=None,
            )
            for (_, a), (_, b) in zip(of["student_spans"], of["teacher_spans"], strict=True)
        ]  # fmt: skip
    want = torch.stack(values).mean()
    assert want > 0.01
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


# --- heads that one matrix does not describe ---

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 48, "pad_token_id": 0,
}  # fmt: skip
DENSE = {
    "bert": ("BertConfig", {"is_decoder": True}),
    "roberta": ("RobertaConfig", {"is_decoder": True}),
    "modernbert-decoder": ("ModernBertDecoderConfig", {"num_hidden_layers": 2}),
}
CAPPED = {
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 3.0},
    ),
    "xlstm": ("xLSTMConfig", {"num_heads": 2, "chunk_size": 4, "output_logit_soft_cap": 3.0}),
}


def of_config(kinds, name):
    class_name, own = kinds[name]
    if not hasattr(transformers, class_name):
        pytest.skip(f"this transformers has no {class_name}")
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**{**SIZES, **own})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", DENSE)
def test_a_transform_before_the_head_is_refused(name):
    model = of_config(DENSE, name)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"are not its output layer times its last states"):
            model_states(model, IDS)


@pytest.mark.parametrize("name", CAPPED)
def test_soft_caps_by_other_names(name):
    model = of_config(CAPPED, name).eval()
    head = head_of(model)
    assert head.softcap == 3
    with torch.no_grad():
        states = run_trunk(model, **trunk_inputs(IDS)).last_hidden_state
        logits = model(input_ids=IDS, use_cache=False).logits
    assert logits.abs().max() > 1.5  # where the cap is felt
    torch.testing.assert_close(head.logits(states), logits.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_of_an_unknown_name_is_noticed(dtype, monkeypatch):
    model = build("gemma2-softcaps-windows", 97).to(dtype)
    monkeypatch.setattr("sra.model.logit_softcap", lambda config: None)
    with pytest.raises(TypeError, match=r"Gemma2ForCausalLM are not .* differ by [\d.]+%"):
        check_head(model)


def test_the_check_of_a_head_leaves_no_trace():
    model = build("gpt2", 97, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    frozen = model.transformer.h[0].eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    state = torch.get_rng_state()
    for _ in range(2):
        check_head(model)
    assert calls == [False]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.transformer.h[1].training
    assert not frozen.training


def test_a_head_without_weights_is_not_asked():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.student_model().config)
    check_head(model)


def test_the_special_heads_are_special():
    for name in SPECIAL:
        head = head_of(build(name, 64))
        assert sum(x is not None for x in (head.bias, head.scale, head.softcap)) == 1, name
    assert set(SPECIAL) <= set(FAMILIES)


def test_a_deep_copy_of_the_student_can_teach_it():
    student = tiny.student_model(torch.float64)
    teacher = copy.deepcopy(student)
    module = SpanDistiller(student, teacher, recipe("boundary"))
    assert all(p.requires_grad for p in module.student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
