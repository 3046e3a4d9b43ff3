"""Checks run by several ranks: gloo on the CPU, processes forked after all imports, one group for
all checks of a world size."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds that all checks of one world size may take
Check = Callable[[int, int, Path], None]


def run(world: int, modules: Sequence[str], names: Sequence[str], folder: Path) -> dict[str, str]:
    """What became of each check: "" where all ranks passed it, else what a rank says.

    A check gets the rank, the number of ranks and a folder that all ranks share.

    Args:
        modules: of this folder, each with its `CHECKS`.
        names: of those to run.
    """
    # Ranks are forked by a process that has never multiplied: threads of OpenMP are not forked,
    # and a child waits for its parent's for ever.
    command = [sys.executable, "-m", "tests.distributed.ranks", str(world), str(folder)]
    given = json.dumps([[*modules], [*names]])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, given], cwd=ROOT, env=environment, check=True)
    said = [_read(folder / f"rank-{rank}.json") for rank in range(world)]
    results = {}
    for name in names:
        words = [f"rank {rank}: {of.get(name, 'did not end it')}" for rank, of in enumerate(said)]
        results[name] = "" if all(of.get(name) == "" for of in said) else "\n".join(words)
    return results


def fork(world: int, checks: Mapping[str, Check], folder: Path) -> None:
    """All ranks, each through all checks."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, world, checks, folder)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in ranks) and time.monotonic() < end:
        if any(process.exitcode for process in ranks):  # the others would wait for it for ever
            end = min(end, time.monotonic() + 3)
        time.sleep(0.05)
    for process in ranks:
        process.kill()
        process.join()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _rank(rank: int, world: int, checks: Mapping[str, Check], folder: Path) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    said: dict[str, str] = {}
    for name, check in checks.items():
        fresh_accelerate()
        torch.manual_seed(rank)  # nothing may lean on ranks drawing the same numbers
        start = time.monotonic()
        try:
            check(rank, world, folder)
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()
        if rank == 0 and "SRA_TEST_SECONDS" in os.environ:
            print(f"{world} ranks, {name}: {time.monotonic() - start:.1f} s", flush=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps(said))
        if said[name]:
            os._exit(1)
    dist.barrier()
    os._exit(0)


def fresh_accelerate() -> None:
    """Accelerate keeps what it found first; the next check may want something else."""
    AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    modules, names = json.loads(sys.argv[3])
    known: dict[str, Check] = {}
    for module in modules:
        known |= importlib.import_module(f"tests.distributed.{module}").CHECKS
    fork(int(sys.argv[1]), {name: known[name] for name in names}, Path(sys.argv[2]))
