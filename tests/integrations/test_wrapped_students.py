"""Whatever a student is wrapped in, its gradients are the plain student's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from sra import SpanDistiller, recipe
from tests import tiny

OBJECTIVES = {
    "paper": recipe("paper", outside="weight", gamma=1.0),
    "boundary": recipe("boundary"),
    "respell": recipe("respell"),
}
ROWS = tiny.ROWS[:4]


@pytest.fixture(scope="module")
def batch():
    return tiny.collator()(ROWS)


@pytest.fixture(params=OBJECTIVES.values(), ids=OBJECTIVES)
def objective(request):
    return request.param


def distiller(student, objective, teacher=None):
    torch.manual_seed(0)  # of the projector
    return SpanDistiller(
        student,
        teacher or tiny.teacher_model(torch.float64),
        objective,
        vocabulary=tiny.vocabulary(),
    ).train()


def gradients(module, batch):
    """The loss, and the gradient of every parameter by its name in the plain student."""
    module.zero_grad()
    out = module(**batch)
    out.loss.backward()
    grads = {
        name.replace("_orig_mod.", ""): p.grad
        for name, p in module.named_parameters()
        if p.grad is not None
    }
    return out, grads


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- LoRA ---


def lora(student, **options):
    """A student inside PEFT whose adapters are not zero."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    wrapped = peft.get_peft_model(student, peft.LoraConfig(r=3, lora_alpha=5, **options))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn_like(p))
    return wrapped.double()


def merged(wrapped):
    """The plain student that computes the same."""
    return copy.deepcopy(wrapped).merge_and_unload().requires_grad_(True)


@pytest.mark.parametrize(
    ("targets", "tied"),
    [
        ("all-linear", True),
        (["q_proj", "down_proj", "lm_head"], False),
        (["lm_head"], False),
        (["embed_tokens", "v_proj"], False),
    ],
    ids=["frozen head", "head too", "head alone", "embedding"],
)
def test_lora_gradients_are_those_of_the_merged_student(batch, objective, targets, tied):
    wrapped = lora(tiny.student_model(torch.float64, tied=tied), target_modules=targets)
    plain = merged(wrapped)
    out, got = gradients(distiller(wrapped, objective), batch)
    want_out, whole = gradients(distiller(plain, objective), batch)
    torch.testing.assert_close(out.loss, want_out.loss, rtol=1e-12, atol=0)
    trained = 0
    for name, layer in wrapped.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        upstream = whole[f"student.{name}.weight"]  # dL / d(W + scaling B A)
        scaling = layer.scaling["default"]
        if "default" in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            upstream = upstream.T
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(a.grad, scaling * b.T @ upstream, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(b.grad, scaling * upstream @ a.T, rtol=1e-9, atol=1e-14)
        trained += 1
    assert trained
    assert not any("base_layer" in name for name in got)


def test_a_frozen_head_gets_no_gradient(batch, objective):
    wrapped = lora(tiny.student_model(torch.float64, tied=False), target_modules="all-linear")
    _, got = gradients(distiller(wrapped, objective), batch)
    assert all("lora_" in name or "projector" in name for name in got)
    assert wrapped.get_base_model().lm_head.weight.grad is None


def test_a_head_that_is_saved_whole(batch, objective):
    wrapped = lora(
        tiny.student_model(torch.float64, tied=False),
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    )
    with torch.no_grad():
        wrapped.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.01)
    plain = merged(wrapped)
    out, _ = gradients(distiller(wrapped, objective), batch)
    want_out, whole = gradients(distiller(plain, objective), batch)
    torch.testing.assert_close(out.loss, want_out.loss, rtol=1e-12, atol=0)
    head = wrapped.get_base_model().lm_head
    trained = head.modules_to_save["default"].weight
    torch.testing.assert_close(trained.grad, whole["student.lm_head.weight"], rtol=1e-9, atol=1e-14)
    assert head.original_module.weight.grad is None


def test_a_switched_off_adapter_is_the_plain_student(batch):
    student = tiny.student_model(torch.float64, tied=False)
    want = distiller(copy.deepcopy(student), OBJECTIVES["paper"])(**batch).loss
    wrapped = lora(student, target_modules=["q_proj", "lm_head"])
    module = distiller(wrapped, OBJECTIVES["paper"])
    assert (module(**batch).loss - want).abs() > 1e-6
    with wrapped.disable_adapter():
        torch.testing.assert_close(module(**batch).loss, want, rtol=1e-12, atol=0)


def test_the_adapter_is_what_is_saved(tmp_path, batch):
    peft = pytest.importorskip("peft")
    student = tiny.student_model(torch.float64)
    student.save_pretrained(tmp_path / "plain")
    wrapped = lora(
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), target_modules=["q_proj"]
    )
    module = distiller(wrapped, OBJECTIVES["paper"])
    module.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=torch.float64
    )
    got = distiller(loaded, OBJECTIVES["paper"])(**batch).loss
    torch.testing.assert_close(got, module(**batch).loss, rtol=1e-6, atol=0)


# --- gradient checkpointing ---


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing(batch, objective, reentrant, attention):
    student = tiny.student_model(torch.float64)
    student.set_attn_implementation(attention)
    module = distiller(student, objective)
    want_out, want = gradients(module, batch)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:  # which needs an input that has a gradient
        student.enable_input_require_grads()
    assert student.is_gradient_checkpointing
    out, got = gradients(module, batch)
    torch.testing.assert_close(out.loss, want_out.loss, rtol=0, atol=0)
    assert_same(got, want, rtol=1e-12, atol=1e-16)


def test_gradient_checkpointing_of_a_lora_student(batch):
    wrapped = lora(tiny.student_model(torch.float64), target_modules="all-linear")
    module = distiller(wrapped, OBJECTIVES["paper"])
    want_out, want = gradients(module, batch)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    out, got = gradients(module, batch)
    torch.testing.assert_close(out.loss, want_out.loss, rtol=0, atol=0)
    assert_same(got, want, rtol=1e-12, atol=1e-16)


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(batch, objective, dtype):
    """Near the float32 gradients; parameters and their gradients stay float32."""
    module = distiller(tiny.student_model(), objective, tiny.teacher_model())
    want_out, want = gradients(module, batch)
    with torch.autocast("cpu", dtype=dtype):
        out = module(**batch)
    module.zero_grad()
    out.loss.backward()
    assert out.loss.item() == pytest.approx(want_out.loss.item(), rel=0.02)
    for name, p in module.named_parameters():
        assert p.grad.dtype == torch.float32
        error = (p.grad - want[name]).norm() / want[name].norm()
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02), (name, float(error))


# --- torch.compile ---


def compiled(student, how, backend):
    if how == "torch.compile(student)":
        return torch.compile(student, backend=backend)
    {"student": student, "student.model": student.model}[how.removesuffix(".compile()")].compile(
        backend=backend
    )
    return student


@pytest.mark.parametrize(
    "how", ["torch.compile(student)", "student.compile()", "student.model.compile()"]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_compiled_students(batch, how, attention):
    student = tiny.student_model(torch.float64)
    student.set_attn_implementation(attention)
    module = distiller(copy.deepcopy(student), OBJECTIVES["paper"])
    want_out, want = gradients(module, batch)
    torch._dynamo.reset()
    module = distiller(compiled(student, how, "aot_eager"), OBJECTIVES["paper"])
    for _ in range(2):  # compiled, then from the cache
        out, got = gradients(module, batch)
        torch.testing.assert_close(out.loss, want_out.loss, rtol=1e-12, atol=0)
        assert_same(got, want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["respell", "boundary"])
def test_a_compiled_distiller(batch, name):
    """As `torch_compile=True` of a Trainer does it."""
    module = distiller(tiny.student_model(torch.float64), OBJECTIVES[name])
    want_out, want = gradients(module, batch)
    want = {name: grad.clone() for name, grad in want.items()}
    module.vocabularies[0]._tries.clear()  # made when it is first asked for
    torch._dynamo.reset()
    out, got = gradients(torch.compile(module, backend="eager"), batch)
    torch.testing.assert_close(out.loss, want_out.loss, rtol=1e-12, atol=0)
    assert_same(got, want, rtol=1e-9, atol=1e-14)


def test_the_compiled_trunk_runs_whole_and_is_not_compiled_again():
    """Recording the attention mass breaks no graph, and widths that change compile once more."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    student = tiny.student_model()
    torch._dynamo.reset()
    student.model.compile(backend=backend, fullgraph=True)
    module = distiller(student, OBJECTIVES["boundary"], tiny.teacher_model())
    counts = []
    for rows in (tiny.ROWS[:4], tiny.ROWS[4:], tiny.ROWS[2:5], tiny.ROWS[:4]):
        gradients(module, tiny.collator()(rows))
        counts.append(len(graphs))
    assert counts[0] == 1
    assert counts[-1] <= 3  # with any width, and with any number of rows
    assert counts[-1] == counts[-2]
