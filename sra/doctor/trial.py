"""`sra doctor --measure`: a few real steps, with weights; nothing of them is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from sra.alignment import SpanAligner
from sra.allocator import keep_freed_memory
from sra.collator import SpanCollator
from sra.distiller import SpanDistiller
from sra.doctor.checks import Finding
from sra.doctor.vocabulary_checks import MUCH_LOST
from sra.loading import load_model
from sra.model import head_rows
from sra.objective import Objective
from sra.progress import resident
from sra.vocabulary import SharedVocabulary

LEARNING_RATE = 1e-6  # the steps are there to be timed


def trial(
    names: tuple[str, str],
    tokenizers: tuple[Any, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    objective: Objective,
    vocabulary_match: Literal["raw", "normalised"] = "normalised",
    granularity: Literal["token", "word", "sentence"] = "token",
    max_length: int = 512,
    batch_size: int = 4,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> list[Finding]:
    """Load both models and train `steps` steps, and one before them that is not counted.

    Args:
        names: of student and teacher, for `load_model`.
        rows: the batches are taken from them in order, again from the start where they end.
        options: of `load_model`: trust_remote_code.

    Raises:
        ValueError: what the models or the rows do not allow.
    """
    if device == "cpu":
        keep_freed_memory()
    start_memory = resident("VmRSS")
    student = load_model(names[0], **options).to(device).train()
    teacher = None
    if objective.needs_teacher:
        teacher = load_model(names[1], dtype=dtype, **options).to(device)
    if gradient_checkpointing:
        student.gradient_checkpointing_enable()
    vocabulary = None
    if teacher is not None and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        vocabulary = SharedVocabulary(
            *tokenizers, match=vocabulary_match,
            student_rows=head_rows(student), teacher_rows=head_rows(teacher),
        )  # fmt: skip
    collator = SpanCollator(
        SpanAligner(*tokenizers, granularity=granularity), max_length=max_length
    )
    distiller = SpanDistiller(student, teacher, objective, vocabulary=vocabulary).to(device)
    optimiser = torch.optim.AdamW(distiller.parameters(), lr=LEARNING_RATE, fused=True)
    seconds, outputs = [], []
    for step in range(steps + 1):
        chosen = [rows[(step * batch_size + i) % len(rows)] for i in range(batch_size)]
        batch = _to(collator(chosen), device)
        _wait(device)
        start = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = distiller(**batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        _wait(device)
        seconds.append(time.perf_counter() - start)
        outputs.append({k: float(v.detach()) for k, v in out.items() if v is not None})
    return _findings(seconds[1:], outputs[1:], _peak(device, start_memory), objective)


def _findings(
    seconds: list[float], outputs: list[dict[str, float]], peak: int, objective: Objective
) -> list[Finding]:
    mean = {
        name: statistics.fmean(out[name] for out in outputs)
        for name in outputs[0]
        if all(name in out for out in outputs)
    }
    took = f"{statistics.median(seconds):.2f} s a step"
    if peak:
        took += f", at most {peak / 2**30:.1f} GiB"
    bits = f"; {mean['bits_per_byte']:.2f} bits per byte" if "bits_per_byte" in mean else ""
    finite = all(value == value and abs(value) < float("inf") for value in mean.values())
    found = [
        Finding("ok", "measured", f"{took}; loss {mean['loss']:.3f}{bits}")
        if finite
        else Finding("error", "measured", f"{took}; the loss is not finite", "Try --dtype float32.")
    ]
    if "shared_mass" in mean:
        low = mean["shared_mass"] < MUCH_LOST
        what = "the shared vocabulary"
        if objective.outside == "respell":
            what = "what the student can spell"
        found.append(
            Finding(
                "warning"
                if low and objective.outside == "renormalise"
                else "note"
                if low
                else "ok",
                "shared mass",
                f"the teacher gives {what} {mean['shared_mass']:.1%} of its probability",
                "Use the respell recipe; or weigh it, as the boundary recipe does "
                "(--outside weight), or use bucket."
                if low and objective.outside != "respell"
                else "",
            )
        )
    return found


def _to(batch: Any, device: str) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _to(x, device) for name, x in batch.items()}
    return [_to(x, device) for x in batch]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str, before: int) -> int:
    """Bytes; 0 where the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return max(0, resident("VmHWM") - before)
