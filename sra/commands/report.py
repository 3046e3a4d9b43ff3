"""`sra report`: what a run did, as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sra.commands import MODEL, add_trust, check_positive, trust


def add(commands: Any) -> None:
    parser = commands.add_parser("report", help="what a run did, as one HTML page")
    parser.add_argument("run_folder", metavar="run", help="the --output of sra distill")
    parser.add_argument("--data", help="held-out rows; measures before, after and the teacher")
    parser.add_argument("--teacher", help=f"{MODEL}; instead of the run's first teacher")
    parser.add_argument("--limit", type=int, help="only the first so many rows of --data")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at once (8)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the weights (float32); bfloat16 takes half the memory",
    )  # fmt: skip
    parser.add_argument("--output", help="the page (otherwise report.html in the run's folder)")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    add_trust(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sra.report.run import read_run, verdict, write_report

    check_positive(args, "limit", "batch_size")
    output = Path(args.output or Path(args.run_folder) / "report.html")
    if output.is_dir():
        raise ValueError(f"{output} is a folder. Give --output the name of the page.")
    if args.teacher and not args.data:
        raise ValueError("--teacher is measured on held-out rows: give --data as well.")
    report = read_run(args.run_folder)
    if args.data:
        import torch

        from sra.data import load_rows
        from sra.report.models import measure

        rows = load_rows(args.data)[: args.limit]
        on_gpu = torch.cuda.is_available() and not args.cpu
        measure(
            report,
            rows,
            Path(args.data).name,
            teacher=args.teacher,
            device="cuda" if on_gpu else "cpu",
            batch_size=args.batch_size,
            dtype=getattr(torch, args.dtype),
            log=lambda line: print(f"{line} ...", flush=True),
            **trust(args),
        )
    write_report(report, output)
    print(verdict(report)[1])
    print(f"The report is {output}: open it in a browser.")
    return 0
