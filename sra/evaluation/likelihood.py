"""How well a model predicts text, in a unit that does not depend on its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sra.chat import render
from sra.model import head_of
from sra.states import run_trunk

CHUNK_ELEMENTS = 1 << 25  # logits held at once: 128 MiB in fp32


class ScoredRow(NamedTuple):
    """One tokenised row: the tokens at the indices `scored` spell ``num_bytes`` bytes of it."""

    input_ids: list[int]
    scored: list[int]
    num_bytes: int


@torch.no_grad()
def bits_per_byte(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    chat_template: bool = True,
) -> float:
    """−log2 p(text), summed over what a model learns of the rows, for each UTF-8 byte of it.

    Lower is better. Dividing by bytes, not tokens, makes models with different tokenizers
    comparable: both are asked to predict the same text: of ``prompt`` and ``completion`` the
    completion, of ``messages`` what the assistant says (but no tool calls, which each template
    writes in its own way), of ``text`` all of it.

    A row is tokenised as one text, as in training. A token counts when it starts in that text and
    ends in it; a token that straddles its border does not, nor do its bytes, nor does a row's very
    first token, which nothing predicts. The end of a turn is not scored, because not every model
    has learned the same one. A row longer than ``max_length`` tokens is cut after the last whole
    character that fits, and only the bytes that were scored count; a row whose prompt fills
    ``max_length`` counts for nothing.

    The trunk runs on right-padded batches of rows of similar length; the head is applied to the
    scored positions alone, in chunks, with its logits in the model's dtype and the log-softmax in
    fp32. The result does not depend on ``batch_size`` beyond rounding.

    Args:
        model: a ``*ForCausalLM`` of transformers; its training mode is left as it was.
        tokenizer: its fast tokenizer.
        rows: of any kind that `sra.SpanCollator` takes.
        batch_size: rows in a forward pass.
        max_length: tokens kept of each row.
        chat_template: render rows with the tokenizer's chat template where it has one
            (:mod:`sra.chat`).

    Returns:
        bits per byte.

    Raises:
        KeyError: a row is of no known kind.
        ValueError: no byte of any row could be scored, or no rows in a batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
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


def scored_bytes(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_length: int = 512,
    chat_template: bool = True,
) -> int:
    """The bytes that `bits_per_byte` divides by: fewer for a model that needs more tokens, where
    rows are longer than ``max_length``."""
    return sum(_tokenise(tokenizer, row, max_length, chat_template).num_bytes for row in rows)


def _tokenise(
    tokenizer: Any, row: Mapping[str, Any], max_length: int, chat_template: bool
) -> ScoredRow:
    text, pieces, _ = render(tokenizer, row, chat_template=chat_template)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    stop = len(ids)
    if stop > max_length:
        stop = max_length
        # Tokens that spell one character together stay together, or its bytes would count whole.
        while stop and offsets[stop - 1][1] > offsets[stop][0]:
            stop -= 1
    scored: list[int] = []
    num_bytes = 0
    for match in (match for piece in pieces for match in piece.matches):
        start, end = match.at, match.at + match.end - match.start
        # The very first token has nothing before it that could predict it. Offsets may leave out
        # the space in front of a word, so a space alone may have no width: it belongs to what ends
        # there.
        inside = [
            i for i in range(1, stop) if start <= offsets[i][0] and start < offsets[i][1] <= end
        ]
        if inside:
            first = max(start, offsets[inside[0] - 1][1])
            num_bytes += len(text[first : offsets[inside[-1]][1]].encode())
            scored += inside
    return ScoredRow(ids[:stop], scored, num_bytes)


def _negative_log_likelihood(model: Any, batch: list[ScoredRow]) -> float:
    length = max(len(row.input_ids) for row in batch)
    input_ids = torch.zeros(len(batch), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)
    for index, row in enumerate(batch):
        input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        attention_mask[index, : len(row.input_ids)] = 1
        predicts[index, [i - 1 for i in row.scored]] = True
    targets = input_ids.roll(-1, dims=1)[predicts].to(model.device)
    trunk = run_trunk(
        model,
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        use_cache=False,
    )
    hidden = trunk.last_hidden_state[predicts.to(model.device)]
    total = 0.0
    head = head_of(model)
    chunk = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total += F.cross_entropy(head.logits(states), ids, reduction="sum").item()
    return total
