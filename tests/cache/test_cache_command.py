"""`sra cache` on checkpoints small enough to read the data here."""

from __future__ import annotations

import argparse
import json
import re
import shutil

import pytest
import torch

from sra import SpanAligner, SpanCollator, SpanDistiller, TeacherCache, recipe
from sra.cli import main
from sra.commands import cache
from sra.demo import prune_layers
from sra.loading import load_model, load_tokenizer
from sra.model import head_rows
from sra.teacher_cache import DiskCache
from sra.teacher_cache.files import read_index
from sra.teacher_cache.writer import CacheWriter, teacher_sequences
from sra.vocabulary import SharedVocabulary
from tests import tiny
from tests.cache.small_caches import relative, teacher_inputs
from tests.real_models import checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(tiny.write_checkpoints(tmp_path_factory.mktemp("checkpoints"))[1])


@pytest.fixture
def data(tmp_path):
    return str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.ROWS))


def run(*argv):
    parser = argparse.ArgumentParser()
    cache.add(parser.add_subparsers())
    args = parser.parse_args(["cache", *map(str, argv)])
    return args.run(args)


def test_the_command_writes_what_training_asks_for(teacher, data, tmp_path, capsys):
    folder = tmp_path / "cache"
    assert run(teacher, "--data", data, "--out", folder, "--model-dtype", "float32") == 0
    tokenizer = load_tokenizer(teacher)
    tokens = sum(map(len, teacher_sequences(tiny.ROWS, tokenizer)))
    said = capsys.readouterr().out
    assert re.search(rf"8 rows added to .*: {tokens} tokens, 100 bytes a token, \d+\.\d s\.", said)
    inputs = teacher_inputs(
        SpanCollator(SpanAligner(tiny.student_tokenizer(), tokenizer))(tiny.ROWS)
    )
    got = DiskCache(folder).states(**inputs)
    want = TeacherCache(load_model(teacher)).states(**inputs)
    assert relative(got.hidden[0], want.hidden[0]) < 5e-3
    torch.testing.assert_close(got.mass, want.mass, rtol=1e-4, atol=1e-6)
    assert DiskCache(folder).config.name_or_path == teacher


def test_without_the_teacher_the_folder_alone_trains(data, tmp_path):
    path = tiny.write_checkpoints(tmp_path)[1]
    folder = tmp_path / "cache"
    run(path, "--data", data, "--out", folder, "--dtype", "int8")
    shutil.rmtree(path)
    states = DiskCache(folder)
    student = tiny.student_model()
    vocabulary = SharedVocabulary(
        tiny.student_tokenizer(),
        states.tokenizer,
        match="raw",
        student_rows=tiny.STUDENT_ROWS,
        teacher_rows=tiny.TEACHER_ROWS,
    )
    collator = SpanCollator(SpanAligner(tiny.student_tokenizer(), states.tokenizer))
    module = SpanDistiller(student, states, recipe("boundary"), vocabulary=vocabulary)
    out = module(**collator(tiny.ROWS))
    out.loss.backward()
    assert out.logit > 0


def test_distill_trains_from_the_folder_and_names_what_it_lacks(data, tmp_path, capsys):
    student, teacher = map(str, tiny.write_checkpoints(tmp_path))
    folder, output = tmp_path / "cache", tmp_path / "run"
    run(teacher, "--data", data, "--out", folder)
    shutil.rmtree(teacher)
    argv = ["distill", student, "--teacher-cache", folder, "--cpu", "--max-steps", "2"]
    argv = [*map(str, argv), "--data", data, "--output", str(output)]
    assert main([*argv, "--recipe", "paper", "--layers=-1:0"]) == 1
    assert "layer 0 is asked for" in capsys.readouterr().err
    more = tiny.write_jsonl(tmp_path / "more.jsonl", [*tiny.ROWS, {"text": "unread"}])
    assert main([*argv, "--data", str(more)]) == 1
    assert "lacks 1 of 9 texts" in capsys.readouterr().err
    assert not output.exists()
    assert main(argv) == 0
    assert (output / "student" / "model.safetensors").exists()


def test_again_goes_on_and_says_so(teacher, data, tmp_path, capsys):
    folder = tmp_path / "cache"
    options = ("--out", folder, "--dtype", "int8", "--layers", "0", "-1", "--batch-size", "3")
    run(teacher, "--data", data, *options)
    before = read_index(folder)
    capsys.readouterr()
    run(teacher, "--data", data, "--out", folder)  # dtypes and layers are the folder's
    assert "8 of 8 rows are there already, or twice.\n0 rows added to" in capsys.readouterr().out
    more = [*tiny.ROWS[:3], {"prompt": "new", "completion": "text"}]
    run(teacher, "--data", tiny.write_jsonl(tmp_path / "more.jsonl", more), "--out", folder)
    said = capsys.readouterr().out
    assert "3 of 4 rows are there already, or twice.\n1 rows added" in said
    assert len(DiskCache(folder)) == 9
    (folder / before[0].file).unlink()
    run(teacher, "--data", data, "--out", folder)
    said = capsys.readouterr().out
    assert f"Missing, so their texts are read again: {before[0].file}." in said
    assert "8 rows added" in said
    assert len(DiskCache(folder)) == 9
    with pytest.raises(ValueError, match=r"holds dtype int8, and bfloat16 is asked for\."):
        run(teacher, "--data", data, "--out", folder, "--dtype", "bfloat16")


def test_bad_input_writes_nothing(teacher, data, tmp_path):
    folder = tmp_path / "cache"
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(tiny.ROWS[0]) + '\n{"prompt": "no answer"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: "):
        run(teacher, "--data", bad, "--out", folder)
    alone = tmp_path / "alone"
    run(teacher, "--data", data, "--out", alone, "--layers", "0")
    assert DiskCache(alone).manifest.layers == (0, 1)  # the last always
    with pytest.raises(ValueError, match="The teacher has 2 layers; there is no layer 2"):
        run(teacher, "--data", data, "--out", folder, "--layers", "2")
    with pytest.raises(ValueError, match="--batch-size 0: it must be at least 1"):
        run(teacher, "--data", data, "--out", folder, "--batch-size", "0")
    with pytest.raises(ValueError, match="--max-length -1: it must be at least 1"):
        run(teacher, "--data", data, "--out", folder, "--max-length", "-1")
    with pytest.raises(ValueError, match="Cannot read the model"):
        run(tmp_path / "nowhere", "--data", data, "--out", folder)
    assert not folder.exists()


@pytest.mark.models
def test_a_real_pair_trains_from_its_cache_as_from_the_model(tmp_path):
    names = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"
    tokenizers = [load_tokenizer(checkpoint(name)) for name in names]
    student, live = (load_model(checkpoint(name)) for name in names)
    student = prune_layers(student, 2)
    rows = tiny.ROWS[:2]
    batch = SpanCollator(SpanAligner(*tokenizers))(rows)
    vocabulary = SharedVocabulary(
        *tokenizers, match="raw", student_rows=head_rows(student), teacher_rows=head_rows(live)
    )

    def gradients(teacher):
        student.zero_grad()
        torch.manual_seed(0)
        module = SpanDistiller(student, teacher, recipe("boundary"), vocabulary=vocabulary)
        loss = module(**batch).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])

    want_loss, want = gradients(live)
    with CacheWriter(tmp_path / "cache", live, tokenizers[1], dtype="int8") as writer:
        writer.add(teacher_sequences(rows, tokenizers[1]))
    loss, got = gradients(DiskCache(tmp_path / "cache"))
    print(loss / want_loss - 1, relative(got, want))
    assert 0 < abs(loss / want_loss - 1) < 1e-3  # as docs/cache.md states
    assert 0 < relative(got, want) < 5e-3
