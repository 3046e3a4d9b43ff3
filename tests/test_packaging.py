"""The build with and without compilers, the wheel, and what is said where a library is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from sra_kernels import backends
from tests import every_op

ROOT = Path(__file__).parents[1]
NO_COMPILER = {"CC": "/nonexistent", "CXX": "/nonexistent"}
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
NVCC = os.environ.get("NVCC", shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"))


def run(argv, cwd, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SRA_")}
    environment = {"NVCC": "/nonexistent"} | environment  # CUDA takes a minute to compile
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, env=kept | environment, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def source(tmp_path):
    return copied(tmp_path / "source")


def copied(folder):
    """What the build reads, in a folder of its own, so that nothing is written beside the code."""
    for part in ("csrc", "sra_kernels", "sra"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, folder)
    return folder


def build(source, **environment):
    argv = ["setup.py", "build_ext", "--build-temp", "../temp", "--build-lib", "../lib"]
    return run(argv, source, **environment)


def libraries(source):
    return sorted(p.name for p in source.parent.rglob("*.so"))


@pytest.mark.parametrize("choice", [{}, {"SRA_KERNELS_BUILD": "auto"}])
def test_without_a_compiler_the_install_goes_on_and_says_why(source, choice):
    done = build(source, **NO_COMPILER, **choice)
    assert done.returncode == 0, done.stderr
    assert "sra: sra_kernels._cpu was not built (" in done.stdout
    assert "/nonexistent" in done.stdout
    assert "another backend will serve" in done.stdout
    assert libraries(source) == []


def test_an_editable_install_without_a_compiler(source):
    argv = ["setup.py", "build_ext", "--inplace", "--build-temp", "../temp"]
    done = run(argv, source, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert "was not built" in done.stdout
    assert libraries(source) == []


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_a_demanded_library_that_cannot_be_built_fails(source, choice):
    done = build(source, **NO_COMPILER, SRA_KERNELS_BUILD=choice)
    assert done.returncode != 0
    assert "/nonexistent" in done.stderr
    assert libraries(source) == []


def test_without_nvcc_the_cuda_library_is_left_out_and_one_line_says_so(source):
    for path in (source / "csrc" / "cpu").glob("*.cpp"):
        path.write_text("")  # quick to compile
    done = build(source, CUDA_HOME="/nonexistent")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("sra: ")]
    if COMPILER is not None:
        assert said == [
            "sra: sra_kernels._cuda was not built (there is no nvcc); another backend will serve"
        ]


OLD_NVCC = """#!/bin/sh
[ "$1" = --list-gpu-arch ] && { echo compute_70; echo compute_80; echo compute_90; exit; }
echo "$@"
for last; do :; done
touch "$last"
"""


def test_an_older_nvcc_compiles_for_the_gpus_that_it_knows(source):
    nvcc = source / "nvcc"
    nvcc.write_text(OLD_NVCC)
    nvcc.chmod(0o755)
    done = build(source, **NO_COMPILER, NVCC=str(nvcc))
    assert libraries(source) == ["_cuda.so"]
    assert (
        " -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90"
        " -gencode arch=compute_90,code=compute_90 -I"
    ) in done.stdout


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
def test_with_nvcc_the_cuda_library_is_built_and_wants_nothing_but_a_gpu():
    status = backends()["cuda"]
    assert status.available or status.reason == "torch sees no GPU on this machine"


def test_code_that_does_not_compile_fails_where_the_library_is_demanded(source):
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    for path in (source / "csrc" / "cpu").glob("*.cpp"):
        path.write_text("this is no C++\n")
    assert build(source, SRA_KERNELS_BUILD="cpu").returncode != 0
    done = build(source)
    assert done.returncode == 0
    assert "was not built" in done.stdout


def test_the_library_can_be_left_out(source):
    done = build(source, **NO_COMPILER, SRA_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert "was not built" not in done.stdout
    assert libraries(source) == []


def test_an_unknown_choice_names_the_known_ones(source):
    done = build(source, SRA_KERNELS_BUILD="gpu")
    assert done.returncode != 0
    assert "SRA_KERNELS_BUILD='gpu' is unknown. Use auto, cpu, cuda or none." in done.stderr


USE = """
import torch, sra_kernels
hidden = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
com, mass = sra_kernels.span_com(hidden, torch.tensor([[0, 2], [2, 3]]))
com.sum().backward()
assert com.tolist() == [[2.0, 2.0], [5.0, 6.0]]
assert hidden.grad.tolist() == [[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]]
print(sra_kernels.backends()["cpu"])
print(sra_kernels.explain(sra_kernels.span_com, hidden, torch.tensor([[0, 2]])))
"""


def test_a_package_without_the_library_works_and_says_why(source):
    done = run(["-c", USE], source)
    assert done.returncode == 0, done.stderr
    cpu, plan = done.stdout.splitlines()
    assert cpu.startswith("no: _cpu.so was not built: there was no C++ compiler at install")
    assert "Install g++ and run `pip install .` again" in cpu
    assert plan.startswith("span_com: torch (_cpu.so was not built")


@pytest.mark.parametrize("content", [b"", b"no library at all"])
def test_a_library_that_does_not_load_is_named(source, content):
    (source / "sra_kernels" / "_cpu.so").write_bytes(content)
    done = run(["-c", USE], source)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no: _cpu.so did not load: ")
    assert "Run `pip install .` again on this machine" in done.stdout


def test_asking_for_the_missing_library_raises_with_the_reason(source):
    done = run(["-c", USE], source, SRA_KERNELS_BACKEND="cpu")
    assert done.returncode != 0
    assert "The backend 'cpu' was asked for span_com, but _cpu.so was not built" in done.stderr
    assert "Use use_backend('auto')" in done.stderr


@pytest.mark.parametrize("name", ["torch", "reference", "auto"])
def test_the_backend_is_chosen_by_the_environment(name):
    done = run(["-c", USE], ROOT, SRA_KERNELS_BACKEND=name)
    assert done.returncode == 0, done.stderr
    if name != "auto":
        assert f"span_com: {name} (use_backend({name!r}) or SRA_KERNELS_BACKEND)" in done.stdout


def test_an_unknown_backend_in_the_environment():
    done = run(["-c", USE], ROOT, SRA_KERNELS_BACKEND="gpu")
    assert done.returncode != 0
    assert "There is no backend 'gpu'. Choose one of auto, cpu, torch" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """As `make wheel` makes it, but for the CUDA library."""
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("wheel")
    argv = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = run([*argv, "--wheel-dir", folder, copied(folder / "source")], folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_one_wheel_serves_every_python_and_torch(wheel):
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("sra_kernels/_cpu.so")
    assert {"sra/py.typed", "sra_kernels/py.typed", "sra/cli.py"} <= set(names)
    assert not any(name.split("/")[0] in ("tests", "benchmarks", "csrc") for name in names)
    assert b"PyModule" not in library
    assert b"c10" not in library


def test_the_wheel_works_in_a_clean_environment_without_a_compiler(wheel, tmp_path):
    """A new environment that sees this one's torch, but not this package."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    argv = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    done = run([*argv, wheel], tmp_path, PATH="/nonexistent", **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "env" / "bin" / "sra").exists()
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    done = subprocess.run(
        [python, "-m", "tests.every_op", "cpu"], cwd=tmp_path, text=True, capture_output=True,
        env={"PATH": "/nonexistent", "OMP_NUM_THREADS": "2"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for op in every_op.CASES for word in (f"{op}:", "right")]
