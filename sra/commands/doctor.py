"""`sra doctor`: whether a student can learn from a teacher on this data, before a run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sra.commands import MODEL, add_trust, check_positive, trust

RECIPES = ("respell", "boundary", "paper", "cross-entropy")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check a pair and its data before a run",
        description="Check a pair and its data before a run. Exit code 0: good; 1: it cannot run; "
        "2: it runs, but something will hurt.",
    )
    parser.add_argument("student", help=MODEL)
    parser.add_argument("teacher", help=MODEL)
    parser.add_argument("--data", required=True, help="JSONL of rows, as for `sra distill`")
    parser.add_argument(
        "--rows", type=int, default=200, help="look at so many, evenly spaced (200)"
    )
    parser.add_argument("--memory", type=float, help="GiB (otherwise what this machine has)")
    parser.add_argument(
        "--recipe", choices=RECIPES, default="respell", help="of the run that is planned (respell)"
    )
    parser.add_argument(
        "--vocabulary-match", choices=("raw", "normalised"),
        help="pair equal strings or equal bytes (otherwise as the recipe does)",
    )  # fmt: skip
    parser.add_argument(
        "--granularity", choices=("token", "word", "sentence"), default="token",
        help="the shortest spans (token), or spans of whole words or sentences",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step (4)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of each side (512)")
    parser.add_argument(
        "--min-coverage", type=float, default=0.9, help="what the run will refuse to be under (0.9)"
    )
    parser.add_argument("--cached", action="store_true", help="the teacher will come from a cache")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="plan for it: less memory, more time"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products",
    )  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument(
        "--measure", type=int, metavar="STEPS",
        help="load the weights too, and train so many steps (nothing is kept)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs")
    add_trust(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_positive(args, "rows", "batch_size", "max_length", "measure")
    import torch

    from sra.data import load_rows
    from sra.doctor import diagnose
    from sra.doctor.planner import available_memory
    from sra.loading import load_config, load_tokenizer, resolve_model
    from sra.objective import recipe, vocabulary_match
    from sra.precision import faster_dtype

    every = load_rows(args.data)
    count = min(args.rows, len(every))
    numbers = [i * len(every) // count for i in range(count)]
    rows = [every[i] for i in numbers]
    names, options = (args.student, args.teacher), trust(args)
    tokenizers = load_tokenizer(names[0], **options), load_tokenizer(names[1], **options)
    configs = [load_config(resolve_model(name, **options), **options) for name in names]
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    if args.dtype == "auto":
        dtype = faster_dtype(device)
    else:
        dtype = getattr(torch, args.dtype)
    objective = recipe(args.recipe)
    match = args.vocabulary_match or vocabulary_match(args.recipe)
    diagnosis = diagnose(
        *tokenizers,
        rows,
        numbers=numbers,
        student_config=configs[0],
        teacher_config=configs[1],
        student_name=Path(args.student).name,
        teacher_name=Path(args.teacher).name,
        objective=objective,
        vocabulary_match=match,
        granularity=args.granularity,
        max_length=args.max_length,
        batch_size=args.batch_size,
        min_coverage=args.min_coverage,
        memory=available_memory(device) if args.memory is None else args.memory,
        dtype=dtype,
        device=device,
        cached=args.cached,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    if args.measure and diagnosis.exit_code != 1:
        from sra.doctor.trial import trial

        diagnosis = diagnosis.with_findings(
            *trial(
                names,
                tokenizers,
                rows,
                steps=args.measure,
                objective=objective,
                vocabulary_match=match,
                granularity=args.granularity,
                max_length=args.max_length,
                batch_size=args.batch_size,
                gradient_checkpointing=args.gradient_checkpointing,
                dtype=dtype,
                device=device,
                **options,
            )
        )
    if args.json:
        print(json.dumps(diagnosis.to_dict(), ensure_ascii=False, indent=2))
    else:
        print(diagnosis.report(color=sys.stdout.isatty()))
    return diagnosis.exit_code
