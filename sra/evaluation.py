"""How well a model predicts text, in a unit that does not depend on its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sra.chat import render_prompt
from sra.head import head_of
from sra.token_bytes import clean_text

CHUNK_ELEMENTS = 1 << 25  # logits held at once: 128 MiB in fp32


class ScoredRow(NamedTuple):
    """One tokenised row: ``input_ids[first:]`` spell ``num_bytes`` bytes of its completion."""

    input_ids: list[int]
    first: int
    num_bytes: int


@torch.no_grad()
def bits_per_byte(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, str]],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    chat_template: bool = True,
) -> float:
    """−log2 p(completion | prompt), summed over the rows, for each UTF-8 byte of the completions.

    Lower is better. Dividing by bytes, not tokens, makes models with different tokenizers
    comparable: both are asked to predict the same text.

    Prompt and completion are tokenised as one text, as in training. A token counts when it starts
    in the completion; a token that straddles the boundary does not, nor do its bytes. The end of
    sequence is not scored, because not every model has learned the same one. A row longer than
    ``max_length`` tokens is cut after the last whole character that fits, and only the bytes that
    were scored count; a row whose prompt fills ``max_length`` counts for nothing.

    The trunk runs on right-padded batches of rows of similar length; the head is applied to the
    scored positions alone, in chunks, with its logits in the model's dtype and the log-softmax in
    fp32. The result does not depend on ``batch_size`` beyond rounding.

    Args:
        model: a ``*ForCausalLM`` of transformers; its training mode is left as it was.
        tokenizer: its fast tokenizer.
        rows: mappings with ``prompt`` and ``completion``.
        batch_size: rows in a forward pass.
        max_length: tokens kept of each row.
        chat_template: render the prompt with the tokenizer's chat template where it has one
            (:func:`sra.chat.render_prompt`).

    Returns:
        bits per byte.

    Raises:
        KeyError: a row lacks ``prompt`` or ``completion``.
        ValueError: no byte of any completion could be scored.
    """
    scored = [_tokenise(tokenizer, row, max_length, chat_template) for row in rows]
    scored = sorted((row for row in scored if row.num_bytes), key=lambda row: len(row.input_ids))
    if not scored:
        raise ValueError(
            f"No completion to score: every row is empty or its prompt fills {max_length=} tokens. "
            "Raise max_length or check the rows' 'completion'."
        )
    training = model.training
    model.eval()
    try:
        nats = sum(
            _negative_log_likelihood(model, scored[start : start + batch_size])
            for start in range(0, len(scored), batch_size)
        )
    finally:
        model.train(training)
    return nats / math.log(2) / sum(row.num_bytes for row in scored)


def _tokenise(
    tokenizer: Any, row: Mapping[str, str], max_length: int, chat_template: bool
) -> ScoredRow:
    prefix = clean_text(render_prompt(tokenizer, row["prompt"], chat_template=chat_template))
    text = prefix + clean_text(row["completion"])
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    stop, text_end = len(ids), len(text)
    if stop > max_length:
        stop = max_length
        # Tokens that spell one character together stay together, or its bytes would count whole.
        while stop and offsets[stop - 1][1] > offsets[stop][0]:
            stop -= 1
        text_end = offsets[stop - 1][1] if stop else 0
    # The very first token has nothing before it that could predict it.
    first = next((i for i in range(1, stop) if offsets[i][0] >= len(prefix)), stop)
    if first == stop:
        return ScoredRow(ids[:stop], stop, 0)
    text_start = max(len(prefix), offsets[first - 1][1])
    return ScoredRow(ids[:stop], first, len(text[text_start:text_end].encode()))


def _negative_log_likelihood(model: Any, batch: list[ScoredRow]) -> float:
    length = max(len(row.input_ids) for row in batch)
    input_ids = torch.zeros(len(batch), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)
    for index, row in enumerate(batch):
        input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        attention_mask[index, : len(row.input_ids)] = 1
        predicts[index, row.first - 1 : len(row.input_ids) - 1] = True
    targets = input_ids.roll(-1, dims=1)[predicts].to(model.device)
    trunk = model.base_model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        use_cache=False,
    )
    hidden = trunk.last_hidden_state[predicts.to(model.device)]
    total = 0.0
    head = head_of(model)
    chunk = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    for rows, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total += F.cross_entropy(head.logits(rows), ids, reduction="sum").item()
    return total
