"""`sra doctor`'s prediction of memory and time beside real training steps.

    python -m benchmarks.doctor [--steps 4] [--batch-size 4] [--recipe respell] [--processor-time]

The steps run in a child process: student and teacher from the demo, AdamW, one batch of the demo's
instructions. Before each step the child takes this machine's rates again, so that prediction and
truth see the same load. Memory is the peak of resident memory above what the process takes before
it loads a model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from typing import Any

STUDENT, TEACHER = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Predict, then do it."""
    import torch
    from transformers import AutoConfig

    from sra.alignment import SpanAligner
    from sra.allocator import give_back_memory, keep_freed_memory
    from sra.collator import SpanCollator
    from sra.data import IGNORED
    from sra.distiller import SpanDistiller
    from sra.doctor.planner import measure, predict
    from sra.loading import load_model, load_tokenizer, resolve_model
    from sra.objective import recipe
    from sra.packages import fetch_instructions
    from sra.progress import reset_peak, resident
    from sra.vocabulary import SharedVocabulary

    keep_freed_memory()  # as `sra distill` does
    clock = time.process_time if args.processor_time else time.perf_counter
    tokenizers = load_tokenizer(STUDENT), load_tokenizer(TEACHER)
    configs = [AutoConfig.from_pretrained(resolve_model(x)) for x in (STUDENT, TEACHER)]
    collator = SpanCollator(SpanAligner(*tokenizers), max_length=args.max_length)
    batch = collator(fetch_instructions("en")[: args.batch_size])
    vocabulary = SharedVocabulary(
        *tokenizers, match="raw", student_rows=configs[0].vocab_size,
        teacher_rows=configs[1].vocab_size,
    )  # fmt: skip
    sizes = {
        "batch_size": args.batch_size,
        "student_tokens": batch["input_ids"].shape[1],
        "teacher_tokens": batch["teachers"][0]["input_ids"].shape[1],
        "spans": len(batch["teachers"][0]["student_spans"]) / args.batch_size,
        "labels": int((batch["labels"][:, 1:] != IGNORED).sum()) / args.batch_size,
        "shared": len(vocabulary),
        "objective": recipe(args.recipe),
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    predict(
        *configs, **sizes, machine=measure(clock=clock)
    )  # what it imports is no part of the peak
    give_back_memory()
    before = resident("RssAnon")
    student, teacher = load_model(STUDENT).train(), load_model(TEACHER)
    if args.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    distiller = SpanDistiller(student, teacher, sizes["objective"], vocabulary=vocabulary)
    optimiser = torch.optim.AdamW(distiller.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        distiller(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    step()  # makes the optimiser's state
    give_back_memory()
    reset_peak()
    files = resident("RssFile")
    step()
    peak = resident("VmHWM") - files - before
    measured, predicted, parts = [], [], []
    for _ in range(args.steps):
        plan = predict(*configs, **sizes, clock=clock)
        predicted.append(plan.step_seconds)
        parts.append(plan.seconds)
        start = clock()
        step()
        measured.append(clock() - start)
    return {
        "sizes": sizes,
        "peak": (plan.peak, peak),
        "memory": plan.memory,
        "moment": plan.moment,
        "seconds": (statistics.median(predicted), statistics.median(measured)),
        "parts": {x: statistics.median(p[x] for p in parts) for x in parts[0]},
        "runs": [*zip(predicted, measured, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--recipe", default="respell")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--processor-time", action="store_true", help="of this process, for a busy machine"
    )
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as child:
        found = child.apply(run, (args,))
    print({k: v for k, v in found["sizes"].items() if k != "objective"}, args.recipe)
    for name, unit, scale in (("peak", "GiB", 2**30), ("seconds", "s", 1)):
        predicted, measured = found[name]
        print(
            f"{name:8} predicted {predicted / scale:7.2f} {unit}, measured {measured / scale:7.2f} "
            f"{unit}: {predicted / measured - 1:+.1%}"
        )
    print(f"at {found['moment']}:", {k: f"{v / 2**20:.0f} MiB" for k, v in found["memory"].items()})
    print({name: f"{part:.2f} s" for name, part in found["parts"].items()})
    print("predicted/measured s:", [f"{p:.2f}/{m:.2f}" for p, m in found["runs"]])


if __name__ == "__main__":
    main()
