"""SRA as its authors run it, accidents included: an eager reference that is deliberately not ours.

The paper (arXiv 2605.01205) links no code. This follows a written description of the authors'
public repositories (how spans are found, which attention row is read, how sums are divided) and
copies nothing from them. `test_faithful.py` states where it differs from ours and by how much.
It runs in the dtype of the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.objective import plain  # registers the "exact" attention

MOST_BOUNDARIES = 1024
SMALLEST_MASS = 1e-5
WSL_OFF = 1e-5
"""The power that stands for "no weighted span loss": it makes all saliences nearly equal."""

Spans = list[tuple[int, int]]


def spans(
    student_ends: Sequence[int], teacher_ends: Sequence[int], student_start: int, teacher_start: int
) -> tuple[Spans, Spans]:
    """Token ranges of both sides, by a merge of the tokens' CHARACTER end offsets.

    Equal ends make a boundary and advance both sides, else the smaller end advances. Tokens of
    offset 0 (special tokens, padding) are passed over.
    """
    boundaries = [(student_start, teacher_start)]
    i, j = boundaries[0]
    while i < len(student_ends) and j < len(teacher_ends):
        if student_ends[i] == 0:
            i += 1
        elif teacher_ends[j] == 0:
            j += 1
        elif student_ends[i] == teacher_ends[j]:
            i, j = i + 1, j + 1
            boundaries.append((i, j))
        elif student_ends[i] < teacher_ends[j]:
            i += 1
        else:
            j += 1
    if len(boundaries) > MOST_BOUNDARIES:
        step = len(boundaries) / MOST_BOUNDARIES
        boundaries = [boundaries[int(k * step)] for k in range(MOST_BOUNDARIES)]
    student, teacher = zip(*boundaries, strict=True)
    return [*pairwise(student)], [*pairwise(teacher)]


def gather_index(batch: Sequence[Spans]) -> tuple[Tensor, Tensor]:
    """Token positions `[B, N, length]` of every span, padded with position 0, and their mask."""
    most = max(map(len, batch))
    longest = max((b - a for sample in batch for a, b in sample), default=0)
    index = torch.zeros(len(batch), most, longest, dtype=torch.int64)
    mask = torch.zeros_like(index, dtype=torch.bool)
    for row, sample in enumerate(batch):
        for column, (a, b) in enumerate(sample):
            index[row, column, : b - a] = torch.arange(a, b)
            mask[row, column, : b - a] = True
    return index, mask


def token_weights(attention: Tensor) -> Tensor:
    """`[B, T]` from `[B, H, T, T]`: the row of the last COLUMN of the batch, padding or not."""
    row = attention.sum(1)[:, -1]
    return (row / row.sum(-1, keepdim=True)).detach()


def centres(hidden: Tensor, weights: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of mass `[B, N, D]` and masses `[B, N, 1]`; the denominator is at least 1e-5."""
    samples = torch.arange(len(hidden))[:, None, None]
    held = weights[samples, index] * mask
    total = held.sum(-1, keepdim=True)
    weighted = (held[..., None] * hidden[samples, index]).sum(2)
    return weighted / total.clamp(min=SMALLEST_MASS), total


def salience(mass: Tensor, power: float) -> Tensor:
    """`[B, N]` from `[B, N, 1]`, with the authors' squeeze and without a guard against 0 / 0."""
    raised = mass.squeeze() ** power
    return raised / raised.sum(-1, keepdim=True)


def geometry(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Batch mean, from centres `[B, N, D]` and saliences `[B, N]`; 0 of a single span."""
    alike = [F.normalize(c, dim=-1) @ F.normalize(c, dim=-1).mT for c in (student, teacher)]
    pairs = weights.unsqueeze(2) * weights.unsqueeze(1)
    pairs = pairs * (1 - torch.eye(pairs.shape[-1], dtype=pairs.dtype))
    pairs = pairs / pairs.sum((1, 2), keepdim=True).clamp(min=1e-5)
    return (pairs * (alike[0] - alike[1]) ** 2).sum((1, 2)).mean()


def span_logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Forward KL of logits `[B, N, K]`, summed over spans, divided by the batch size.

    A span counts as padding if its logits are all 0.
    """
    present = student.abs().sum(-1) != 0
    target = (teacher / temperature).softmax(-1)
    log_ratio = (teacher / temperature).log_softmax(-1) - (student / temperature).log_softmax(-1)
    return ((target * log_ratio).sum(-1) * present).sum() / len(student)


def truncated_prompt(student_tokenizer: Any, prompt: str, limit: int) -> str:
    """The prompt that both models see: cut by the student's tokenizer, encoded and decoded."""
    return student_tokenizer.decode(student_tokenizer(prompt).input_ids[:limit])


@dataclass(frozen=True)
class Side:
    """A padded batch of one tokenizer."""

    input_ids: Tensor
    attention_mask: Tensor
    ends: list[list[int]]
    starts: list[int]
    """Tokens of the prompt, padding not counted."""


def encode(
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    max_length: int,
    padding_side: Literal["left", "right"] = "right",
) -> Side:
    """Prompt, line break, completion and the end token, padded with the end token."""
    ids, ends, starts = [], [], []
    for row in rows:
        prompt = row["prompt"] + "\n"
        starts.append(len(tokenizer(prompt, add_special_tokens=False).input_ids))
        encoding = tokenizer(
            prompt + row["completion"], add_special_tokens=False, return_offsets_mapping=True
        )
        ids.append([*encoding.input_ids, tokenizer.eos_token_id][:max_length])
        ends.append([*(end for _, end in encoding.offset_mapping), 0][:max_length])
    width = max(map(len, ids))

    def padded(sequences: list[list[int]], value: int) -> list[list[int]]:
        rows = [(row, [value] * (width - len(row))) for row in sequences]
        return [extra + row if padding_side == "left" else row + extra for row, extra in rows]

    return Side(
        torch.tensor(padded(ids, tokenizer.eos_token_id)),
        torch.tensor(padded([[1] * len(row) for row in ids], 0)),
        padded(ends, 0),
        starts,
    )


def run(model: Any, side: Side, states: Literal["post-norm", "pre-norm"]) -> tuple[Any, Tensor]:
    """The model's outputs; the last layer's states after, or by a hook before, the final norm."""
    usual, seen = model.config._attn_implementation, []
    last_block = model.base_model.layers[-1]
    hook = last_block.register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    model.set_attn_implementation("exact")
    out = model(
        input_ids=side.input_ids,
        attention_mask=side.attention_mask,
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    model.set_attn_implementation(usual)
    hook.remove()
    return out, seen[0] if states == "pre-norm" else out.hidden_states[-1]


def loss(
    student: Any,
    teacher: Any,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    projector: Tensor,
    *,
    alpha: float = 0.5,
    gamma: float = 50.0,
    power: float = 1.0,
    temperature: float = 2.0,
    max_length: int = 512,
    teacher_padding: Literal["left", "right"] = "right",
    student_states: Literal["post-norm", "pre-norm"] = "post-norm",
) -> dict[str, Tensor]:
    """The loss of a batch and its terms before their weights."""
    own_side = encode(student_tokenizer, rows, max_length)
    other_side = encode(teacher_tokenizer, rows, max_length, teacher_padding)
    out, hidden = run(student, own_side, student_states)
    with torch.no_grad():
        teacher_out, teacher_hidden = run(teacher, other_side, "post-norm")

    labels = own_side.input_ids.masked_fill(own_side.attention_mask == 0, -100)
    for label, start in zip(labels, own_side.starts, strict=True):
        label[:start] = -100
    ce = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    found = [
        *map(spans, own_side.ends, other_side.ends, own_side.starts, other_side.starts),
    ]
    own, _ = centres(
        hidden, token_weights(out.attentions[-1]), *gather_index([s for s, _ in found])
    )
    other, mass = centres(
        teacher_hidden,
        token_weights(teacher_out.attentions[-1]),
        *gather_index([t for _, t in found]),
    )
    weights = salience(mass, power)
    alike = F.cosine_similarity(own @ projector.mT, other, dim=-1)
    cosine = (weights * (1 - alike)).sum(-1).mean()
    shape = geometry(own, other, weights)

    heads = student.get_output_embeddings(), teacher.get_output_embeddings()
    s_ids, t_ids = plain.shared_ids(
        student_tokenizer, teacher_tokenizer, *(len(head.weight) for head in heads)
    )
    logit = span_logit_loss(
        heads[0](own)[..., s_ids], heads[1](other)[..., t_ids].detach(), temperature
    )
    total = alpha * ce + (1 - alpha) * (cosine + gamma * shape + logit)
    return {"loss": total, "ce": ce, "cosine": cosine, "geometry": shape, "logit": logit}
