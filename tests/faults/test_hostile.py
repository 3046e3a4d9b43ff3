"""Folders of strangers: no code in them runs, and no path in them leads out of them."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sra.loading import load_model, load_tokenizer
from sra.run_record import RECORD_FILE, write_record
from sra.teacher_cache import DiskCache
from sra.teacher_cache.files import read_index
from tests import tiny
from tests.cache.small_caches import write
from tests.faults.children import sra
from tests.faults.runs import left

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig as Custom, LlamaForCausalLM as CustomModel
from transformers import PreTrainedTokenizerFast as CustomTokenizer
"""


class Payload:
    """Unpickling it runs code."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.fixture
def hostile(folder, tmp_path):
    """(a student whose configuration asks for code beside it, the mark that this code leaves)"""
    path, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(folder.pair[0], path)
    (path / "custom.py").write_text(CODE.format(marker=str(marker)))
    model = {"AutoConfig": "custom.Custom", "AutoModelForCausalLM": "custom.CustomModel"}
    tokenizer = {"AutoTokenizer": [None, "custom.CustomTokenizer"]}
    for name, classes in (("config.json", model), ("tokenizer_config.json", tokenizer)):
        content = json.loads((path / name).read_text())
        content |= {"auto_map": classes, "model_type": "custom"}
        (path / name).write_text(json.dumps(content))
    return path, marker


def test_code_beside_a_model_does_not_run(hostile, folder, tmp_path):
    path, marker = hostile
    argv = folder.argv(tmp_path / "run")
    argv[1] = str(path)
    assert sra(argv, tmp_path / "log") == 1
    said = (tmp_path / "log").read_text().rpartition("sra distill: ")[2]
    assert said.startswith(f"{path} has code of its own, which is not run unless you trust it.")
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


def test_it_runs_if_it_is_asked_for(hostile, folder, tmp_path):
    """So the test before this one can fail. In a child: such code changes classes for good."""
    path, marker = hostile
    argv = folder.argv(tmp_path / "run", "--trust-remote-code")
    argv[1] = str(path)
    sra(argv, tmp_path / "log")
    assert marker.exists()


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_code_of_a_known_kind_of_model_is_passed_over(hostile, load):
    path, marker = hostile
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**content, "model_type": "llama"}))
    load(path)
    assert not marker.exists()


def test_pickled_weights_are_refused_unread(folder, tmp_path):
    path, marker = tmp_path / "pickled", tmp_path / "marker"
    shutil.copytree(folder.pair[0], path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    argv = folder.argv(tmp_path / "run")
    argv[1] = str(path)
    assert sra(argv, tmp_path / "log") == 1
    assert "safetensors" in (tmp_path / "log").read_text().rpartition("sra distill: ")[2]
    assert not marker.exists()
    assert not (tmp_path / "run").exists()
    pickle.loads((path / "pytorch_model.bin").read_bytes()).close()
    assert marker.exists()  # it would have


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_payload_in_a_checkpoint_does_not_run(folder, copied, tmp_path, name):
    marker = tmp_path / "marker"
    torch.save({"state": Payload(marker)}, copied / "checkpoint-6" / name)
    shutil.rmtree(copied / "checkpoint-8")
    assert sra([*folder.argv(copied), "--resume"], tmp_path / "log") == 1
    assert not marker.exists()
    assert not (copied / "student").exists()


def test_pickled_weights_in_a_checkpoint_are_not_read(folder, copied, tmp_path):
    marker, checkpoint = tmp_path / "marker", copied / "checkpoint-8"
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    assert sra([*folder.argv(copied), "--resume"], tmp_path / "log") == 1
    assert not marker.exists()


def test_no_path_of_a_record_is_followed(folder, finished, copied, tmp_path):
    """What run.json says is compared and shown, never opened."""
    victim = tmp_path / "victim"
    victim.mkdir()
    record = json.loads((copied / RECORD_FILE).read_text())
    for name in ("output_dir", "logging_dir", "resume_from_checkpoint"):
        record["config"][name] = str(victim)
    record |= {"output": "../victim", "student": "../victim", "teachers": ["../victim"]}
    write_record(copied, **record)
    assert sra([*folder.argv(copied), "--resume"], tmp_path / "log") == 0
    assert not [*victim.iterdir()]
    assert left(copied)["student"] == finished[1]["student"]


# --- a teacher cache ---


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "cache"
    write(path, rows=tiny.ROWS[:4])
    return path


@pytest.mark.parametrize("name", ["../shard-00000.safetensors", "/{outside}", "shard-00000.x"])
def test_an_index_cannot_name_a_file_elsewhere(cache, tmp_path, name):
    """Neither reading nor going on with the folder opens it, though its sha256 is right."""
    shard = cache / "shard-00000.safetensors"
    shutil.copy(shard, tmp_path / shard.name)
    shard.rename(cache / "shard-00000.x")
    index = json.loads((cache / "index.json").read_text())
    index[0]["file"] = name.format(outside=tmp_path / shard.name)
    (cache / "index.json").write_text(json.dumps(index))
    before = sorted(tmp_path.rglob("*"))
    for use in (read_index, DiskCache, write):
        with pytest.raises(ValueError, match=r"index\.json .*names the file "):
            use(cache)
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "writer.lock") == sorted(
        path for path in before if path.name != "writer.lock"
    )


def test_code_in_the_tokenizer_of_a_cache_does_not_run(cache, tmp_path):
    marker = tmp_path / "marker"
    (cache / "tokenizer" / "custom.py").write_text(CODE.format(marker=str(marker)))
    path = cache / "tokenizer" / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["auto_map"] = {"AutoTokenizer": [None, "custom.CustomTokenizer"]}
    path.write_text(json.dumps(content))
    assert DiskCache(cache).tokenizer.is_fast
    assert not marker.exists()


def test_the_output_layer_of_a_cache_is_no_pickle(cache, tmp_path):
    marker = tmp_path / "marker"
    head = cache / "head.safetensors"
    assert load_file(head)
    head.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match="missing or damaged"):
        DiskCache(cache)
    assert not marker.exists()
