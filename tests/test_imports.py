"""What an import pulls in, which package may know which, and what the public names promise."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOREIGN = {"transformers", "tokenizers", "accelerate", "safetensors", "datasets", "gguf", "sra"}


def modules_after(code):
    """Top-level modules in a fresh interpreter after `code`."""
    show = "import sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_sra_kernels_pulls_in_nothing_but_torch():
    # What torch loads, its lazy parts included, is torch's own affair.
    torch = "import torch, torch.utils._pytree, torch.library, torch.autograd.function"
    extra = modules_after("import sra_kernels") - modules_after(torch) - {"sra_kernels"}
    assert not extra - set(sys.stdlib_module_names)


def test_sra_kernels_works_where_torch_is_all_there_is():
    """Every other installed package hidden, the ops still run."""
    code = """
import sys, torch
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ImportError(name + " is hidden")
sys.meta_path.insert(0, Hidden())
import sra_kernels
com, mass = sra_kernels.span_com(torch.ones(4, 3), torch.tensor([[0, 2], [2, 4]]))
assert com.tolist() == [[1.0] * 3] * 2
for name in ("auto", "torch", "reference"):
    with sra_kernels.use_backend(name):
        kl = sra_kernels.span_kl(
            torch.zeros(2, 5), torch.zeros(2, 5), temperature=1.0, direction="forward"
        )
    assert kl.tolist() == [0, 0]
"""
    modules_after(f"HIDDEN = {FOREIGN | {'numpy'}}\n{code}")


def test_sra_loads_its_parts_when_they_are_used():
    loaded = modules_after("import sra; sra.__all__")
    assert "sra" in loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "numpy"}
    assert "transformers" not in modules_after("from sra import Objective, recipe, SpanAligner")
    assert "transformers" in modules_after("from sra import SRATrainer")


def imported(path):
    """Names of the modules that a file imports anywhere, functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module


def test_the_kernels_know_nothing_of_models():
    files = sorted((ROOT / "sra_kernels").rglob("*.py"))
    assert len(files) > 20
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "sra_kernels"}
    for path in files:
        # Triton's interpreter works on numpy, so what mends it does too.
        more = {"numpy"} if path.name == "interpreter.py" else set()
        assert {name.split(".")[0] for name in imported(path)} <= allowed | more, path
        text = path.read_text()
        assert "transformers" not in text, path
        assert "tokenizer" not in text.replace("cross-tokenizer", ""), path


def test_sra_uses_the_public_names_of_the_kernels():
    import sra_kernels

    for path in sorted((ROOT / "sra").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("sra_kernels"):
                assert node.module == "sra_kernels", path
                assert {alias.name for alias in node.names} <= set(sra_kernels.__all__), path
        assert "tests" not in {name.split(".")[0] for name in imported(path)}, path


@pytest.mark.parametrize("package", ["sra_kernels", "sra"])
def test_every_public_name_is_there_and_documented(package):
    module = importlib.import_module(package)
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        assert inspect.getdoc(thing), name
        # A dataclass without a docstring gets its signature as one.
        assert not inspect.getdoc(thing).startswith(f"{name}("), name
        assert thing.__module__.split(".")[0] == package, name


def test_an_unknown_name():
    import sra

    with pytest.raises(AttributeError, match="module 'sra' has no attribute 'SpanDestiller'"):
        _ = sra.SpanDestiller


def test_the_five_operations_and_their_switches_are_public():
    import sra_kernels

    ops = {"span_com", "attention_mass", "span_kl", "linear_span_kl", "span_geometry"}
    assert set(sra_kernels.__all__) == ops | {"backends", "explain", "use_backend"}
    for op in ops:
        files = {path.name for path in (ROOT / "sra_kernels" / op).glob("*.py")}
        assert {"__init__.py", "reference.py", "portable.py", "fake.py"} <= files
        parameters = inspect.signature(getattr(sra_kernels, op)).parameters.values()
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters)
