"""Training from a teacher's states on disk beside training from the teacher: size and speed.

    python -m benchmarks.teacher_cache

writes the states of some English instruction pairs in each dtype, trains the student for the same
steps from the model and from each folder, with padding and without, in turns, and prints the table
of docs/cache.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sra.alignment import SpanAligner
from sra.collator import SpanCollator
from sra.distiller import SpanDistiller
from sra.loading import load_model, load_tokenizer
from sra.model import head_rows
from sra.objective import recipe
from sra.packages import fetch_instructions
from sra.precision import faster_dtype
from sra.teacher_cache import DiskCache
from sra.teacher_cache.files import DTYPES, read_index
from sra.teacher_cache.writer import CacheWriter, teacher_sequences
from sra.vocabulary import SharedVocabulary


def write(folder: Path, teacher: Any, tokenizer: Any, rows: Sequence[Any], dtype: str) -> float:
    """Write the states of the rows; bytes a token, keys and headers included."""
    with CacheWriter(folder, teacher, tokenizer, dtype=dtype) as writer:
        for batch in writer.batches(teacher_sequences(rows, tokenizer), 8):
            writer.add(batch)
    entries = read_index(folder)
    return sum(entry.bytes for entry in entries) / sum(entry.tokens for entry in entries)


Run = tuple[SpanDistiller, torch.optim.Optimizer]


def start(args: argparse.Namespace, teacher: Any, tokenizers: Sequence[Any]) -> Run:
    """A fresh student with its teacher, and what trains it."""
    student = load_model(args.student).train()
    vocabulary = SharedVocabulary(
        *tokenizers, match="raw", student_rows=head_rows(student), teacher_rows=head_rows(teacher)
    )
    torch.manual_seed(0)
    distiller = SpanDistiller(student, teacher, recipe("respell"), vocabulary=vocabulary)
    return distiller, torch.optim.AdamW(distiller.parameters(), lr=1e-5)


def step(run: Run, batch: Any) -> tuple[float, float]:
    """Loss and seconds of one step."""
    distiller, optimiser = run
    began = time.perf_counter()
    loss = distiller(**batch).loss
    assert loss is not None
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item(), time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="SmolLM2-135M-Instruct")
    parser.add_argument("--teacher", default="Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args(argv)
    tokenizers = load_tokenizer(args.student), load_tokenizer(args.teacher)
    teacher = load_model(args.teacher).to(faster_dtype()).eval()
    rows = fetch_instructions("en")[: args.steps * args.batch_size]
    aligner = SpanAligner(*tokenizers)
    parts = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    padded, packed = (
        [SpanCollator(aligner, padding=padding)(part) for part in parts]
        for padding in ("right", "free")
    )
    with tempfile.TemporaryDirectory() as scratch:
        folders = {dtype: Path(scratch) / dtype for dtype in DTYPES}
        sizes = {
            dtype: write(folder, teacher, tokenizers[1], rows, dtype)
            for dtype, folder in folders.items()
        }
        on_disk = {f"{dtype} on disk": DiskCache(path) for dtype, path in folders.items()}
        variants: dict[str, tuple[Any, list[Any]]] = {
            "the model": (teacher, padded),
            "the model, without padding": (teacher, packed),
            **{name: (cache, padded) for name, cache in on_disk.items()},
            "bfloat16 on disk, without padding": (on_disk["bfloat16 on disk"], packed),
        }
        # One student at a time would be less memory, but the machine's speed drifts.
        runs = {name: start(args, given, tokenizers) for name, (given, _) in variants.items()}
        done: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for number, name in itertools.product(range(len(parts)), runs):  # the first warms up
            done[name].append(step(runs[name], variants[name][1][number]))
    times = {name: statistics.median(s for _, s in steps[1:]) for name, steps in done.items()}
    print("| teacher | bytes a token | s a step | speed-up | loss of step 1 | of the last |")
    print("|---|---|---|---|---|---|")
    for name, steps in done.items():
        size = sizes.get(name.partition(" ")[0])
        print(
            f"| {name} | {'' if size is None else f'{size:.0f}'} | {times[name]:.2f} | "
            f"{times['the model'] / times[name]:.2f} | {steps[0][0]:.5f} | {steps[-1][0]:.5f} |"
        )
    print(
        f"\n{args.student} from {args.teacher} ({str(teacher.dtype).removeprefix('torch.')}), "
        f"{args.batch_size} rows a step, median of {args.steps - 1} steps, "
        f"{torch.get_num_threads()} threads."
    )


if __name__ == "__main__":
    main()
