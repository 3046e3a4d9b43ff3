"""kill -9 at any moment, then --resume: the run ends with the same bits as one left alone."""

from __future__ import annotations

import random
import signal
import time

import pytest
import torch

from sra.data import load_rows
from sra.teacher_cache import DiskCache
from sra.teacher_cache.writer import teacher_sequences
from tests import tiny
from tests.cache.small_caches import write
from tests.faults.children import CountWrites, FullDisk, KillAtWrite, call, sra
from tests.faults.runs import assert_same, left

CHOICE = random.Random(0)
BY_TIME = [round(CHOICE.random(), 3) for _ in range(8)]
BY_WRITE = [round(CHOICE.random(), 3) for _ in range(8)]
IN_A_FILE = [  # where a limit begins, and its bytes
    ("checkpoint-2", 30_000),
    ("checkpoint-4/tokenizer_config.json", 90_000),
    ("checkpoint-6/trainer_state.json", 500),
    ("student.part", 30_000),
]


@pytest.fixture(scope="module")
def whole(folder):
    """A run that is left alone: what it leaves, its seconds and the changes it makes to files."""
    output, count = folder.path / "whole", folder.path / "count"
    began = time.monotonic()
    fault = CountWrites(str(output), str(count))
    assert sra(folder.argv(output), folder.path / "whole.log", fault) == 0
    return left(output), time.monotonic() - began, int(count.read_text())


def resumed(argv, tmp_path, output):
    log = tmp_path / "resumed.log"
    assert sra([*argv, "--resume"], log) == 0, log.read_text()
    return left(output)


@pytest.mark.parametrize("share", BY_TIME)
def test_a_run_killed_at_any_time_ends_with_the_same_bits(folder, whole, tmp_path, share):
    output = tmp_path / "run"
    argv = folder.argv(output)
    sra(argv, tmp_path / "killed.log", kill_after=share * whole[1])
    assert_same(resumed(argv, tmp_path, output), whole[0])


@pytest.mark.parametrize("share", BY_WRITE)
def test_a_run_killed_while_it_writes_ends_with_the_same_bits(folder, whole, tmp_path, share):
    output = tmp_path / "run"
    argv = folder.argv(output)
    fault = KillAtWrite(str(output), 1 + int(share * whole[2]))
    assert sra(argv, tmp_path / "killed.log", fault) == -signal.SIGKILL
    assert_same(resumed(argv, tmp_path, output), whole[0])


@pytest.mark.parametrize(("where", "size"), IN_A_FILE)
def test_a_run_killed_with_half_a_file_ends_with_the_same_bits(
    folder, whole, tmp_path, where, size
):
    output = tmp_path / "run"
    argv = folder.argv(output)
    fault = FullDisk(where, size, kill=True)
    assert sra(argv, tmp_path / "killed.log", fault) == -signal.SIGXFSZ
    assert not (output / "student").exists()
    assert_same(resumed(argv, tmp_path, output), whole[0])


@pytest.mark.parametrize(
    "options",
    [
        ("--dataloader-num-workers", 2),
        ("--dataset-streaming", "--dataloader-num-workers", 2),
        ("--dataset-streaming", "--batch-size", 1, "--accumulate", 2),
    ],
    ids=["workers", "streaming workers", "streaming"],
)
def test_killed_runs_with_data_workers_and_streams(folder, whole, tmp_path, options):
    argv = folder.argv(tmp_path / "whole", *options)
    assert sra(argv, tmp_path / "whole.log") == 0, (tmp_path / "whole.log").read_text()
    expected = left(tmp_path / "whole")
    for number, share in enumerate((0.78, 0.92)):
        output = tmp_path / f"run{number}"
        argv = folder.argv(output, *options)
        fault = KillAtWrite(str(output), 1 + int(share * whole[2]))
        assert sra(argv, tmp_path / "killed.log", fault) == -signal.SIGKILL
        assert_same(resumed(argv, tmp_path, output), expected)


def test_a_killed_teacher_cache_goes_on_to_the_same_states(folder, tmp_path):
    rows = load_rows(folder.data)
    whole, count = tmp_path / "whole", tmp_path / "count"
    fault = CountWrites(str(whole), str(count))
    assert call(write_cache, tmp_path / "whole.log", whole, fault) == 0
    texts = teacher_sequences(rows, tiny.teacher_tokenizer())
    expected = states(whole, texts)
    writes = int(count.read_text())
    for number, share in enumerate((0.1, 0.3, 0.5, 0.7, 0.8, 0.99)):
        cache = tmp_path / f"cache{number}"
        fault = KillAtWrite(str(cache), 1 + int(share * writes))
        assert call(write_cache, tmp_path / "killed.log", cache, fault) == -signal.SIGKILL
        assert call(write_cache, tmp_path / "again.log", cache, None) == 0
        assert not [*cache.rglob("*.tmp")]
        for ours, theirs in zip(states(cache, texts), expected, strict=True):
            assert torch.equal(ours.hidden[0], theirs.hidden[0])
            assert torch.equal(ours.mass[0], theirs.mass[0])


def write_cache(folder, fault):
    """In a child: shards of two texts or three, so that there are several."""
    if fault:
        fault()
    write(folder, batch_size=1)


def states(folder, texts):
    cache = DiskCache(folder)
    assert len(cache) == len(texts)
    return [cache.states(ids[None]) for ids in texts]
