"""`sra evaluate`: bits per byte, agreement with the teacher, ROUGE-L."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sra.commands import MODEL, add_trust, check_positive, trust

METRICS = ("bits_per_byte", "agreement", "rouge_l")


def add(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="measure a model on held-out rows")
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--data", required=True, help="JSONL; a completion may list references")
    parser.add_argument("--teacher", help=f"{MODEL}; to compare with")
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS,
        help="bits_per_byte and, with a teacher, agreement, unless given",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[10, 20, 30, 40, 50], help="of ROUGE-L's sampling"
    )
    parser.add_argument("--greedy", action="store_true", help="the likeliest token; one seed")
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at once (8)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument(
        "--max-prompt-length", type=int, default=256, help="of ROUGE-L's prompts (256)"
    )
    parser.add_argument(
        "--vocabulary-match", choices=("raw", "normalised"), default="normalised",
        help="agreement is on entries of equal strings, or of equal bytes (normalised)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the weights of both (float32); bfloat16 takes half the memory",
    )  # fmt: skip
    parser.add_argument(
        "--output", help="folder of results.json and generations.jsonl; what it has is kept"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    add_trust(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from sra.evaluation.scores import Teacher, evaluate, load_references
    from sra.loading import load_model, load_tokenizer

    check_positive(args, "limit", "batch_size", "max_length", "max_prompt_length")
    rows = load_references(args.data)[: args.limit]
    metrics = args.metrics or ["bits_per_byte", *(["agreement"] if args.teacher else [])]
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"

    def load(name: str) -> tuple[Any, Any]:
        model = load_model(name, dtype=getattr(torch, args.dtype), **trust(args))
        return model.to(device), load_tokenizer(name, **trust(args))

    model, tokenizer = load(args.model)
    teacher = None
    if args.teacher:
        from sra.alignment import SpanAligner
        from sra.collator import SpanCollator
        from sra.model import head_rows
        from sra.vocabulary import SharedVocabulary

        theirs, their_tokenizer = load(args.teacher)
        teacher = Teacher(
            theirs,
            their_tokenizer,
            SpanCollator(SpanAligner(tokenizer, their_tokenizer), max_length=args.max_length),
            SharedVocabulary(
                tokenizer,
                their_tokenizer,
                match=args.vocabulary_match,
                student_rows=head_rows(model),
                teacher_rows=head_rows(theirs),
            ),
        )
    results = evaluate(
        model,
        tokenizer,
        rows,
        metrics=metrics,
        teacher=teacher,
        seeds=args.seeds,
        greedy=args.greedy,
        batch_size=args.batch_size,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        output=args.output,
        settings={
            "model": args.model,
            "weights": _weights(args.model),
            "teacher": args.teacher,
            "teacher_weights": _weights(args.teacher) if args.teacher else None,
            "vocabulary_match": args.vocabulary_match,
            "dtype": args.dtype,
        },
        log=lambda line: print(f"{line} ...", flush=True),
    )
    print(table(results, args.model, args.teacher))
    if args.output:
        print(f"Written to {args.output}.")
    return 0


def table(results: dict[str, Any], model: str, teacher: str | None) -> str:
    """The results as text in columns."""
    names = [Path(model).name, *([Path(teacher).name] if teacher else [])]
    lines = [["", *names]]
    if "bits_per_byte" in results:
        values = [results["bits_per_byte"], results.get("teacher_bits_per_byte")]
        lines.append(["bits per byte", *(f"{x:.4f}" for x in values if x is not None)])
    if results.get("bytes") != results.get("teacher_bytes"):  # long rows are cut where each ends
        lines.append(
            ["... of so many bytes", *(f"{results[x]:,}" for x in ("bytes", "teacher_bytes"))]
        )
    if "agreement" in results:
        lines.append(["agreement after a span", f"{results['agreement']:.1%}"])
    if "rouge_l" in results:
        rouge = results["rouge_l"]
        spread = f" ± {rouge['std']:.2f}" if len(rouge["seeds"]) > 1 else ""
        lines.append(["ROUGE-L", f"{rouge['mean']:.2f}{spread}"])
    width = max(map(len, names), default=0)
    return "\n".join(
        f"{line[0]:<24}" + "".join(f"{cell:>{max(width, 14) + 2}}" for cell in line[1:])
        for line in lines
    )


def _weights(model: str) -> str | None:
    """Which weights a folder holds now, so that results of older ones are not taken for theirs."""
    files = sorted(Path(model).expanduser().glob("*.safetensors"))
    return ", ".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files) or None
