"""linear_span_kl(preset="tiles"): a value without gradient, with no logits in memory."""

import pytest
import torch
from torch.library import opcheck

from sra_kernels import backend as backends
from sra_kernels import explain, linear_span_kl, use_backend
from sra_kernels.testing import DTYPES, assert_as_good_as_torch

OBJECTIVES = {
    "forward": {"direction": "forward"},
    "reverse": {"direction": "reverse"},
    "jsd": {"direction": "jsd", "beta": 0.3},
}
TRANSFORMS = {
    "plain": {},
    "capped": {"student_softcap": 3.0, "teacher_scale": 0.5, "teacher_softcap": 2.0},
}


@pytest.fixture
def tiled(backend):
    """The backends that serve the preset."""
    if backends.MODULES[backend] != "triton":
        pytest.skip("only the Triton kernels serve this preset")


def case(dtype, spans=7, entries=(203, 301), dims=(24, 41), full=False, one_vocabulary=False):
    """Keyword arguments of linear_span_kl; `full`: with biases and weights."""
    if one_vocabulary:
        entries = (entries[0],) * 2
    given = {"temperature": 1.7, "reduction": "none"}
    for side, n, d in zip(("student", "teacher"), entries, dims, strict=True):
        given[side] = torch.randn(spans, d).to(dtype)
        given[f"{side}_head"] = (torch.randn(n, d) * 3 / d**0.5).to(dtype)
        if full:
            given[f"{side}_bias"] = torch.randn(n).to(dtype)
    if full:
        given["span_weights"] = torch.rand(spans) * (torch.arange(spans) != 1)
    if not one_vocabulary:
        given["vocab"] = tuple(torch.randperm(n)[: min(entries) - 6] for n in entries)
    return given


def tiles(given, **more):
    return linear_span_kl(**given | more, preset="tiles")


def reference(given, dtype):
    real = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and name != "span_weights" else x
        for name, x in given.items()
    }
    with use_backend("reference"):
        return linear_span_kl(**real)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", OBJECTIVES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("full", [True, False], ids=["bias and weights", "neither"])
def test_matches_float64(tiled, poison, dtype, direction, transform, full):
    given = case(dtype, full=full, one_vocabulary=not full)
    given |= OBJECTIVES[direction] | TRANSFORMS[transform]
    kl = tiles(given)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good_as_torch(kl, reference(given, dtype), reference(given, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_and_tiles_of_spans_meet(tiled, poison, dtype):
    """More of each than one program has."""
    given = case(dtype, spans=130, entries=(600, 620), full=True) | {"direction": "jsd"}
    given |= {"beta": 0.5}
    first = tiles(given)
    assert_as_good_as_torch(first, reference(given, dtype), reference(given, torch.float64))
    assert torch.equal(first, tiles(given))
    assert "slices of 512 entries" in str(explain(linear_span_kl, **given, preset="tiles"))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_equals_the_chunks(tiled, reduction):
    given = case(torch.float32, full=True) | {"direction": "reverse", "reduction": reduction}
    torch.testing.assert_close(tiles(given), linear_span_kl(**given), rtol=1e-5, atol=1e-6)


def test_equal_sides_give_exactly_nothing(tiled):
    given = case(torch.float32, dims=(24, 24), one_vocabulary=True) | {"direction": "forward"}
    given |= {"teacher": given["student"], "teacher_head": given["student_head"]}
    assert not tiles(given).any()


def test_a_teacher_of_another_dtype_and_any_strides(tiled):
    given = case(torch.float64, full=True) | {"direction": "forward"}
    want = tiles(given)
    turned = {
        name: given[name].T.contiguous().T
        for name in ("student", "student_head", "teacher", "teacher_head")
    }
    twice = {
        name: given[name].repeat_interleave(2)[::2] for name in ("student_bias", "span_weights")
    }
    ids = torch.stack(given["vocab"], 1)
    torch.testing.assert_close(tiles(given | turned | twice | {"vocab": ids.unbind(1)}), want)
    low = {name: given[name].bfloat16() for name in ("teacher", "teacher_head", "teacher_bias")}
    for dtype in (torch.float32, torch.float64):
        ours = {name: given[name].to(dtype) for name in ("student", "student_head", "student_bias")}
        kl = tiles(given | low | ours)
        assert kl.dtype == dtype
        torch.testing.assert_close(kl.double(), want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_span_of_weight_zero_may_hold_nan(tiled, side):
    given = case(torch.float32, full=True) | {"direction": "forward"}
    want = tiles(given)
    assert want[1] == 0
    given[side][1] = torch.nan
    torch.testing.assert_close(tiles(given), want, rtol=0, atol=0)
    given[side][2] = torch.nan
    assert tiles(given)[2].isnan()


def test_entries_out_of_reach_and_nothing_to_learn_from(tiled):
    """Biases of minus infinity: of some of the teacher's entries, then of all."""
    given = case(torch.float32, full=True) | {"direction": "forward"}
    given["teacher_bias"][::3] = -torch.inf
    exact = reference(given, torch.float64)
    torch.testing.assert_close(tiles(given).double(), exact, rtol=1e-4, atol=1e-6)
    given["teacher_bias"].fill_(-torch.inf)
    assert not tiles(given).any()
    assert tiles(given | case(torch.float32, spans=0, full=True)).shape == (0,)


def test_row_addresses_are_64_bit(tiled):
    """Rows of the teacher's head 2^31 elements apart, in virtual memory."""
    given = case(torch.bfloat16, entries=(2, 2), dims=(8, 16), one_vocabulary=True)
    near = given["teacher_head"]
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 16), (2**31, 1))
    far.copy_(near)
    given["direction"] = "forward"
    assert torch.equal(tiles(given), tiles(given | {"teacher_head": far}))


def test_a_few_sums_for_each_span_are_all_the_memory(backend):
    """As planned: 5 numbers for each span and slice, and the value."""
    if backends.MODULES[backend] != "triton":
        pytest.skip("only the Triton kernels serve this preset")
    meta = {"device": "meta", "dtype": torch.bfloat16}
    plan = explain(
        linear_span_kl, torch.empty(8192, 2048, **meta), torch.empty(128_256, 2048, **meta),
        torch.empty(8192, 4096, **meta), torch.empty(128_256, 4096, **meta),
        temperature=1.0, direction="forward", reduction="sum", preset="tiles",
    )  # fmt: skip
    assert plan.peak_bytes < 2**21  # against 2 GiB for one logit matrix
    assert "no logits in memory" in str(plan)


def test_opcheck(tiled):
    given = case(torch.float32, full=True)
    tensors = (
        *(given[f"student{part}"] for part in ("", "_head", "_bias")),
        *(given[f"teacher{part}"] for part in ("", "_head", "_bias")),
        *given["vocab"], given["span_weights"],
    )  # fmt: skip
    args = (*tensors, 0.5, None, None, 3.0, 2.0, "forward", None, "renormalise")
    opcheck(torch.ops.sra_kernels.linear_span_kl_tiles.default, args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "tile"}, "preset must be 'chunks' or 'tiles', not 'tile'"),
        ({"outside": "weight"}, "for outside='weight' or 'bucket' and .* use preset='chunks'"),
        ({"return_shared_mass": True}, "return_shared_mass use preset='chunks'"),
        ({"student_head": torch.randn(203, 24, requires_grad=True)}, r"or torch\.no_grad\(\)"),
    ],
)
def test_what_it_cannot_do_it_says(options, message):
    given = case(torch.float32) | {"direction": "forward", "preset": "tiles"}
    with pytest.raises(ValueError, match=message):
        linear_span_kl(**given | options)


def test_without_gradients_a_parameter_is_served(tiled):
    given = case(torch.float32) | {"direction": "forward"}
    want = tiles(given)
    given["student_head"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(tiles(given), want)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_other_backends_name_the_one_that_has_it(name):
    if not backends.backends()[name].available:
        pytest.skip(f"{name} is not available")
    message = rf"'{name}' does not serve linear_span_kl\(preset='tiles'\)\. use_backend\('triton'\)"
    with use_backend(name), pytest.raises(RuntimeError, match=message):
        tiles(case(torch.float32) | {"direction": "forward"})
    given = case(torch.float32) | {"direction": "forward", "preset": "tiles"}
    with use_backend(name), pytest.raises(RuntimeError, match="Only the Triton kernels serve"):
        explain(linear_span_kl, **{**given, "temperature": 1.0, "reduction": "sum"})


def test_the_reference_serves_it():
    given = case(torch.float32, full=True) | {"direction": "forward"}
    with use_backend("reference"):
        assert torch.equal(tiles(given), linear_span_kl(**given))
