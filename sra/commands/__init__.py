"""The commands of `sra`, a file each: `add` describes its arguments, `run` does it.

Heavy libraries are imported in `run`, so that `sra --help` is quick.
"""

from __future__ import annotations

import argparse
from typing import Any

MODEL = "a hub id, a folder, or a name that `sra demo` downloads (SmolLM2-135M-Instruct, ...)"


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run code that comes with a model; only if you trust it",
    )  # fmt: skip


def trust(args: argparse.Namespace) -> dict[str, Any]:
    """What `load_model` and `load_tokenizer` take of it."""
    return {"trust_remote_code": args.trust_remote_code}


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for an option below 1; one that was not given is None."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least 1.")
