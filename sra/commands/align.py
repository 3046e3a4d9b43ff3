"""`sra align`: a text under both tokenizers, span by span."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sra.commands import MODEL, add_trust, trust


def add(commands: Any) -> None:
    parser = commands.add_parser("align", help="show a text under both tokenizers, span by span")
    parser.add_argument("student", help=MODEL)
    parser.add_argument("teacher", help=MODEL)
    parser.add_argument("--text", help="the text (otherwise standard input)")
    parser.add_argument(
        "--granularity", choices=("token", "word", "sentence"), default="token",
        help="the shortest spans (token), or spans of whole words or sentences",
    )  # fmt: skip
    parser.add_argument(
        "--html", metavar="FILE", help="write a page instead of the terminal's view"
    )
    add_trust(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise ValueError(
            f"--html {args.html}: there is no folder {Path(args.html).absolute().parent}. Make it, "
            "or choose another file."
        )
    from sra.alignment import SpanAligner
    from sra.alignment_page import alignment_page
    from sra.loading import load_tokenizer

    text = args.text if args.text is not None else sys.stdin.read()
    aligner = SpanAligner(
        load_tokenizer(args.student, **trust(args)),
        load_tokenizer(args.teacher, **trust(args)),
        granularity=args.granularity,
    )
    table = aligner(text)
    if not args.html:
        table.show()
        return 0
    page = alignment_page(table, student=Path(args.student).name, teacher=Path(args.teacher).name)
    Path(args.html).write_text(page, encoding="utf-8")
    print(f"{len(table):,} spans, coverage {table.coverage:.1%}. The page is in {args.html}.")
    return 0
