"""`sra` in a process of its own, which starts at once and can be killed, or find its disk full."""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


@functools.cache
def context() -> Any:
    """Forks of a process that has imported everything, has one thread and computes with one."""
    settings = {
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["tests.faults.warm"])
        first = forks.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return forks


def is_write(event: str, args: Any, folder: str) -> bool:
    """Whether an audit event is about to change something below `folder`."""
    if event not in WRITES and event != "open":
        return False
    if not str(args[0]).startswith(folder):
        return False
    if event != "open":
        return True
    _, mode, flags = args
    return bool(set(mode or "") & set("wax+")) or bool(
        (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )


@dataclass(frozen=True)
class CountWrites:
    """Leaves the number of changes below `folder` in the file `count`."""

    folder: str
    count: str

    def __call__(self) -> None:
        seen = 0

        def hook(event: str, args: Any) -> None:
            nonlocal seen
            if is_write(event, args, self.folder):
                seen += 1
                with open(self.count, "w") as file:
                    file.write(str(seen))

        sys.addaudithook(hook)


@dataclass(frozen=True)
class KillAtWrite:
    """SIGKILL just before change number `number` below `folder`, from 1."""

    folder: str
    number: int

    def __call__(self) -> None:
        seen = 0

        def hook(event: str, args: Any) -> None:
            nonlocal seen
            if is_write(event, args, self.folder):
                seen += 1
                if seen == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


@dataclass(frozen=True)
class FullDisk:
    """From the making of the first path that ends in `where`, no file can grow beyond `size` bytes.

    kill: the write beyond it does not fail: it is the process's end, with half a file.
    """

    where: str
    size: int
    kill: bool = False

    def __call__(self) -> None:
        done = False

        def hook(event: str, args: Any) -> None:
            nonlocal done
            if done or event == "os.remove" or not is_write(event, args, "/"):
                return
            if str(args[0]).endswith(self.where):
                done = True
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.kill else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))

        sys.addaudithook(hook)


def _speak_to(pipe: Any) -> None:
    os.dup2(pipe.fileno(), 1)
    os.dup2(pipe.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    multiprocessing.set_start_method("fork", force=True)  # of data workers


def _sra(pipe: Any, argv: list[str], fault: Any) -> None:
    _speak_to(pipe)
    from sra.cli import main

    if fault:
        fault()
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


def _call(pipe: Any, function: Any, args: Any) -> None:
    _speak_to(pipe)
    function(*args)


class Child:
    """A running process; what it says goes to a log, through a pipe: a full disk stops no pipe."""

    def __init__(self, log: Path, target: Any, *args: Any) -> None:
        self.log = log
        ours, theirs = context().Pipe(duplex=False)
        self.process = context().Process(target=target, args=(theirs, *args))
        self.process.start()
        theirs.close()
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, pipe: Any) -> None:
        with self.log.open("wb", buffering=0) as log:
            while part := os.read(pipe.fileno(), 1 << 16):
                log.write(part)

    def end(self, seconds: float | None = None) -> int:
        """Wait for its end, or for so many seconds and kill it; the exit code, -9 if killed."""
        self.process.join(120 if seconds is None else seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            assert seconds is not None, f"hangs: {self.log.read_text()[-2000:]}"
        # Data workers that were left alone hold the pipe for a while.
        self._reader.join(10 if self.process.exitcode >= 0 else 0.1)
        return self.process.exitcode


def start(argv: Any, log: Path, fault: Any = None) -> Child:
    """`sra argv`."""
    return Child(log, _sra, [*map(str, argv)], fault)


def sra(argv: Any, log: Path, fault: Any = None, *, kill_after: float | None = None) -> int:
    """Run it to its end, or for so many seconds until SIGKILL; returns the exit code."""
    return start(argv, log, fault).end(kill_after)


def call(function: Any, log: Path, *args: Any) -> int:
    """A function that can be pickled, in such a process; returns the exit code."""
    return Child(log, _call, function, args).end()
