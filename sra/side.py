"""One model's part of a batch, with the tokens that it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sra.model import Head, causal_lm


class Side(NamedTuple):
    """One model's part of a batch, the rows of all sequences one behind the other.

    hidden: ``[N, D]`` post-final-norm states; row i predicts the token of row i + 1.
    ids: ``[N]`` tokens.
    first: ``[N]`` bool, the tokens that begin a sequence, which nothing predicts, and padding.
    spans: ``[S, 2]`` half-open row ranges, in order.
    head: the output layer.
    model: where `embedding_of` finds what its input tokens become.
    """

    hidden: Tensor
    ids: Tensor
    first: Tensor
    spans: Tensor
    head: Head
    model: Any


def side_of(
    model: Any, hidden: Tensor, head: Head, batch: Mapping[str, Tensor | None], spans: Tensor
) -> Side:
    """A side of a batch, padded or not, whose states are ``[N, D]``."""
    ids = cast(Tensor, batch["input_ids"])
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        first = ~mask.bool() | (mask.cumsum(dim=1) == 1)
    elif positions is not None:
        first = positions == 0
    else:
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 0] = True
    return Side(hidden, ids.flatten(), first.flatten(), spans, head, model)


def rows_of(spans: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all spans ``[S, 2]``, one span behind the other: the number of the span that each
    is in, and the row."""
    lengths = spans[:, 1] - spans[:, 0]
    owner = torch.repeat_interleave(torch.arange(len(spans), device=spans.device), lengths)
    before = lengths.cumsum(0) - lengths
    return owner, torch.arange(len(owner), device=spans.device) + (spans[:, 0] - before)[owner]


def embedding_of(model: Any) -> Tensor:
    """``[V, E]``, what the input tokens of a model, or of a teacher in memory, become.

    Raises:
        TypeError: the teacher is on disk, which keeps no embeddings.
    """
    model = causal_lm(model) if isinstance(model, nn.Module) else model
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            "This method reads the teacher's input embeddings, which a cache on disk does not "
            "hold. Pass the model itself, or TeacherCache(model)."
        )
    return model.get_input_embeddings().weight
