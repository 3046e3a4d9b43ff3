"""The command line: `sra align`, `sra distill`, `sra demo`, `sra bench`."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RECIPES = ("boundary", "paper", "cross-entropy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one sentence, without a traceback."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "bench":
        args.options = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"sra {args.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sra", description="Distil a language model across tokenizers, span by span."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model = "a hub id, a folder, or a name that `sra demo` downloads (SmolLM2-135M-Instruct, ...)"

    align = commands.add_parser("align", help="show a text under both tokenizers, span by span")
    align.add_argument("student", help=model)
    align.add_argument("teacher", help=model)
    align.add_argument("--text", help="the text (otherwise standard input)")
    align.add_argument("--granularity", choices=("token", "word", "sentence"), default="token")
    align.set_defaults(run=_align)

    distill = commands.add_parser("distill", help="train a student from a teacher")
    distill.add_argument("student", help=model)
    distill.add_argument("teacher", nargs="?", help=f"{model}; none for cross-entropy")
    distill.add_argument(
        "--data", required=True, help='JSONL of {"prompt": ..., "completion": ...}'
    )
    distill.add_argument("--eval-data", help="the same, held out; measured in bits per byte")
    distill.add_argument("--output", default="runs/distill", help="folder of the run")
    distill.add_argument("--recipe", choices=RECIPES, default="boundary")
    distill.add_argument("--alpha", type=float, help="share of cross-entropy")
    distill.add_argument("--gamma", type=float, help="weight of the geometry term")
    distill.add_argument("--temperature", type=float, help="of the span logits")
    distill.add_argument("--logit-state", choices=("com", "end"))
    distill.add_argument("--outside", choices=("renormalise", "weight", "bucket"))
    distill.add_argument("--normaliser", choices=("sequences", "spans"))
    distill.add_argument("--vocabulary-match", choices=("raw", "normalised"), default="raw")
    distill.add_argument("--epochs", type=float, default=1.0)
    distill.add_argument("--max-steps", type=int, default=-1, help="overrides --epochs")
    distill.add_argument("--batch-size", type=int, default=4)
    distill.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    distill.add_argument("--learning-rate", type=float, default=3e-4)
    distill.add_argument("--max-length", type=int, default=512, help="tokens of each side")
    distill.add_argument("--min-coverage", type=float, default=0.9)
    distill.add_argument("--eval-steps", type=int, help="evaluate every so many steps")
    distill.add_argument("--save-steps", type=int, default=200)
    distill.add_argument("--seed", type=int, default=0)
    distill.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products (the weights are trained in float32)",
    )  # fmt: skip
    distill.add_argument("--cpu", action="store_true", help="do not use a GPU")
    distill.add_argument(
        "--remember-teacher", action="store_true", help="keep its states in memory"
    )
    distill.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    distill.set_defaults(run=_distill)

    demo = commands.add_parser("demo", help="prune SmolLM2, distil Qwen2.5-Coder into it, report")
    demo.add_argument("--student", default="SmolLM2-135M-Instruct", help=model)
    demo.add_argument("--teacher", default="Qwen2.5-Coder-0.5B-Instruct", help=model)
    demo.add_argument("--layers", type=int, default=16, help="layers that the student keeps")
    demo.add_argument("--output", default="runs/demo")
    demo.add_argument("--scale", type=float, default=1.0, help="fewer (0.1) or more (4) steps")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench", help="every kernel beside its rivals (from a checkout)", add_help=False
    )
    bench.set_defaults(run=_bench)
    return parser


def _align(args: argparse.Namespace) -> int:
    from sra.alignment import SpanAligner
    from sra.packages import load_tokenizer

    text = args.text if args.text is not None else sys.stdin.read()
    aligner = SpanAligner(
        load_tokenizer(args.student), load_tokenizer(args.teacher), granularity=args.granularity
    )
    aligner(text).show()
    return 0


def _distill(args: argparse.Namespace) -> int:
    import torch

    from sra.data import load_rows
    from sra.packages import load_model, load_tokenizer
    from sra.precision import faster_dtype
    from sra.teacher_cache import TeacherCache
    from sra.trainer import SRAConfig, SRATrainer, last_checkpoint

    train = load_rows(args.data)
    held_out = load_rows(args.eval_data) if args.eval_data else None
    if args.recipe != "cross-entropy" and args.teacher is None:
        raise ValueError(
            f"The recipe {args.recipe!r} needs a teacher: sra distill STUDENT TEACHER."
        )
    output = Path(args.output)
    checkpoint = last_checkpoint(output)
    if checkpoint and not args.resume:
        raise ValueError(
            f"{output} holds a run already ({checkpoint.name}). Go on with --resume, or choose "
            "another --output."
        )
    if args.resume and not checkpoint:
        print(f"{output} holds no checkpoint yet: starting from the beginning.")
    steps = args.max_steps
    if steps < 0:
        steps = math.ceil(args.epochs * len(train) / (args.batch_size * args.accumulate))
    on_gpu = torch.cuda.is_available() and not args.cpu
    if args.dtype == "auto":
        dtype = faster_dtype("cuda" if on_gpu else "cpu")
    else:
        dtype = getattr(torch, args.dtype)
    config = SRAConfig(
        output_dir=str(output),
        recipe=args.recipe,
        alpha=args.alpha,
        gamma=args.gamma,
        temperature=args.temperature,
        logit_state=args.logit_state,
        outside=args.outside,
        normaliser=args.normaliser,
        vocabulary_match=args.vocabulary_match,
        max_length=args.max_length,
        min_coverage=args.min_coverage,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / 10),
        logging_steps=1,
        eval_strategy="steps" if held_out and args.eval_steps else "no",
        eval_steps=args.eval_steps,
        save_steps=args.save_steps,
        seed=args.seed,
        use_cpu=not on_gpu,
        bf16=dtype == torch.bfloat16,
        report_to="none",
    )
    teacher = None
    if args.teacher and config.objective().needs_teacher:
        teacher = load_model(args.teacher).to(dtype)
        if args.remember_teacher:
            teacher = TeacherCache(teacher)
    trainer = SRATrainer(
        load_model(args.student),
        teacher,
        config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=load_tokenizer(args.student),
        teacher_processing_class=load_tokenizer(args.teacher) if args.teacher else None,
    )
    if trainer.coverage is not None:
        print(f"Spans cover {trainer.coverage:.1%} of the completions' bytes.")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(output / "student"))
    print(f"The student is in {output / 'student'}.")
    if held_out:
        print(f"Held-out bits per byte: {trainer.evaluate()['eval_bits_per_byte']:.4f}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from sra.demo import run_demo

    return run_demo(
        student=args.student,
        teacher=args.teacher,
        layers=args.layers,
        output=Path(args.output),
        scale=args.scale,
    )


def _bench(args: argparse.Namespace) -> int:
    """Benchmarks are no part of the package: they are run from the checkout that it comes from."""
    checkout = Path(__file__).parents[1]
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


if __name__ == "__main__":
    sys.exit(main())
