"""SFT, which has no teacher; and SeqKD, which is SFT on what the teacher answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from sra.baselines.baseline import Baseline
from sra.chat import render, render_prompt, render_question
from sra.data import check_row
from sra.evaluation.rouge import generate
from sra.token_bytes import clean_text


@dataclass(frozen=True)
class SFT(Baseline):
    """L = CE: supervised fine-tuning, the measure of what a teacher adds.

    On rows of `teacher_completions` it is SeqKD (arXiv 1606.07947, section 3.2).
    """

    alpha: float = 1.0
    name: ClassVar[str] = "sft"

    def __post_init__(self) -> None:
        if self.alpha != 1:
            raise ValueError(f"alpha = {self.alpha}: SFT is cross-entropy alone; leave alpha out.")


class Completions(NamedTuple):
    """Rows with the teacher's answers.

    empty: rows left out because the teacher said nothing.
    long: rows left out because of their prompt.
    cut: answers that did not end: kept, or left out too.
    """

    rows: list[dict[str, Any]]
    empty: int
    long: int
    cut: int


def teacher_completions(
    teacher: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    seed: int | None = None,
    max_prompt_length: int | None = None,
    keep_cut: bool = True,
    chat_template: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Completions:
    """Replace each row's answer by the teacher's: the data of SeqKD.

    A prompt is answered as the teacher's own template (or the lack of one) writes it. Of messages,
    the last one is replaced and those before it stay as they are, so train with
    ``train_turns="last"``. The paper takes what beam search finds for the likeliest answer; here it
    is the greedy one, or a sample.

    An answer ends at an end token. If one that `max_new_tokens` cuts off is kept, the student will
    learn that it ends there. A teacher that repeats itself fills every room that it is given.

    Args:
        teacher: a ``*ForCausalLM`` of transformers; its training mode is left as it was.
        tokenizer: its fast tokenizer.
        rows: prompts with completions, or messages of which the last is the assistant's.
        batch_size: prompts at once, padded on the left. Greedy answers do not depend on it.
        seed: sample from the teacher's own distribution (temperature 1, no top-k, no top-p); the
            same seed, batch size and machine give the same answers. None: greedy.
        max_prompt_length: leave out rows whose prompt has more tokens.
        keep_cut: False leaves out rows whose answer did not end.
        progress: called with the number of rows done after each batch.

    Raises:
        ValueError: a row that asks nothing, or that the chat template refuses.
    """
    given = list(rows)
    prompts = []
    for number, row in enumerate(given):
        check_row(row, f"Row {number}")
        text = _prompt(tokenizer, row, f"Row {number}", chat_template)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    short = [
        i
        for i, prompt in enumerate(prompts)
        if max_prompt_length is None or len(prompt) <= max_prompt_length
    ]
    written = generate(
        teacher,
        tokenizer,
        [prompts[i] for i in short],
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    said = [(given[i], answer) for i, answer in zip(short, written, strict=True) if answer.text]
    answered = [
        _answered(row, clean_text(text)) for row, (text, ended) in said if ended or keep_cut
    ]
    cut = sum(not answer.ended for _, answer in said)
    return Completions(answered, len(short) - len(said), len(given) - len(short), cut)


def _prompt(tokenizer: Any, row: Mapping[str, Any], where: str, chat_template: bool) -> str:
    """What stands before the row's answer, up to the opening of the assistant's turn."""
    messages = row.get("messages")
    if messages is None:
        if row.get("completion") is None:
            raise ValueError(f"{where}: a text asks nothing, so there is nothing to answer.")
        return render_prompt(tokenizer, clean_text(row["prompt"]), chat_template=chat_template)
    roles = [message["role"] for message in messages]
    if len(roles) == 1 or roles[-1] != "assistant":
        raise ValueError(
            f"{where}: its messages are by {', '.join(roles)}. To be answered anew, they must end "
            "with the assistant's answer to another."
        )
    if chat_template and tokenizer.chat_template:
        return render_question(tokenizer, messages[:-1], row.get("tools"))
    plain = render(tokenizer, row, chat_template=False, train_turns="last")
    return plain.text[: plain.labels[-1].start]


def _answered(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    if row.get("messages") is None:
        return {**row, "completion": text}
    return {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": text}]}
