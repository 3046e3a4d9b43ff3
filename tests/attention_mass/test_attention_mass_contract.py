"""attention_mass: the gradient contract line by line, memory, and torch's own checks."""

import pytest
import torch
from torch.library import opcheck

from sra_kernels import attention_mass, explain, native, use_backend
from sra_kernels.attention_mass import portable
from sra_kernels.testing import AllocatedMemory
from tests.attention_mass.cases import HEADS, B, case

# --- the contract ---


def test_2_inputs_are_not_mutated(backend):
    query, key, options = case(5, 5, rows=True, mask="random")
    tensors = query, key, options["query_index"], options["key_mask"]
    before = [x.clone() for x in tensors]
    attention_mass(query, key, **options)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_4_no_gradient_and_no_complaint_about_it():
    query, key, options = case(5, 5)
    mass = attention_mass(query.requires_grad_(), key.requires_grad_(), **options)
    assert not mass.requires_grad
    with use_backend("reference"):
        want = attention_mass(query, key, **options)
    assert not want.requires_grad
    torch.testing.assert_close(mass, want)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [True, False])
def test_6_no_host_sync(rows):
    query, key, options = case(5, 7, torch.float32, rows=rows, mask="padding")
    want = attention_mass(query, key, **options)
    query, key = query.cuda(), key.cuda()
    options = {k: v.cuda() if torch.is_tensor(v) else v for k, v in options.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        mass = attention_mass(query, key, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(mass.cpu(), want)


def test_7_nothing_to_attend_to(backend):
    query, key, options = case(5, 5, mask="padding")
    assert not attention_mass(query, key, **options)[3].any()
    empty = attention_mass(query[:0], key[:0], scale=1.0)
    assert empty.shape == (0, 5)
    assert attention_mass(query[:, :, :0], key[:, :, :0], scale=1.0).shape == (B, 0)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@use_backend("torch")
def test_8_same_bits_again_and_the_same_numbers_for_any_chunk(rows, window, monkeypatch):
    query, key, options = case(33, 40, torch.float32, rows=rows, mask="random")
    options["window"] = window
    first = attention_mass(query, key, **options)
    assert torch.equal(attention_mass(query, key, **options), first)
    for size in (1, 4 * HEADS * 40 * 3, 4 * HEADS * 40 * 33, 4 * HEADS * 40 * 33 * 2):
        monkeypatch.setattr(portable, "CHUNK_BYTES", size)
        torch.testing.assert_close(attention_mass(query, key, **options), first)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@use_backend("torch")
def test_memory_stays_under_the_plan_and_keys_are_not_repeated(rows, dtype, monkeypatch):
    monkeypatch.setattr(portable, "CHUNK_BYTES", 1 << 20)
    keys = 600
    query, key, options = case(keys, keys, dtype, kv_heads=1, rows=rows)
    with AllocatedMemory() as memory:
        attention_mass(query, key, **options)
    plan = explain(attention_mass, query, key, **options)
    assert 0.3 * plan.peak_bytes < memory.peak <= plan.peak_bytes
    assert memory.largest < 4 * HEADS * keys * keys / 4


@pytest.mark.skipif(native.cpu is None, reason="no C++ library here")
def test_the_plan_is_that_of_the_backend():
    query, key = torch.empty(2, 6, 9000, 64, device="meta"), torch.empty(2, 2, 9000, 64)
    with use_backend("cpu"):
        every = explain(attention_mass, query, key, scale=1.0)
        given = explain(attention_mass, query, key, scale=1.0, lse=torch.empty(2, 6, 9000))
        one = explain(attention_mass, query, key, scale=1.0, query_index=torch.tensor([3, 4]))
    assert every.backend == "cpu"
    assert every.chunk == "tiles of 48 query rows, 64 partial masses a sample"
    assert one.peak_bytes < given.peak_bytes < every.peak_bytes < 9000 * 9000
    with use_backend("torch"):
        assert "chunks of" in explain(attention_mass, query, key, scale=1.0).chunk


# --- torch's own checks ---


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("batch", [0, B])
def test_opcheck(rows, batch):
    query, key, options = case(5, 7, torch.float32, rows=rows, mask="padding")
    index = options["query_index"][:batch] if rows else None
    args = (query[:batch], key[:batch], index, 0.5, options["key_mask"][:batch], 2.0, 3, None)
    opcheck(torch.ops.sra_kernels.attention_mass_forward.default, args)
    opcheck(torch.ops.sra_kernels.attention_mass_forward.default, (*args[:4], *[None] * 4))


@pytest.mark.parametrize("rows", [True, False])
def test_compiles_without_a_break_and_for_any_length(rows):
    def mass(query, key, index, mask):
        return attention_mass(query, key, query_index=index, scale=0.5, key_mask=mask).square()

    torch._dynamo.reset()
    compiled = torch.compile(mass, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 8, 13):
            query, key, options = case(length, length, torch.float32, rows=rows, mask="padding")
            args = (query, key, options.get("query_index"), options["key_mask"])
            torch.testing.assert_close(compiled(*args), mass(*args))


def test_a_raw_operator_refuses_to_be_differentiated():
    query, key, _ = case(5, 5)
    with pytest.raises(RuntimeError, match=r"Call sra_kernels\.attention_mass"):
        torch.ops.sra_kernels.attention_mass_forward(
            query.requires_grad_(), key, None, 1.0, None, None, None, None
        )
