"""`sra cache`: let the teacher read the data once and keep its states on disk."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from sra.commands import MODEL, add_trust, check_positive, trust


def add(commands: Any) -> None:
    parser = commands.add_parser("cache", help="keep a teacher's states on disk, to train from")
    parser.add_argument("teacher", help=MODEL)
    parser.add_argument("--data", required=True, help="JSONL, as for sra distill")
    parser.add_argument("--out", required=True, help="folder of the states; one there goes on")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "int8"), help="of the states (int8 needs half the space)"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", help="whose states to keep, beside the last"
    )
    parser.add_argument("--max-length", type=int, default=512, help="as in training (512)")
    parser.add_argument("--batch-size", type=int, default=8, help="texts at once (8)")
    parser.add_argument(
        "--train-turns", choices=("assistant", "last", "all"), default="assistant",
        help="as in training",
    )  # fmt: skip
    parser.add_argument(
        "--no-chat-template", action="store_true",
        help="for a loop of your own, with SpanCollator(chat_template=False)",
    )  # fmt: skip
    parser.add_argument(
        "--model-dtype", choices=("float32", "bfloat16"),
        help="in which the teacher computes (the faster one here)",
    )  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    add_trust(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from sra.data import load_rows
    from sra.loading import load_model, load_tokenizer
    from sra.precision import faster_dtype
    from sra.teacher_cache.files import is_cache, read_manifest
    from sra.teacher_cache.writer import CacheWriter, teacher_sequences

    check_positive(args, "batch_size", "max_length")
    folder = Path(args.out)
    held = read_manifest(folder) if is_cache(folder) else None
    tokenizer = load_tokenizer(args.teacher, **trust(args))
    sequences = teacher_sequences(
        load_rows(args.data),
        tokenizer,
        max_length=args.max_length,
        chat_template=not args.no_chat_template,
        train_turns=args.train_turns,
    )
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    if args.model_dtype:
        model_dtype = getattr(torch, args.model_dtype)
    else:  # a folder goes on in its own, on any machine
        model_dtype = getattr(torch, held.model_dtype) if held else faster_dtype(device)
    writer = CacheWriter(
        folder,
        load_model(args.teacher, dtype=model_dtype, **trust(args)).to(device),
        tokenizer,
        name=args.teacher,
        dtype=args.dtype or (held.dtype if held else "bfloat16"),
        layers=(*args.layers, -1) if args.layers else held.layers if held else (-1,),
    )
    began = time.perf_counter()
    with writer:
        if writer.lost:
            names = ", ".join(entry.file for entry in writer.lost)
            print(f"Missing, so their texts are read again: {names}.")
        batches = [*writer.batches(sequences, args.batch_size)]
        fresh = [ids for batch in batches for ids in batch]
        writer.check_room(fresh)
        if len(fresh) < len(sequences):
            known = len(sequences) - len(fresh)
            print(f"{known} of {len(sequences)} rows are there already, or twice.")
        with tqdm(total=sum(map(len, fresh)), unit="tok", disable=not fresh) as bar:
            for batch in batches:
                writer.add(batch)
                bar.update(sum(map(len, batch)))
    seconds = time.perf_counter() - began
    print(
        f"{len(fresh)} rows added to {folder}: {sum(map(len, fresh)):,} tokens, "
        f"{writer.bytes_per_token} bytes a token, {seconds:.1f} s."
    )
    return 0
