"""`sra bench`: every kernel beside its rivals, from a checkout."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench", help="every kernel beside its rivals (from a checkout)", add_help=False
    )
    parser.set_defaults(run=run, takes_rest=True)


def run(args: argparse.Namespace) -> int:
    """Benchmarks are no part of the package: they are run from the checkout that it comes from."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "benchmarks" / "run.py").exists():
        raise RuntimeError(
            "the benchmarks are in the source repository, not in the installed package. In a "
            "checkout of it, `make bench` installs and runs them."
        )
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    return subprocess.call(
        [sys.executable, "-m", "benchmarks.run", *args.options],
        env={**os.environ, "PYTHONPATH": path},
    )
