"""`sra demo`: prune a real student, distil a real teacher into it, report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sra.commands import MODEL


def add(commands: Any) -> None:
    parser = commands.add_parser("demo", help="prune SmolLM2, distil Qwen2.5-Coder into it, report")
    parser.add_argument("--student", default="SmolLM2-135M-Instruct", help=MODEL)
    parser.add_argument("--teacher", default="Qwen2.5-Coder-0.5B-Instruct", help=MODEL)
    parser.add_argument("--layers", type=int, default=16, help="layers that the student keeps")
    parser.add_argument("--output", default="runs/demo")
    parser.add_argument("--scale", type=float, default=1.0, help="fewer (0.1) or more (4) steps")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sra.demo import run_demo

    return run_demo(
        student=args.student,
        teacher=args.teacher,
        layers=args.layers,
        output=Path(args.output),
        scale=args.scale,
    )
