"""Everything that is measured of a model on held-out rows, kept in a folder and gone on with."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sra.data import clean_row, parsed_lines
from sra.evaluation.likelihood import bits_per_byte, scored_bytes
from sra.evaluation.rouge import SEEDS, Answer, Question, answer
from sra.evaluation.span_comparison import span_agreement
from sra.token_bytes import clean_text
from sra.whole_file import write_whole

METRICS = ("bits_per_byte", "agreement", "rouge_l")
RESULTS_FILE, GENERATIONS_FILE = "results.json", "generations.jsonl"


def load_references(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a completion may be a list of references, each of them a good answer.

    Raises:
        FileNotFoundError, ValueError: with the file and the line.
    """
    return [_with_references(row, where) for where, row in parsed_lines(Path(path))]


def _with_references(row: Any, where: str) -> dict[str, Any]:
    references = row.get("completion") if isinstance(row, dict) else None
    if not isinstance(references, list):
        return clean_row(row, where)
    if not references:
        raise ValueError(f"{where}: the list of references is empty. Remove the row.")
    each = [clean_row(row | {"completion": reference}, where) for reference in references]
    return each[0] | {"completion": [one["completion"] for one in each]}


def single(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the first of its references as its completion."""
    completion = row.get("completion")
    return {**row, "completion": completion[0]} if isinstance(completion, list) else {**row}


def question(row: Mapping[str, Any], number: int) -> Question:
    """The row as a prompt to answer.

    Raises:
        ValueError: the row has no prompt and completion.
    """
    if "completion" not in row:
        raise ValueError(
            f"Row {number} has no 'completion', so there is no reference for ROUGE-L. Give rows of "
            '{"prompt": ..., "completion": ...} or leave rouge_l out of --metrics.'
        )
    references = row["completion"]
    listed = references if isinstance(references, list) else [references]
    return Question(clean_text(row["prompt"]), tuple(map(clean_text, listed)))


@dataclass(frozen=True)
class Teacher:
    """What `evaluate` compares a student with. vocabulary: None if they have one vocabulary."""

    model: Any
    tokenizer: Any
    collator: Any
    vocabulary: Any | None


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[str] = ("bits_per_byte",),
    teacher: Teacher | None = None,
    seeds: Sequence[int] = SEEDS,
    greedy: bool = False,
    batch_size: int = 8,
    max_length: int = 512,
    max_prompt_length: int = 256,
    chat_template: bool = True,
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a model on held-out rows.

    Args:
        rows: of any kind that `SpanCollator` takes; a completion may be a list of references, of
            which bits per byte takes the first and ROUGE-L the nearest.
        metrics: "bits_per_byte", "agreement" (see `span_agreement`; needs a teacher), "rouge_l".
        teacher: its bits per byte are measured as well.
        seeds: of ROUGE-L's sampling, one answer to each prompt a seed; greedy needs one alone.
        max_prompt_length: of ROUGE-L's prompts; see `sra.evaluation.rouge.answer`.
        output: a folder for results.json and generations.jsonl, written after each measurement. A
            measurement or seed that it holds already is not made again.
        settings: whatever else the numbers depend on (names of model and data), for `output`.
        log: called with a line of text before each measurement.

    Returns:
        ``{"rows": n, "settings": {...}, "bits_per_byte": x, "teacher_bits_per_byte": x, "bytes": n,
        "teacher_bytes": n, "agreement": share, "rouge_l": {"mean": x, "std": x, "seeds": {"10": x,
        ...}}}``, with what was asked for. Bytes are `scored_bytes` of both; ROUGE-L is F1 × 100,
        its std over seeds.

    Raises:
        ValueError: an unknown metric, agreement without a teacher, or an output folder that holds
            results of other settings.
    """
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"There is no metric {name!r}. Choose of {', '.join(METRICS)}.")
    if "agreement" in metrics and teacher is None:
        raise ValueError("The metric 'agreement' compares with a teacher. Pass one (--teacher).")
    questions = [question(row, i) for i, row in enumerate(rows)] if "rouge_l" in metrics else []
    plain = [single(row) for row in rows]
    given: dict[str, Any] = {
        **(settings or {}),
        "data": hashlib.sha256(json.dumps([*rows], sort_keys=True).encode()).hexdigest()[:16],
        "greedy": greedy,
        "batch_size": batch_size,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "chat_template": chat_template,
    }
    folder = None if output is None else Path(output)
    kept = _kept(folder, given)
    results = {"rows": len(plain), "settings": given} | kept
    _save(folder, results)  # before the answers, which say nothing of their settings

    def keep(name: str, measure: Callable[[], float]) -> None:
        if name not in results:
            log(f"measuring {name.replace('_', ' ')} on {len(plain):,} rows")
            results[name] = measure()
            _save(folder, results)

    def bits(one: Any, its_tokenizer: Any) -> float:
        return bits_per_byte(
            one, its_tokenizer, plain, batch_size=batch_size, max_length=max_length,
            chat_template=chat_template,
        )  # fmt: skip

    def agreement(known: Teacher) -> float:
        return span_agreement(
            model, known.model, plain, known.collator, known.vocabulary, batch_size=batch_size
        )

    if "bits_per_byte" in metrics:
        keep("bits_per_byte", partial(bits, model, tokenizer))
        if teacher is not None:
            keep("teacher_bits_per_byte", partial(bits, teacher.model, teacher.tokenizer))
            for name, one in (("bytes", tokenizer), ("teacher_bytes", teacher.tokenizer)):
                if name not in results:
                    results[name] = scored_bytes(
                        one, plain, max_length=max_length, chat_template=chat_template
                    )
    if "agreement" in metrics and teacher is not None:
        keep("agreement", partial(agreement, teacher))
    if questions:
        answers = _answers(folder) if kept else []
        wanted = [*seeds[:1]] if greedy else [*seeds]
        for seed in wanted:
            if any(a.seed == seed for a in answers):
                continue
            log(f"answering {len(questions):,} prompts, seed {seed}")
            answers += answer(
                model, tokenizer, questions, seed=seed, greedy=greedy, max_length=max_length,
                max_prompt_length=max_prompt_length, chat_template=chat_template,
                batch_size=batch_size,
            )  # fmt: skip
            results["rouge_l"] = _summary(answers)
            if folder is not None:
                lines = (json.dumps(a._asdict(), ensure_ascii=False) + "\n" for a in answers)
                write_whole(folder / GENERATIONS_FILE, "".join(lines))
            _save(folder, results)
        results["rouge_l"] = _summary([one for one in answers if one.seed in wanted])
    _save(folder, results)
    return results


def _summary(answers: Sequence[Answer]) -> dict[str, Any]:
    of_seed: dict[str, list[float]] = {}
    for one in answers:
        of_seed.setdefault(str(one.seed), []).append(one.score)
    means = {seed: statistics.fmean(scores) for seed, scores in of_seed.items()}
    values = list(means.values())
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "seeds": means}


def _kept(folder: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder holds already."""
    if folder is None or not (folder / RESULTS_FILE).exists():
        return {}
    kept = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    then, now = kept.get("settings", {}), json.loads(json.dumps(settings))
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        changes = ", ".join(f"{name}: {then.get(name)} → {now.get(name)}" for name in different)
        raise ValueError(
            f"{folder} holds results of other settings ({changes}). Choose another --output, or "
            "delete the folder to measure anew."
        )
    return kept


def _answers(folder: Path | None) -> list[Answer]:
    if folder is None or not (folder / GENERATIONS_FILE).exists():
        return []
    with (folder / GENERATIONS_FILE).open(encoding="utf-8") as lines:
        return [Answer(**json.loads(line)) for line in lines]


def _save(folder: Path | None, results: Mapping[str, Any]) -> None:
    if folder is not None:
        text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / RESULTS_FILE, text)
