"""Writing a teacher's states: going on, refusing what does not fit, and files that get damaged."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sra import TeacherCache
from sra.model import head_of
from sra.teacher_cache import DiskCache
from sra.teacher_cache.files import bytes_per_token, read_index
from sra.teacher_cache.writer import CacheWriter
from tests import tiny
from tests.cache.small_caches import relative, sequences, teacher_inputs, write
from tests.faults.children import context


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A finished cache of a bf16 teacher; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("caches") / "cache"
    write(folder)
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "cache"))


# --- writing, and writing on ---


def test_going_on_reads_only_what_is_new(copied):
    assert write(copied) == 0
    before = read_index(copied)
    more = [*tiny.ROWS, {"prompt": "new", "completion": "text"}, {"prompt": "2", "completion": "3"}]
    assert write(copied, rows=more) == 2
    assert read_index(copied)[: len(before)] == before
    assert len(DiskCache(copied)) == len(tiny.ROWS) + 2


def test_the_same_text_twice_is_kept_once(tmp_path):
    assert write(tmp_path / "cache", rows=[tiny.ROWS[0]] * 3) == 1
    with CacheWriter(
        tmp_path / "cache", tiny.teacher_model(torch.bfloat16), tiny.teacher_tokenizer()
    ) as writer:
        writer.add(sequences([tiny.ROWS[1], tiny.ROWS[1], tiny.ROWS[0]]))
    assert [entry.rows for entry in read_index(tmp_path / "cache")] == [1, 1]


def test_each_token_takes_the_bytes_that_are_stated(tmp_path):
    tokens = sum(map(len, sequences()))
    for dtype, each in (("bfloat16", 2 * 48 + 4), ("int8", 48 + 8)):
        write(tmp_path / dtype, dtype=dtype, shard_bytes=1 << 20)
        assert each == bytes_per_token(48, 1, dtype)
        (entry,) = read_index(tmp_path / dtype)
        assert entry.tokens == tokens
        assert 0 < entry.bytes - each * tokens < 1200  # keys, offsets and the header


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "holds dtype bfloat16, and int8 is asked for. Go on with --dtype bf"),
        ({"layers": (0, 1)}, "holds layers 1, and 0, 1 is asked for. Go on with --layers 1"),
        ({"teacher": "seed"}, "holds states of another teacher: of tiny, revision"),
        ({"teacher": "dtype"}, "are of tiny in bfloat16, and this teacher is in float32"),
    ],
)
def test_a_folder_of_something_else_is_refused(written, options, said):
    if "teacher" in options:
        other = {"seed": torch.bfloat16, "dtype": torch.float32}[options["teacher"]]
        options = {"teacher": tiny.teacher_model(other, seed=7)}
    before = {path: path.stat().st_mtime_ns for path in written.glob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match="^" + ".*" + said.replace(".", r"\.")):
        write(written, **options)
    after = {path: path.stat().st_mtime_ns for path in written.glob("*.*") if path.is_file()}
    assert {**after, written / "writer.lock": 0} == {**before, written / "writer.lock": 0}


def test_another_chat_template_or_format_is_refused(copied):
    tokenizer = pickle.loads(pickle.dumps(tiny.teacher_tokenizer()))
    tokenizer.chat_template += "!"
    with (
        pytest.raises(ValueError, match=r"of tiny, and .* has another tokenizer or chat"),
        CacheWriter(copied, tiny.teacher_model(torch.bfloat16), tokenizer),
    ):
        pass
    manifest = json.loads((copied / "cache.json").read_text())
    (copied / "cache.json").write_text(json.dumps({**manifest, "format": 9}))
    for use in (DiskCache, write):
        with pytest.raises(ValueError, match="has cache format 9, and this version"):
            use(copied)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds other things \(thesis.tex\) and no cache.json"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "thesis.tex")


def test_states_that_are_not_finite_are_refused(tmp_path):
    teacher = tiny.teacher_model()
    with torch.no_grad():
        teacher.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"tiny gives states that are not finite.*<\|begin\|>user"):
        write(tmp_path / "cache", teacher)
    assert read_index(tmp_path / "cache") == []


# --- what can go wrong with files ---


def test_a_missing_shard_is_named_and_filled_again(copied):
    entry = read_index(copied)[1]
    (copied / entry.file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{entry.file} is missing.*sra cache again"):
        DiskCache(copied)
    assert write(copied) == entry.rows
    refilled(copied)


def refilled(folder):
    cache = DiskCache(folder)
    inputs = teacher_inputs(tiny.collator()(tiny.ROWS))
    got, want = (
        c.states(**inputs) for c in (cache, TeacherCache(tiny.teacher_model(torch.bfloat16)))
    )
    assert relative(got.hidden[0].double(), want.hidden[0].double()) < 0.02


@pytest.mark.parametrize("damage", ["truncated", "header", "keys", "hidden.1"])
def test_a_damaged_shard_is_named_and_filled_again(copied, damage):
    entry = read_index(copied)[0]
    path = copied / entry.file
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    if damage == "truncated":
        data = data[:-10]
    elif damage == "header":
        data[3] ^= 0x40
    else:
        start, end = json.loads(data[8 : 8 + size])[damage]["data_offsets"]
        data[8 + size + (start + end) // 2] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{entry.file} is damaged: .*Delete that file and run"):
        DiskCache(copied).states(**teacher_inputs(tiny.collator()(tiny.ROWS)))
    if damage == "hidden.1":  # unseen, as was asked for
        DiskCache(copied, verify=False).states(**teacher_inputs(tiny.collator()(tiny.ROWS)))
    path.unlink()
    assert write(copied) == entry.rows
    refilled(copied)


def test_a_damaged_or_missing_head_is_named_and_written_again(copied):
    path = copied / "head.safetensors"
    weight = load_file(path)["weight"]
    save_file({"weight": weight + 1}, path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"head\.safetensors, the teacher's output layer, is"):
            DiskCache(copied)
        path.unlink(missing_ok=True)
    write(copied)
    assert torch.equal(head_of(DiskCache(copied)).weight, weight)


def in_another_process(function, *args):
    """(process, the end of a pipe on which `function` speaks)"""
    ours, theirs = context().Pipe()
    process = context().Process(target=function, args=(theirs, *args), daemon=True)
    process.start()
    return process, ours


def write_on_a_full_disk(pipe, folder):
    """Files of at most so many bytes stand for the disk: the write itself fails."""
    write(folder, rows=tiny.ROWS[:4])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    try:
        write(folder, batch_size=8, shard_bytes=1 << 20)
    except OSError as error:
        pipe.send(str(error))


def test_a_full_disk_keeps_what_was_complete(tmp_path):
    folder = tmp_path / "cache"
    process, pipe = in_another_process(write_on_a_full_disk, folder)
    said = pipe.recv()
    process.join()
    assert said.startswith("[Errno 27] No room for ")
    assert "What was complete before it is kept: free some space and run sra cache again" in said
    assert not [*folder.glob("*.tmp")]
    assert len(DiskCache(folder)) == 4
    assert write(folder) == len(tiny.ROWS) - 4


def test_states_that_will_not_fit_are_refused_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with (
        CacheWriter(tmp_path / "cache", tiny.teacher_model(), tiny.teacher_tokenizer()) as writer,
        pytest.raises(OSError, match=r"The states need 0.0 GB in .*take --dtype int8"),
    ):
        writer.check_room(sequences())


def write_slowly(pipe, folder):
    teacher = tiny.teacher_model(torch.bfloat16)
    with CacheWriter(folder, teacher, tiny.teacher_tokenizer(), shard_bytes=6000) as writer:
        for ids in sequences():
            writer.add([ids])
            if len(read_index(folder)) == 2:
                pipe.send("two shards")
                time.sleep(60)


def test_one_writer_at_a_time_and_a_killed_one_loses_the_shard_in_hand_alone(tmp_path):
    folder = tmp_path / "cache"
    process, pipe = in_another_process(write_slowly, folder)
    try:
        assert pipe.recv() == "two shards"
        with pytest.raises(RuntimeError, match=f"is being written by process {process.pid} on "):
            write(folder)
        kept = len(DiskCache(folder))  # readable meanwhile
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert 0 < kept == sum(entry.rows for entry in read_index(folder)) < len(tiny.ROWS)
    (folder / "shard-00009.safetensors.tmp").write_bytes(b"half")
    began = time.perf_counter()
    assert write(folder) == len(tiny.ROWS) - kept
    assert time.perf_counter() - began < 10
    assert not [*folder.glob("*.tmp"), *folder.glob("writer.json")]
    refilled(folder)


def test_a_writer_killed_before_its_first_shard_is_no_obstacle(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "head.safetensors.tmp").write_bytes(b"half")
    (folder / "writer.lock").touch()
    (folder / "writer.json").write_text('{"pid": 1, "host": "x"}')
    (folder / "tokenizer").mkdir()
    assert write(folder) == len(tiny.ROWS)


def test_an_interrupted_writer_keeps_the_shard_in_hand(tmp_path):
    writer = CacheWriter(
        tmp_path / "cache", tiny.teacher_model(torch.bfloat16), tiny.teacher_tokenizer()
    )

    def interrupted():
        with writer:
            writer.add(sequences()[:3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(DiskCache(tmp_path / "cache")) == 3
