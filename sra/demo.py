"""`sra demo`: prune a real student, distil a real teacher into it three ways, report what came out.

The student keeps some of its layers, evenly spaced, and is trained from that same start, on the
same batches, for the same steps, by cross-entropy alone and by both SRA recipes; once on fresh
data, once in many passes over little.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from sra.alignment import SpanAligner
from sra.allocator import give_back_memory, keep_freed_memory
from sra.chat import render_prompt
from sra.collator import SpanCollator
from sra.config import SRAConfig
from sra.distiller import SpanDistiller
from sra.evaluation import bits_per_byte
from sra.loading import load_model, load_tokenizer
from sra.objective import Objective
from sra.packages import fetch_instructions
from sra.precision import faster_dtype
from sra.progress import peak_gib, reset_peak
from sra.teacher_cache import TeacherCache
from sra.trainer import SRATrainer

MAX_TOKENS = 160  # rows are chosen to fit, so that a step takes seconds on two cores
HELD_OUT = 40
BATCH = 4
LEARNING_RATE = 3e-4
RECIPES = ("cross-entropy", "paper", "respell")
Row = dict[str, str]


@dataclass(frozen=True)
class Regime:
    """How much data, and how often it is seen."""

    name: str
    rows: int
    steps: int


REGIMES = (Regime("fresh", rows=160, steps=40), Regime("little", rows=32, steps=48))


@dataclass
class Result:
    """One line of the table. Curves are (step, held-out bits per byte)."""

    regime: str
    run: str
    bits_per_byte: float
    curve: list[tuple[int, float]]
    seconds_per_step: float | None = None
    peak_gib: float | None = None
    coverage: float | None = None
    shared_mass: float | None = None


def prune_layers(model: Any, layers: int) -> Any:
    """Keep `layers` decoder layers of a model, evenly spaced from the first to the last."""
    stack = model.base_model.layers
    if not 1 < layers <= len(stack):
        raise ValueError(f"--layers {layers}: the student has {len(stack)} layers; keep 2 or more.")
    kept = [round(i * (len(stack) - 1) / (layers - 1)) for i in range(layers)]
    model.base_model.layers = nn.ModuleList(stack[i] for i in kept)
    for index, layer in enumerate(model.base_model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    return model


def run_demo(*, student: str, teacher: str, layers: int, output: Path, scale: float) -> int:
    """Run everything, print and save the table, the curves and the best student."""
    began = time.perf_counter()
    logging.disable_progress_bar()  # of loading and saving, which would bury the runs' own
    if scale <= 0:
        raise ValueError(f"--scale {scale}: it must be positive.")
    keep_freed_memory()
    tokenizer, teacher_tokenizer = load_tokenizer(student), load_tokenizer(teacher)
    collator = SpanCollator(SpanAligner(tokenizer, teacher_tokenizer), max_length=2 * MAX_TOKENS)
    held_out, rows = choose_rows(collator)
    output.mkdir(parents=True, exist_ok=True)

    whole = load_model(student)
    before = [Result("", f"{student}, all its layers", measure(whole, tokenizer, held_out), [])]
    start = prune_layers(whole, layers)
    start_bits = measure(start, tokenizer, held_out)
    before.append(Result("", f"the same cut to {layers} layers: the start", start_bits, []))
    start.save_pretrained(output / "start")
    tokenizer.save_pretrained(output / "start")
    del whole, start

    dtype = faster_dtype()
    print(f"\nMatrix products in {dtype}. Held-out bits per byte (lower is better):")
    for line in before:
        print(f"  {line.bits_per_byte:.3f}  {line.run}")

    # Cross-entropy first: its peak memory is measured before the teacher is in memory.
    results: list[Result] = []
    remembered: TeacherCache | None = None
    for recipe in RECIPES:
        if recipe != "cross-entropy" and remembered is None:
            model = load_model(teacher)
            bits = measure(model, teacher_tokenizer, held_out)
            remembered = TeacherCache(model.to(dtype))
            seconds = remember(remembered, collator, rows)
            name = f"{teacher}: the teacher (s for a batch of {BATCH}, once)"
            before.insert(0, Result("", name, bits, [], seconds_per_step=seconds))
            print(f"  {bits:.3f}  {name}: {seconds:.2f}")
        for regime in REGIMES:
            result, trainer = train(
                recipe, regime, max(2, round(regime.steps * scale)), output,
                start=output / "start", teacher=remembered, bf16=dtype == torch.bfloat16,
                tokenizers=(tokenizer, teacher_tokenizer), train_rows=rows[: regime.rows],
                held_out=held_out,
            )  # fmt: skip
            result.curve.insert(0, (0, start_bits))
            results.append(result)
            if result is min(results, key=lambda r: r.bits_per_byte):
                trainer.save_model(str(output / "best"))
            print(f"  {result.bits_per_byte:.3f}  {recipe}, {regime.name}")

    results.sort(key=lambda r: [regime.name for regime in REGIMES].index(r.regime))
    best = min(results, key=lambda r: r.bits_per_byte)
    table = markdown([*before, *results])
    (output / "table.md").write_text(table, encoding="utf-8")
    (output / "results.json").write_text(
        json.dumps([asdict(r) for r in (*before, *results)], indent=1)
    )
    draw_curves(results, output / "curves.png")
    print(f"\n{table}\nBest: {best.run}, {best.regime}. In {output / 'best'}:")
    print(sample(output / "best", tokenizer, held_out[0]))
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{output}: table.md, curves.png, results.json, best/. {minutes:.1f} minutes.")
    return 0


def choose_rows(collator: SpanCollator) -> tuple[list[Row], list[Row]]:
    """(held out, for training): English instruction pairs that fit into `MAX_TOKENS`."""
    rows = fetch_instructions("en")
    random.Random(0).shuffle(rows)
    wanted = HELD_OUT + max(regime.rows for regime in REGIMES)
    fitting = []
    for row in rows:
        table = collator.table(row)
        if max(len(table.student_ids), len(table.teacher_ids)) <= MAX_TOKENS:
            fitting.append(row)
        if len(fitting) == wanted:
            break
    return fitting[:HELD_OUT], fitting[HELD_OUT:]


def remember(cache: TeacherCache, collator: SpanCollator, rows: list[Row]) -> float:
    """Let the teacher read all rows once, so that every run finds its states; seconds a batch."""
    starts = range(0, len(rows), BATCH)
    began = time.perf_counter()
    for start in tqdm(starts, desc="the teacher reads", leave=False):
        batch = collator(rows[start : start + BATCH])
        teacher = batch["teachers"][0]
        cache.states(teacher["input_ids"], teacher["attention_mask"])
    return (time.perf_counter() - began) / len(starts)


def measure(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    return bits_per_byte(model, tokenizer, rows, max_length=2 * MAX_TOKENS)


def train(
    recipe: str,
    regime: Regime,
    steps: int,
    output: Path,
    *,
    start: Path,
    teacher: TeacherCache | None,
    tokenizers: tuple[Any, Any],
    train_rows: list[Row],
    held_out: list[Row],
    bf16: bool,
) -> tuple[Result, SRATrainer]:
    """One run, and the trainer that holds its student."""
    print(f"\n{recipe}, {regime.name}: {steps} steps of {BATCH} of {len(train_rows)} rows")
    give_back_memory()
    reset_peak()
    trainer = SRATrainer(
        load_model(str(start)),
        teacher,
        SRAConfig(
            output_dir=str(output),
            recipe=recipe,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=max(1, math.ceil(steps / 4)),
            save_strategy="no",
            max_length=2 * MAX_TOKENS,
            seed=0,
            bf16=bf16,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=tokenizers[0],
        teacher_processing_class=tokenizers[1],
    )
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    logs = trainer.state.log_history
    curve = [
        (int(log["step"]), log["eval_bits_per_byte"]) for log in logs if "eval_bits_per_byte" in log
    ]
    if not curve or curve[-1][0] != steps:
        curve.append((steps, trainer.evaluate()["eval_bits_per_byte"]))
    result = Result(
        regime.name,
        recipe,
        curve[-1][1],
        curve,
        seconds_per_step=clock.median(),
        peak_gib=peak_gib(),
        coverage=trainer.coverage,
        shared_mass=teacher_shared_mass(trainer, train_rows[: 4 * BATCH]),
    )
    return result, trainer


@torch.no_grad()
def teacher_shared_mass(trainer: SRATrainer, rows: list[Row]) -> float | None:
    """The teacher's probability of the shared vocabulary, or of what the student can spell, where
    the run's logit term asks for it."""
    run = trainer.distiller
    objective = run.objective
    if not isinstance(objective, Objective) or not objective.needs_teacher:
        return None
    if objective.outside == "renormalise":  # which does not compute it
        objective = replace(objective, outside="weight", cosine=0.0, gamma=0.0)
    probe = SpanDistiller(run.student, run.teachers, objective, vocabulary=run.vocabularies)
    return float(probe(**trainer.data_collator(rows)).shared_mass)


class StepClock(TrainerCallback):
    """Wall time of each optimiser step, evaluation left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def median(self) -> float:
        return statistics.median(self.seconds)


def markdown(results: list[Result]) -> str:
    """The table, as it is printed and saved."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        "| data | run | held-out bits per byte | s/step | peak GiB | coverage | shared mass |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = (
            r.regime, r.run, cell(r.bits_per_byte, ".3f"), cell(r.seconds_per_step, ".2f"),
            cell(r.peak_gib, ".1f"), cell(r.coverage, ".1%"), cell(r.shared_mass, ".1%"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_curves(results: list[Result], path: Path) -> None:
    """Held-out bits per byte against steps, a panel for each regime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(REGIMES), figsize=(10, 4), constrained_layout=True)
    for axis, regime in zip(axes, REGIMES, strict=True):
        for color, result in zip(
            ("#888888", "#d1495b", "#00798c"),
            (r for r in results if r.regime == regime.name),
            strict=True,
        ):
            steps, bits = zip(*result.curve, strict=True)
            label = f"{result.run}: {bits[-1]:.3f}"
            axis.plot(steps, bits, marker="o", markersize=4, color=color, label=label)
        passes = steps[-1] * BATCH / regime.rows
        axis.set_title(f"{regime.name}: {regime.rows} rows, {passes:.3g} pass{'es' * (passes > 1)}")
        axis.set_xlabel("optimiser steps")
        axis.set_ylabel("held-out bits per byte")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def sample(folder: Path, tokenizer: Any, row: Row) -> str:
    """What the saved student answers, greedily, to a held-out prompt."""
    model = load_model(str(folder))
    prompt = tokenizer(
        render_prompt(tokenizer, row["prompt"]), return_tensors="pt", add_special_tokens=False
    )
    written = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(written[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    return f"  > {row['prompt']}\n  {answer.strip()}"
