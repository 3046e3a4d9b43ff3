"""ROUGE-L of sampled answers, by the protocol of the DSKD benchmark (arXiv 2406.17328).

Each prompt is answered once a seed by plain sampling, and the answer is compared with the
reference, or with the nearest of several, by the `rouge-score` package (pip install 'sra[eval]').
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from sra.chat import render_prompt, turn_end_id
from sra.model import causal_lm
from sra.token_bytes import clean_text

SEEDS = (10, 20, 30, 40, 50)


class Question(NamedTuple):
    """A prompt, and the answers that are good ones."""

    prompt: str
    references: tuple[str, ...]


class Answer(NamedTuple):
    """One generated text. score: F1 × 100 against the nearest reference."""

    row: int
    seed: int
    prompt: str
    text: str
    score: float


def rouge_l(references: Sequence[str], text: str) -> float:
    """F1 × 100 of the longest common subsequence of words, stemmed; the best over `references`.

    Of Latin script, words are what `rouge-score` makes of it: runs of a-z and 0-9. It drops all
    else; here the letters of other scripts are words too, each by itself where no spaces are
    written (Chinese, Japanese, Thai, Lao, Khmer, Burmese), otherwise in runs.

    Raises:
        ImportError: the package `rouge-score` is missing.
    """
    return 100 * _scorer().score_multi(list(references), text)["rougeL"].fmeasure


def answer(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    seed: int = SEEDS[0],
    greedy: bool = False,
    batch_size: int = 8,
    max_prompt_length: int = 256,
    max_length: int = 512,
    chat_template: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer each question once and score it.

    Sampling is from the model's own distribution: temperature 1, no top-k, no top-p, no penalty,
    whatever the model's generation config says. The same seed, batch size and machine give the same
    answers; they are drawn from their own random state, and the caller's is left alone.

    Args:
        model: a ``*ForCausalLM`` of transformers; its training mode is left as it was.
        tokenizer: its fast tokenizer.
        seed: of the sampling.
        greedy: take the likeliest token instead; one seed is enough then.
        batch_size: prompts at once, padded on the left.
        max_prompt_length: tokens kept of a prompt; what is over is cut off the end of its text,
            never off what the chat template writes behind it.
        max_length: tokens of prompt and answer; an answer has at most
            ``max_length - max_prompt_length``, and ends at an end token.
        progress: called with the number of questions answered after each batch.

    Raises:
        ValueError: no question, or no room for an answer.
        ImportError: the package `rouge-score` is missing.
    """
    _scorer()
    if not questions:
        raise ValueError("There is no question to answer. Check the data file and --limit.")
    if max_length <= max_prompt_length:
        raise ValueError(
            f"max_length = {max_length} leaves no room for an answer after max_prompt_length = "
            f"{max_prompt_length} tokens. Raise the one or lower the other."
        )
    written = generate(
        model,
        tokenizer,
        [
            _prompt_ids(tokenizer, question.prompt, max_prompt_length, chat_template)
            for question in questions
        ],
        seed=None if greedy else seed,
        batch_size=batch_size,
        max_new_tokens=max_length - max_prompt_length,
        progress=progress,
    )
    return [
        Answer(row, seed, question.prompt, text, rouge_l(question.references, text))
        for row, (question, (text, _)) in enumerate(zip(questions, written, strict=True))
    ]


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise ImportError(
            "ROUGE-L needs the package rouge-score: pip install 'sra[eval]'."
        ) from error
    return RougeScorer(["rougeL"], tokenizer=_Words(DefaultTokenizer(use_stemmer=True)))


class _Words:
    """The tokenizer of `rouge-score`, and what it drops of other scripts."""

    def __init__(self, latin: Any) -> None:
        import regex  # which rouge-score brings

        self.latin = latin
        unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
        other = r"[\p{L}\p{Nd}--\p{Latin}--[0-9]]"
        self.pattern = regex.compile(
            rf"[a-z0-9]+|[{unspaced}]\p{{M}}*|{other}(?:{other}|\p{{M}})*", regex.V1
        )

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = []
        for word in self.pattern.findall(text.lower()):
            words += self.latin.tokenize(word) if word.isascii() else [word]
        return words


def _prompt_ids(tokenizer: Any, prompt: str, limit: int, chat_template: bool) -> list[int]:
    """The rendered prompt; what is over `limit` tokens is cut off the end of the prompt's text."""
    prompt = clean_text(prompt)
    text = clean_text(render_prompt(tokenizer, prompt, chat_template=chat_template))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    at = text.rfind(prompt.strip())
    end = at + len(prompt.strip()) if at >= 0 else len(text)
    tail = sum(start >= end for start, _ in encoding["offset_mapping"])
    over = max(0, len(ids) - limit)
    body = ids[: len(ids) - tail]
    return (body[: max(0, len(body) - over)] + ids[len(body) :])[-limit:]


class Written(NamedTuple):
    """What a model wrote behind a prompt, without special tokens, stripped.

    ended: by an end token, not by the limit.
    """

    text: str
    ended: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    seed: int | None,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[Written]:
    """What the model writes behind each prompt of token ids.

    Args:
        seed: sample from the model's own distribution (see `answer`), from a random state of its
            own; None: the likeliest token each time.
        progress: called with the number of prompts done after each batch.
    """
    device = causal_lm(model).get_output_embeddings().weight.device
    training = model.training
    model.eval()
    written: list[Written] = []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if seed is not None:
                torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                written += _generate(model, tokenizer, part, device, seed is None, max_new_tokens)
                if progress:
                    progress(len(written))
    finally:
        model.train(training)
    return written


@torch.no_grad()
def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    device: torch.device,
    greedy: bool,
    max_new_tokens: int,
) -> list[Written]:
    from transformers import GenerationConfig

    inner = causal_lm(model)
    known = inner.generation_config
    ends = _end_ids(tokenizer, known)
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else min(ends, default=0)
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    config = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends or None,
        **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    # The model's own config fills what is not set here (penalties, top-k), so it has to go.
    inner.generation_config = config
    try:
        out = inner.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
        )
    finally:
        inner.generation_config = known
    rows = out[:, width:].tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [
        Written(text.strip(), any(end in row for end in ends))
        for text, row in zip(texts, rows, strict=True)
    ]


def _end_ids(tokenizer: Any, config: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, its template's, and those that the model was
    trained with."""
    listed = config.eos_token_id if config is not None else None
    listed = listed if isinstance(listed, list) else [listed]
    ends = tokenizer.eos_token_id, turn_end_id(tokenizer), *listed
    return sorted({i for i in ends if i is not None})
