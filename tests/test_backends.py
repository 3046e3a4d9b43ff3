"""Which backend serves, and what is said where one cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sra_kernels
from sra_kernels import backend, backends, native, use_backend
from tests import every_op

ROOT = Path(__file__).parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def com(device="cpu"):
    hidden, spans = torch.randn(4, 8, device=device), torch.tensor([[0, 2]], device=device)
    return sra_kernels.span_com(hidden, spans)


@no_gpu
def test_triton_without_a_gpu_says_so_and_names_the_interpreter():
    message = (
        "'triton' was asked for span_com, but torch sees no GPU on this machine. "
        r"Use use_backend\('auto'\), or 'interpreter' to run the same kernels on a CPU"
    )
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        com()


@no_gpu
def test_cuda_without_a_gpu_or_without_the_library_says_which():
    with (
        use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"no GPU on this machine|_cuda\.so was not built"),
    ):
        com()


def test_every_backend_is_listed_with_its_reason():
    listed = backends()
    assert set(listed) == set(backend.NAMES) - {"auto"}
    assert all(str(status).startswith(("yes: ", "no: ")) for status in listed.values())


def test_a_backend_for_another_device_says_where_the_tensors_are(monkeypatch):
    monkeypatch.setattr(backend, "missing", lambda name: "")
    message = "the tensors are on cpu, not on cuda"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        backend.select("span_com", torch.device("cpu"))
    message = "the tensors are on cuda, not on cpu"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        backend.select("span_com", torch.device("cuda"))


def test_on_a_gpu_triton_is_the_default_and_torch_where_it_cannot(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(backend, "missing", lambda name: "")
    assert backend.select("span_com", gpu) == ("triton", "tensors on a GPU")
    monkeypatch.setattr(backend, "missing", lambda name: "Triton is not installed")
    assert backend.select("span_com", gpu) == ("torch", "Triton is not installed")
    assert backend.select("span_com", torch.device("mps"))[0] == "torch"


@pytest.fixture
def a_gpu(monkeypatch):
    """a_gpu(capability): this machine has one, with the CUDA library and Triton."""
    for cached in (backend._no_gpu, backend._no_code):
        monkeypatch.setattr(backend, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(backend, "_no_triton", lambda: "")
    for name, value in (("cuda_problem", ""), ("emulated", False), ("cuda_runs", lambda: "")):
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    return lambda *found: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)


def test_a_gpu_without_the_shared_memory_gets_torch_and_hears_why(a_gpu, monkeypatch):
    gpu = torch.device("cuda")
    a_gpu(7, 5)
    name, why = backend.select("span_com", gpu)
    assert name == "torch"
    assert why == "Tesla T4 has compute capability 7.5, and the kernels need 8.0"
    assert not backends()["triton"].available
    assert not backends()["cuda"].available
    with use_backend("triton"), pytest.raises(RuntimeError, match="Tesla T4 has compute"):
        backend.select("span_com", gpu)
    a_gpu(8, 0)
    assert backend.select("span_com", gpu)[0] == "triton"
    a_gpu(6, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backend.select("span_com", gpu)[0] == "triton"


def test_a_cuda_library_without_code_for_the_gpu_says_so(a_gpu, monkeypatch):
    a_gpu(12, 0)
    assert backends()["cuda"].available
    monkeypatch.setattr(native, "cuda_runs", lambda: "no kernel image is available")
    assert "_cuda.so holds no code" in backends()["cuda"].reason
    assert "(no kernel image is available)" in backends()["cuda"].reason
    assert backends()["triton"].available


@pytest.mark.parametrize("op", every_op.CASES)
@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_autocast_changes_no_bit(op, name):
    if not backends()[name].available:
        pytest.skip(backends()[name].reason)
    with use_backend(name):
        for case_name, case in every_op.cases(op, torch.float32).items():
            plain = every_op.outputs(op, case)
            with torch.autocast("cpu", torch.bfloat16):
                under = every_op.outputs(op, case)
            for a, b in zip(under, plain, strict=True):
                assert torch.equal(a, b), case_name


def python(code, **environment):
    kept = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else done.stderr


EVERY_OP = """
import sys, torch
from tests import every_op
for op in every_op.CASES:
    every_op.outputs(op, next(iter(every_op.cases(op, torch.float32).values())))
"""


def test_nothing_imports_triton_unless_a_gpu_kernel_runs():
    assert python(f"{EVERY_OP}\nprint([m for m in sys.modules if m.startswith('triton')])") == "[]"


needs_triton = pytest.mark.skipif(
    not backends()["interpreter"].available, reason=backends()["interpreter"].reason
)
INTERPRETED = """
import torch, sra_kernels
with sra_kernels.use_backend("interpreter"):
    com, _ = sra_kernels.span_com(torch.arange(8.0).view(4, 2), torch.tensor([[0, 2], [1, 4]]))
print(com.tolist())
"""


@needs_triton
def test_the_interpreter_needs_nothing_but_its_name():
    assert python(INTERPRETED) == "[[1.0, 2.0], [4.0, 5.0]]"


@needs_triton
def test_triton_imported_too_early_is_named():
    said = python("import triton\n" + INTERPRETED)
    assert "Triton was imported before: set TRITON_INTERPRET=1 before Python starts" in said
    assert python("import triton\n" + INTERPRETED, TRITON_INTERPRET="1").startswith("[[1.0")


def test_contents_are_checked_on_a_cpu_and_on_a_gpu_when_asked(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("SRA_KERNELS_CHECK", raising=False)
    assert sra_kernels.check.contents(cpu)
    assert not sra_kernels.check.contents(gpu)
    monkeypatch.setenv("SRA_KERNELS_CHECK", "1")
    assert sra_kernels.check.contents(gpu)
