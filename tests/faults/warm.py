"""Imported once by the server that forks this folder's runs: their imports are done by then."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

import torch

from sra.cli import main
from tests import tiny


def warm_up() -> None:
    """A short run: what is imported or built at the first use is there in every fork."""
    torch.set_num_threads(1)
    sys.stdout.flush()
    shown, quiet = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pair = [*map(str, tiny.write_checkpoints(folder))]
        data = str(tiny.write_jsonl(folder / "rows.jsonl", tiny.ROWS))
        argv = ["distill", *pair, "--data", data, "--dtype", "float32", "--max-steps", "1", "--cpu"]
        assert (
            main([*argv, "--output", str(folder / "run"), "--save-steps", "1", "--disable-tqdm"])
            == 0
        )
    sys.stdout.flush()
    os.dup2(shown, 1)
    gc.collect()
    gc.freeze()  # so that a fork does not walk, and copy, all of it


warm_up()
