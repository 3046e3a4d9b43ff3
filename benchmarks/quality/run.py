"""One setting prepared, and one run of it after the other."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from benchmarks.quality.settings import (
    ACCIDENTS,
    ANSWER,
    ANSWERED,
    BATCH,
    BETA2,
    DEV,
    MAX_TOKENS,
    OTHER,
    REGIMES,
    TEST,
    VARIANTS,
    WARMUP,
    Regime,
    Setting,
    has_share,
)
from benchmarks.quality.table import Run
from sra import (
    SharedVocabulary,
    SpanAligner,
    SpanCollator,
    SRAConfig,
    SRATrainer,
    TeacherCache,
    bits_per_byte,
)
from sra.allocator import give_back_memory, keep_freed_memory
from sra.baselines.sft import teacher_completions
from sra.demo import prune_layers, remember
from sra.evaluation import evaluate, span_agreement
from sra.loading import load_model, load_tokenizer
from sra.model import head_rows
from sra.packages import fetch_instructions
from sra.precision import faster_dtype
from sra.progress import peak_gib, reset_peak

Row = dict[str, Any]
MEASURES = ("bits_per_byte", "agreement", "rouge_l", "other_bits_per_byte")
SPLITS = {"dev": slice(0, DEV), "test": slice(DEV, DEV + TEST)}


class Clock(TrainerCallback):
    """Seconds of the steps after the first three, which warm up."""

    def __init__(self) -> None:
        self.steps, self.seconds, self._began = 0, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 3:
            self.steps += 1
            self.seconds += time.perf_counter() - self._began


class Bench:
    """A setting with its models and rows; the teacher reads each row once for all runs."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting = setting
        self.folder = folder / setting.name
        self.tokenizers = load_tokenizer(setting.student), load_tokenizer(setting.teacher)
        self.collator = SpanCollator(SpanAligner(*self.tokenizers), max_length=2 * MAX_TOKENS)
        self.rows = self._fitting(setting.language)
        self.other = self._fitting(setting.other)[:OTHER]
        self.start = self.folder / "start"
        if not self.start.exists():
            model = load_model(setting.student)
            if setting.layers:
                prune_layers(model, setting.layers)
            part = self.start.with_suffix(".part")  # a process may end between two files
            model.save_pretrained(part)
            self.tokenizers[0].save_pretrained(part)
            part.rename(self.start)
        self.dtype = faster_dtype()
        self._teacher: TeacherCache | None = None

    @property
    def teacher(self) -> TeacherCache:
        if self._teacher is None:
            self._teacher = TeacherCache(load_model(self.setting.teacher).to(self.dtype))
        return self._teacher

    def untrained(self) -> Any:
        """The student that every run begins with."""
        student = load_model(str(self.start))
        # At 128 tokens, on the CPU: 0.25 of 1.25 s a step less than torch's fused attention takes.
        student.set_attn_implementation("eager")
        return student

    def train_rows(self, regime: Regime) -> list[Row]:
        return self.rows[DEV + TEST :][: regime.rows]

    def answered(self) -> list[Row]:
        """Training rows with the teacher's own completions, for SeqKD; made once and kept.

        Those that fill all room are left out. Of Qwen's they were a twelfth of the answers and a
        third of their tokens: lists without end, cut in the middle of a word. A base model ends
        none (of Gemma's 256, one was empty and all others filled the room), so its are kept.
        """
        file = self.folder / "answers.jsonl"
        if not file.exists():
            asked = self.rows[DEV + TEST :][: max(regime.rows for regime in REGIMES.values())]
            tokenizer = self.tokenizers[1]
            made = teacher_completions(
                load_model(self.setting.teacher).to(self.dtype),
                tokenizer,
                asked,
                max_new_tokens=MAX_TOKENS,
                keep_cut=tokenizer.chat_template is None,
                batch_size=16,
            )
            ended = len(asked) - made.empty - made.cut
            print(f"{self.setting.teacher} ends {ended} of {len(asked)} answers.")
            part = file.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in made.rows))
            part.rename(file)
        return [json.loads(line) for line in file.read_text().splitlines()]

    def run(
        self, variant: str, regime: Regime, split: str, *, rate: float, alpha: float, seed: int
    ) -> Run:
        """Train one student, and measure it; or measure what stands before and beside all."""
        clock = Clock()
        try:
            if variant == "teacher":
                found = self._measure_teacher()
            elif variant == "start":
                found = self._measure(self.untrained().eval(), split)
            else:
                student = self.trained(
                    variant, regime, rate=rate, alpha=alpha, seed=seed, callbacks=[clock]
                )
                found = self._measure(student, split)
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            found = dict.fromkeys(MEASURES, math.nan)
        return Run(
            setting=self.setting.name, regime=regime.name, variant=variant, split=split,
            learning_rate=rate, alpha=alpha, seed=seed, steps=regime.steps,
            seconds_a_step=clock.seconds / max(clock.steps, 1), peak_gib=peak_gib() or math.nan,
            **found,
        )  # fmt: skip

    def trained(
        self,
        variant: str,
        regime: Regime,
        *,
        rate: float,
        alpha: float,
        seed: int,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Any:
        """A student of this variant, ready to be asked.

        Raises:
            RuntimeError: "... not finite ..." if it diverged.
        """
        options = dict(VARIANTS[variant])
        if has_share(variant):
            options.setdefault("alpha", alpha)
        scratch = Path(tempfile.mkdtemp(prefix="sra-quality-"))
        config = SRAConfig(
            output_dir=str(scratch), max_steps=regime.steps, per_device_train_batch_size=BATCH,
            learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=regime.steps // WARMUP,
            adam_beta2=BETA2,
            max_length=2 * MAX_TOKENS, seed=seed, data_seed=seed, bf16=self.dtype == torch.bfloat16,
            use_cpu=not torch.accelerator.is_available(), save_strategy="no", report_to="none",
            logging_steps=regime.steps, agreement_spans=0, disable_tqdm=True, **options,
        )  # fmt: skip
        rows = self.train_rows(regime)
        if variant == "seqkd":
            rows = self.answered()[: regime.rows]
        student = self.untrained()
        trainer = self._trainer(variant, student, config, rows)
        trainer.remove_callback(PrinterCallback)
        for callback in callbacks:
            trainer.add_callback(callback)
        try:
            trainer.train()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return student.eval()

    def _trainer(self, variant: str, student: Any, config: SRAConfig, rows: list[Row]) -> Trainer:
        needs_teacher = config.objective().needs_teacher
        if needs_teacher:  # so that no method pays for what all of them share
            remember(self.teacher, self.collator, rows)
        give_back_memory()
        reset_peak()
        if variant == ACCIDENTS:
            # Here, for it needs the tests, which an installed package does not have.
            from benchmarks.quality.accidents import AccidentsTrainer, PaperWithAccidents

            teacher = load_model(self.setting.teacher)
            model = PaperWithAccidents(student, teacher, self.tokenizers, config)
            return AccidentsTrainer(model, config, rows)
        return SRATrainer(
            student,
            self.teacher if needs_teacher else None,
            config,
            train_dataset=rows,
            processing_class=self.tokenizers[0],
            teacher_processing_class=self.tokenizers[1] if needs_teacher else None,
        )

    def _measure(self, student: Any, split: str) -> dict[str, float]:
        tokenizer = self.tokenizers[0]
        rows = self.rows[SPLITS.get(split, slice(0))]
        found = dict.fromkeys(MEASURES, math.nan)
        if split in SPLITS:
            found["bits_per_byte"] = bits_per_byte(student, tokenizer, rows, max_length=1024)
        if split == "test":
            found["agreement"] = span_agreement(
                student, self.teacher, rows, self.collator, self.vocabulary(student)
            )
            found |= self._measure_more(student, tokenizer, rows)
        return found

    def _measure_teacher(self) -> dict[str, float]:
        teacher = load_model(self.setting.teacher).to(self.dtype).eval()
        tokenizer, rows = self.tokenizers[1], self.rows[SPLITS["test"]]
        return {
            "bits_per_byte": bits_per_byte(teacher, tokenizer, rows, max_length=1024),
            "agreement": math.nan,
            **self._measure_more(teacher, tokenizer, rows),
        }

    def _measure_more(self, model: Any, tokenizer: Any, rows: list[Row]) -> dict[str, float]:
        answers = evaluate(
            model, tokenizer, rows[:ANSWERED], metrics=["rouge_l"], greedy=True,
            batch_size=ANSWERED, max_prompt_length=MAX_TOKENS, max_length=MAX_TOKENS + ANSWER,
        )  # fmt: skip
        return {
            "rouge_l": answers["rouge_l"]["mean"],
            "other_bits_per_byte": bits_per_byte(model, tokenizer, self.other, max_length=1024),
        }

    def vocabulary(self, student: Any) -> SharedVocabulary | None:
        if self.setting.student == self.setting.teacher:
            return None
        sizes = {"student_rows": head_rows(student), "teacher_rows": head_rows(self.teacher)}
        return SharedVocabulary(*self.tokenizers, match="normalised", **sizes)

    def _fitting(self, language: str) -> list[Row]:
        """Instructions that fit into `MAX_TOKENS` of both sides, in one order for ever."""
        rows = fetch_instructions(language)
        random.Random(0).shuffle(rows)
        tables = ((row, self.collator.table(row)) for row in rows)
        return [
            row
            for row, table in tables
            if max(len(table.student_ids), len(table.teacher_ids)) <= MAX_TOKENS
        ]


def settle() -> None:
    """What every process that runs does first."""
    logging.disable_progress_bar()
    keep_freed_memory()


def timed(setting: Setting, folder: Path, variant: str, regime: Regime, **options: Any) -> Run:
    """A run of `split` "speed" in a process of its own, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=settle) as pool:
        return pool.submit(_timed, setting, folder, variant, regime, options).result()


def _timed(
    setting: Setting, folder: Path, variant: str, regime: Regime, options: dict[str, Any]
) -> Run:
    return Bench(setting, folder).run(variant, regime, "speed", **options)
