"""What only a GPU can show: graphs, streams, synchronisation, memory, addresses far apart.

On both backends, and on the cases of tests/every_op.py.
"""

from __future__ import annotations

import pytest
import torch

import sra_kernels
from sra_kernels import backends, explain, use_backend
from tests import every_op

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16]
each_op = pytest.mark.parametrize("op", every_op.CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["triton", "cuda"])
def gpu(request):
    status = backends()[request.param]
    if not status.available:
        pytest.skip(status.reason)
    with use_backend(request.param), torch.device("cuda"):
        yield request.param


def cases(op, dtype):
    return {
        name: case for name, case in every_op.cases(op, dtype).items() if every_op.served(op, case)
    }


@each_op
@each_dtype
def test_three_runs_give_the_same_bits(gpu, op, dtype):
    for name, case in cases(op, dtype).items():
        first = every_op.outputs(op, case)
        for _ in range(2):
            for i, (a, b) in enumerate(zip(every_op.outputs(op, case), first, strict=True)):
                assert torch.equal(a, b), f"{name}, output {i}"


@each_op
@each_dtype
def test_no_host_synchronisation(gpu, op, dtype):
    for case in cases(op, dtype).values():
        every_op.outputs(op, case)  # compiles, and makes the tables of the ids
    for name, case in cases(op, dtype).items():
        tensors = {k: x.detach().requires_grad_(k in case.learn) for k, x in case.tensors.items()}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = getattr(sra_kernels, op)(**tensors, **case.options)
            out = out if isinstance(out, torch.Tensor) else out[0]
            if case.learn:
                out.sum().backward()
        except RuntimeError as error:
            raise AssertionError(f"{name} makes the host wait") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_op
def test_a_graph_replays_on_new_numbers(gpu, op):
    """Captured once, then fed other inputs: the same as calling the op on them."""
    for name, case in cases(op, torch.float32).items():
        fixed = {k: x.clone().requires_grad_(k in case.learn) for k, x in case.tensors.items()}

        def run(fixed=fixed, case=case):
            out = getattr(sra_kernels, op)(**fixed, **case.options)
            out = [out] if isinstance(out, torch.Tensor) else [*out]
            if not case.learn:
                return out
            leaves = [fixed[k] for k in case.learn]
            upstream = [torch.ones_like(x) for x in out if x.requires_grad]
            heads = [x for x in out if x.requires_grad]
            return [*out, *torch.autograd.grad(heads, leaves, upstream)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles outside the capture
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            for tensor in fixed.values():
                tensor.mul_(0.5)
        graph.replay()
        replayed = [x.clone() for x in captured]
        for i, (a, b) in enumerate(zip(replayed, run(), strict=True)):
            assert torch.equal(a, b), f"{name}, output {i}"


@each_op
def test_another_stream(gpu, op):
    name, case = next(iter(cases(op, torch.float32).items()))
    want = every_op.outputs(op, case)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = every_op.outputs(op, case)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="one GPU on this machine"
)
@each_op
def test_tensors_on_a_gpu_that_is_not_the_current_one(gpu, op):
    name, case = next(iter(cases(op, torch.float32).items()))
    want = every_op.outputs(op, case)
    with torch.device("cuda:1"):
        other = next(iter(every_op.cases(op, torch.float32).values()))
        got = every_op.outputs(op, other)
    assert all(x.device.index == 1 for x in got)
    assert [x.shape for x in got] == [x.shape for x in want], name


@each_op
def test_compiles_without_a_break(gpu, op):
    name, case = next(iter(cases(op, torch.float32).items()))
    function = getattr(sra_kernels, op)
    tensors = {k: x.detach().requires_grad_(k in case.learn) for k, x in case.tensors.items()}

    def first(x):
        return x if isinstance(x, torch.Tensor) else x[0]

    compiled = torch.compile(lambda **t: first(function(**t, **case.options)), fullgraph=True)
    want = first(function(**tensors, **case.options))
    got = compiled(**tensors)
    assert torch.equal(got, want), name
    if case.learn:
        leaves = [tensors[k] for k in case.learn]
        pairs = zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves),
            strict=True,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in pairs)


def test_memory_stays_under_the_prediction(gpu):
    spans, dims, entries = 512, (256, 384), 32_000
    student, teacher = (torch.randn(spans, d).bfloat16() for d in dims)
    heads = [torch.randn(entries, d).bfloat16() for d in dims]
    student.requires_grad_()
    heads[0].requires_grad_()
    options = {"temperature": 2.0, "direction": "forward", "reduction": "sum"}
    args = (student, heads[0], teacher, heads[1])
    sra_kernels.linear_span_kl(*args, **options).backward()
    student.grad = heads[0].grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sra_kernels.linear_span_kl(*args, **options).backward()
    peak = torch.cuda.max_memory_allocated() - before
    predicted = explain(sra_kernels.linear_span_kl, *args, **options).peak_bytes
    assert peak <= 1.1 * predicted + (32 << 20)  # cuBLAS's own workspace


def test_the_gradient_of_a_head_is_summed_in_float32(gpu):
    """Two chunks whose products cancel: what is left would be lost in bfloat16."""
    from sra_kernels.linear_span_kl import chunks

    total = torch.empty(64, 32)
    a = torch.randn(64, 128).bfloat16()
    b = torch.randn(128, 32).bfloat16()
    chunks.add_product(total, a, b, first=True)
    chunks.add_product(total, -a, (b.float() * 0.9921875).bfloat16(), first=False)
    exact = a.double() @ b.double() - a.double() @ (b.float() * 0.9921875).bfloat16().double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-4, atol=1e-4)


def test_more_than_2_to_the_31_elements(gpu):
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    hidden = torch.zeros(2**31 // 4096 + 2, 4096, dtype=torch.bfloat16)
    hidden[-2:] = torch.tensor([[1.0], [3.0]])
    rows = len(hidden)
    com, _ = sra_kernels.span_com(hidden, torch.tensor([[0, 1], [rows - 2, rows]]))
    assert com[:, 0].tolist() == [0, 2]
    logits = hidden.view(-1)[: 2**31 + 4096].view(2, -1)
    kl = sra_kernels.span_kl(
        logits[:, -4096:], logits[:, -4096:], temperature=1.0, direction="forward"
    )
    assert kl.abs().max() < 1e-5
