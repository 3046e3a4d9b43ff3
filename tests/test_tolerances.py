"""A tolerance is worth what it refuses: wrong gradients of every op must fail the tests' bound."""

from __future__ import annotations

import pytest
import torch

from sra_kernels import attention_mass, linear_span_kl, span_com, span_geometry, span_kl
from sra_kernels.attention_mass.reference import attention_mass as attention_mass_reference
from sra_kernels.linear_span_kl.reference import linear_span_kl as linear_span_kl_reference
from sra_kernels.span_com.reference import span_com as span_com_reference
from sra_kernels.span_geometry.reference import span_geometry as span_geometry_reference
from sra_kernels.span_kl.reference import span_kl as span_kl_reference
from sra_kernels.testing import (
    DTYPES,
    assert_as_good_as_torch,
    poisoned_empty,
    ragged_spans,
)


def largest_row(x):
    return x.abs().flatten(1).amax(1).argmax()[None] if x.ndim > 1 else x.abs().argmax()[None]


WRONG = {
    "zero": torch.zeros_like,
    "NaN in one place": lambda x: x.index_fill(0, torch.tensor([0]), torch.nan),
    "the other sign": lambda x: -x,
    "a row late": lambda x: x.roll(1, 0),
    "an entry late": lambda x: x.roll(1, -1),
    "transposed": lambda x: x.T.reshape(x.shape) if x.ndim == 2 else x.flip(0),
    "the largest row missing": lambda x: x.index_fill(0, largest_row(x), 0),
    "the largest row twice": lambda x: x.index_add(0, largest_row(x), x[largest_row(x)]),
}  # fmt: skip

SPANS = ragged_spans([3, 1, 2, 5] * 10)
ROWS = int(SPANS.max())
OFFSETS = torch.tensor([0, 12, 25, 40])
IDS = torch.arange(50), torch.arange(50).flip(0)
KL = {"temperature": 1.5, "direction": "forward"}


def weighted(out, upstream):
    """Every row has its own upstream gradient, or a sum could hide a row in the wrong place."""
    return (out * upstream[: len(out)].to(out.dtype)).sum()


def com(op, dtype, x):
    return op(x["hidden"], SPANS, x["weights"])[0] @ x["direction"]


def kl(op, dtype, x):
    if op is span_kl:
        return op(x["logits"], x["teacher"], vocab=IDS, **KL)
    return op(x["logits"], x["teacher"], *IDS, 1.5, "forward", None, "renormalise")[0]


def linear(op, dtype, x):
    student, head, bias = x["student"], x["head"], x["bias"]
    teacher, teacher_head = x["teacher_state"], x["teacher_head"]
    if op is linear_span_kl:
        return op(
            student, head, teacher, teacher_head, vocab=IDS, reduction="none", student_bias=bias,
            **KL,
        )  # fmt: skip
    return op(
        student, head, bias, teacher, teacher_head, None, *IDS, None, None, None, None, None, 1.5,
        "forward", None, "renormalise",
    )[0]  # fmt: skip


def geometry(op, dtype, x):
    return op(x["student"], x["teacher_state"], x["span_weights"], OFFSETS)


# op, its reference, how both are called, and the inputs that get a gradient
CASES = {
    "span_com": (span_com, span_com_reference, com, ("hidden", "weights")),
    "span_kl": (span_kl, span_kl_reference, kl, ("logits",)),
    "linear_span_kl": (
        linear_span_kl, linear_span_kl_reference, linear, ("student", "head", "bias")
    ),
    "span_geometry": (span_geometry, span_geometry_reference, geometry, ("student",)),
}  # fmt: skip
GRADIENTS = [(name, leaf) for name, (*_, leaves) in CASES.items() for leaf in leaves]


def inputs(dtype):
    sizes = {
        "hidden": (ROWS, 32), "logits": (40, 50), "teacher": (40, 60), "student": (40, 16),
        "head": (50, 16), "bias": (50,), "teacher_state": (40, 24), "teacher_head": (60, 24),
        "direction": (32,),
    }  # fmt: skip
    torch.manual_seed(0)
    made = {name: torch.randn(size).to(dtype) for name, size in sizes.items()}
    wide = torch.promote_types(dtype, torch.float32)
    return made | {
        "weights": torch.rand(ROWS).to(wide) + 0.1,
        "span_weights": torch.rand(40).to(wide),
        "upstream": torch.randn(40, dtype=wide),
    }


def gradient(name, leaf, dtype, *, ours=False, exact=False):
    op, reference, call, _ = CASES[name]
    x = inputs(dtype)
    if exact:
        x = {key: value.double() for key, value in x.items()}
    x[leaf].requires_grad_()
    out = call(op if ours else reference, dtype, x)
    return torch.autograd.grad(weighted(out, x["upstream"]), x[leaf])[0]


def refuses_every_wrong_one(ours, torchs, exact, percent=1):
    factors = {
        f"times {1 + p / 100}": lambda x, p=p: x * (1 + p / 100) for p in (percent, -percent)
    }
    passed = []
    for what, spoil in (WRONG | factors).items():
        try:
            assert_as_good_as_torch(spoil(ours), torchs, exact, what)
        except AssertionError as refusal:
            assert "above the bound" in str(refusal)  # noqa: PT017
        else:
            passed.append(what)
    assert not passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "leaf"), GRADIENTS)
def test_the_right_gradient_passes_and_every_wrong_one_fails(name, leaf, dtype):
    ours = gradient(name, leaf, dtype, ours=True)
    torchs = gradient(name, leaf, dtype)
    exact = gradient(name, leaf, dtype, exact=True)
    assert_as_good_as_torch(ours, torchs, exact, "right")
    # Logits rounded to bfloat16 put torch's own gradient 1 % off, so that much is no error there.
    coarse = name == "linear_span_kl" and dtype == torch.bfloat16
    refuses_every_wrong_one(ours, torchs, exact, percent=3 if coarse else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_mass_which_has_no_gradient(dtype):
    torch.manual_seed(0)
    query, key = torch.randn(3, 4, 1, 8).to(dtype), torch.randn(3, 2, 20, 8).to(dtype)
    last = torch.zeros(3, dtype=torch.int64)
    rest = (last, 0.5, None, None, None)
    exact = attention_mass_reference(query.double(), key.double(), *rest)
    torchs = attention_mass_reference(query, key, *rest)
    ours = attention_mass(query, key, query_index=last, scale=0.5)
    assert_as_good_as_torch(ours, torchs, exact, "right")
    refuses_every_wrong_one(ours, torchs, exact)


def test_another_shape_fails():
    x = torch.randn(3, 4)
    with pytest.raises(AssertionError, match=r"shape \[4, 3\] instead of \[3, 4\]"):
        assert_as_good_as_torch(x.T, x, x.double())


def test_poisoned_memory_shows_a_missed_write():
    with poisoned_empty():
        for made in (torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty(2)):
            assert made.isnan().all()
        assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
    assert torch.zeros(2).new_empty(2).shape == (2,)
