"""The whole SRA loss in plain PyTorch: as its authors lay it out, and as well as we can write it.

Both compute the loss that ours computes, query of the last real token and true masses included; the
authors' code differs there (docs/method.md), which costs nothing and would make values differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import compiled, differentiated
from benchmarks.registry import Job
from sra.objective import recipe
from sra_kernels.linear_span_kl.chunks import product_dtype

if TYPE_CHECKING:
    from benchmarks.sra_loss import Inputs, Side

PAPER = recipe("paper")


def authors(x: Inputs) -> Job:
    """The authors' data layout: the last layer's whole attention matrix, spans padded to the most
    and longest of the batch, logits of both whole vocabularies, then the shared entries of them."""
    product = product_dtype(x.student.head)  # as ours multiplies
    indices = [_padded_index(side.spans) for side in (x.student, x.teacher)]
    present = indices[0][1].any(-1)

    def loss() -> Tensor:
        own, _ = _padded_centres(x.student, *indices[0])
        other, mass = _padded_centres(x.teacher, *indices[1])
        salience = mass**PAPER.power
        salience = salience / salience.sum(-1, keepdim=True)
        alike = F.cosine_similarity(F.linear(own, x.projector), other, dim=-1)
        cosine = (salience * (1 - alike)).sum()

        shapes = [F.normalize(c, dim=-1) @ F.normalize(c, dim=-1).mT for c in (own, other)]
        pairs = salience[:, :, None] * salience[:, None]
        pairs = pairs * (1 - torch.eye(pairs.shape[-1]))
        pairs = pairs / pairs.sum((1, 2), keepdim=True)
        geometry = (pairs * (shapes[0] - shapes[1]) ** 2).sum()

        student_logits = F.linear(own.to(product), x.student.head.to(product))[..., x.student.ids]
        with torch.no_grad():
            every = F.linear(other.to(product), x.teacher.head.to(product))
            teacher_logits = every[..., x.teacher.ids]
            del every
            target = (teacher_logits / PAPER.temperature).softmax(-1, dtype=torch.float32)
        log_q = (student_logits / PAPER.temperature).log_softmax(-1, dtype=torch.float32)
        log_p = (teacher_logits / PAPER.temperature).log_softmax(-1, dtype=torch.float32)
        logit = ((target * (log_p - log_q)).sum(-1) * present).sum()
        return _weighted(cosine, geometry, logit, len(own))

    return differentiated(loss, leaves=x.leaves)


def _padded_index(spans: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token positions ``[B, N, length]`` of every span, padded with position 0, and their mask."""
    longest = max(int((s[:, 1] - s[:, 0]).max()) for s in spans)
    index = torch.zeros(len(spans), max(map(len, spans)), longest, dtype=torch.int64)
    mask = torch.zeros_like(index, dtype=torch.bool)
    for i, ranges in enumerate(spans):
        position = ranges[:, :1] + torch.arange(longest)
        mask[i, : len(ranges)] = position < ranges[:, 1:]
        index[i, : len(ranges)] = position
    return index * mask, mask


def _padded_centres(side: Side, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centres ``[B, N, D]`` and masses ``[B, N]`` through ``[B, N, length, D]``."""
    samples = torch.arange(len(index))
    row = _whole_attention(side).sum(1)[samples, side.last]
    weights = row / row.sum(-1, keepdim=True)
    held = weights[samples[:, None, None], index] * mask
    mass = held.sum(-1)
    share = held / mass.masked_fill(mass == 0, 1)[..., None]
    states = side.hidden[samples[:, None, None], index]
    return (share[..., None].to(states.dtype) * states).sum(2), mass


@torch.no_grad()
def _whole_attention(side: Side) -> Tensor:
    """``[B, H, T, T]``, what `output_attentions` hands out, in float32."""
    tokens = side.key.shape[2]
    key = side.key.repeat_interleave(side.query.shape[1] // side.key.shape[1], 1)
    scores = side.query @ key.mT * side.scale
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    bias = torch.zeros(len(scores), 1, tokens, tokens, dtype=scores.dtype)
    bias.masked_fill_(~(causal & side.visible[:, None, None]), torch.finfo(scores.dtype).min)
    return (scores + bias).softmax(-1, dtype=torch.float32)


def _flat(x: Inputs) -> Callable[[], Tensor]:
    """The best plain PyTorch that we know how to write: one attention row, spans by a flat index,
    the shared rows of each head gathered once, geometry sample by sample, nothing padded."""
    owners = [_owner(side) for side in (x.student, x.teacher)]
    product = product_dtype(x.student.head)  # as ours multiplies
    counts = [len(spans) for spans in x.student.spans]

    def loss() -> Tensor:
        own, _ = _flat_centres(x.student, *owners[0])
        other, mass = _flat_centres(x.teacher, *owners[1])
        cosines = F.cosine_similarity(F.linear(own, x.projector), other, dim=-1)
        units = [F.normalize(c, dim=-1).split(counts) for c in (own, other)]
        cosine = geometry = own.new_zeros((), dtype=torch.float32)
        for a, b, alike, part in zip(
            *units, cosines.split(counts), mass.split(counts), strict=True
        ):
            raised = part**PAPER.power
            salience = raised / raised.sum()
            cosine = cosine + (salience * (1 - alike)).sum()
            # The diagonals are equal, so they only enter the sum of weights.
            gap = (a @ a.T - b @ b.T).square()
            pairs = 1 - salience.square().sum()
            geometry = geometry + salience @ (gap.to(salience.dtype) @ salience) / pairs
        own_rows = x.student.head.index_select(0, x.student.ids).to(product)
        with torch.no_grad():
            rows = x.teacher.head.index_select(0, x.teacher.ids).to(product)
            log_p = F.linear(other.to(product), rows).float().div_(PAPER.temperature)
            log_p = log_p.log_softmax(-1)
            p = log_p.exp()
            entropy = (p * log_p).sum()
        log_q = (F.linear(own.to(product), own_rows).float() / PAPER.temperature).log_softmax(-1)
        logit = entropy - (p * log_q).sum()
        return _weighted(cosine, geometry, logit, len(counts))

    return loss


def eager(x: Inputs) -> Job:
    return differentiated(_flat(x), leaves=x.leaves)


def compiled_eager(x: Inputs) -> Job:
    return differentiated(compiled(_flat(x)), leaves=x.leaves)


def _owner(side: Side) -> tuple[Tensor, Tensor]:
    """The flattened rows that lie in spans, and each one's span."""
    lengths = side.flat_spans[:, 1] - side.flat_spans[:, 0]
    rows = [torch.arange(a, b) for a, b in side.flat_spans.tolist()]
    return torch.cat(rows), torch.repeat_interleave(lengths)


def _flat_centres(side: Side, rows: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    weights = _one_row(side).flatten()[rows]
    spans = len(side.flat_spans)
    mass = weights.new_zeros(spans).index_add(0, owner, weights)
    share = weights / mass[owner]
    states = side.hidden.flatten(0, 1).index_select(0, rows)
    centres = torch.zeros(spans, states.shape[1])
    centres = centres.index_add(0, owner, states.float() * share[:, None])
    return centres.to(states.dtype), mass


@torch.no_grad()
def _one_row(side: Side) -> Tensor:
    """``[B, T]``: the attention row of the last real token, keys not repeated for their heads."""
    batch, heads, _, dim = side.query.shape
    groups = side.key.shape[1]
    query = side.query[torch.arange(batch), :, side.last]
    query = query.view(batch, groups, heads // groups, dim).float() * side.scale
    scores = query @ side.key.float().mT
    scores = scores.masked_fill(~side.visible[:, None, None], -torch.inf)
    return scores.softmax(-1).mean((1, 2))


def _weighted(cosine: Tensor, geometry: Tensor, logit: Tensor, batch: int) -> Tensor:
    total = PAPER.cosine * cosine + PAPER.gamma * geometry + PAPER.logit * logit
    return (1 - PAPER.alpha) * total / batch
