"""A teacher's predictions, spelt in the student's tokens.

Where both tokenizers end a token, the teacher predicts what follows, in tokens of its own. The
student's tokenizer spells the text of each of them, so they say how likely each of the student's
tokens is there: as likely as all whose spelling begins with it; and behind that token, which is
next. Nothing has to be shared, and what the student predicts inside one of the teacher's tokens has
a target too. (BPM, arXiv 2607.22334, gives the probability of a teacher's token to the longest
token of the student that is a prefix of its bytes.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sra.chunks import sum_by_chunks
from sra.data import IGNORED
from sra.model import Head
from sra.side import Side, rows_of
from sra.spelling import DEPTH, Trie
from sra_kernels import span_com, span_kl


class Labels(NamedTuple):
    """What cross-entropy is formed of.

    ids: ``[N]``, of the token behind each row; `IGNORED` where there is none.
    weight: of its sum, beside the sum of the divergences.
    """

    ids: Tensor
    weight: Tensor | float


class Respelled(NamedTuple):
    """What `respelled_kl` gives, fp32 or wider.

    shared: times the number of spans, the mean of the weights where both sides end a token.
    cross_entropy: sum over the labels, without gradient: `kl` has it.
    """

    kl: Tensor
    shared: Tensor
    cross_entropy: Tensor


def respelled_kl(
    student: Side,
    teacher: Side,
    offsets: Tensor,
    spelt: Trie | None,
    temperature: float,
    labels: Labels | None = None,
) -> Respelled:
    """Sum over `places` of weight * KL(teacher, respelt || student), and over the other tokens in
    spans of -log p(token).

    The weight, a constant, is the probability of what has a spelling and goes on behind what the
    student has said; inside that, the target sums to 1. The student's softmax is over its whole
    head: without the other tokens, of which the teacher says nothing, it would learn that there
    are none. Gradient to the student's states, head and bias, formed in the forward pass; linear
    in what comes from above. Same input, same bits.

    Cross-entropy needs the same logits, which are most of a step's work beside the layers': with
    `labels` they are formed once for both, and the gradient of `kl` is that of
    kl + labels.weight * cross_entropy.

    Args:
        offsets: ``[B + 1]``, the spans of each sequence.
        spelt: how the student spells the teacher's vocabulary; None if they are one.
    """
    at = places(student, teacher, offsets, spelt)
    _, inside = rows_of(student.spans)
    inside = inside[~student.first[inside]] - 1
    untold = inside[~torch.isin(inside, at.rows)]
    if labels is None:
        labels = Labels(torch.full_like(student.ids, IGNORED), 0.0)
    labelled = (labels.ids != IGNORED).nonzero().flatten()
    more = torch.cat([untold, labelled[~torch.isin(labelled, at.rows)]]).unique()
    rows = torch.cat([at.rows, more])
    alone, known = torch.isin(rows, untold), labels.ids[rows] != IGNORED
    targets = torch.where(alone, student.ids[(rows + 1) % len(student.ids)], labels.ids[rows])
    kls, weights, losses = [], [], []

    def divergence(states: Tensor, head: Head, part: slice) -> Tensor:
        here = Places(*(x[part] for x in at))
        logits = head.logits(states)
        kl, weight = respelled_kl_of_logits(
            logits[: len(here.rows)], teacher_logits, here, spelt, temperature
        )
        loss = F.cross_entropy(logits, targets[part], reduction="none", ignore_index=IGNORED)
        told = kl.sum() + torch.where(alone[part], loss, 0).sum()
        own = torch.where(known[part], loss, 0).sum()
        kls.append(told.detach())
        weights.append(weight)
        losses.append(own.detach())
        return told + labels.weight * own

    def teacher_logits(rows: Tensor) -> Tensor:
        return teacher.head.logits(teacher.hidden[rows])

    total = sum_by_chunks(divergence, student.hidden[rows], student.head)
    if not len(rows):
        return Respelled(total, total.detach(), total.detach())
    known_weights = torch.cat(weights)
    return Respelled(
        torch.stack(kls).sum() + (total - total.detach()),
        known_weights.sum() / max(len(known_weights), 1) * len(student.spans),
        torch.stack(losses).sum(),
    )


def respelled_kl_of_logits(
    student_logits: Tensor,
    teacher_logits: Callable[[Tensor], Tensor],
    at: Places,
    spelt: Trie | None,
    temperature: float,
    vocab: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """weight * KL of each place, ``[P]``; and the weights where both sides end a token.

    student_logits: ``[P, Vs]``.
    teacher_logits: makes ``[U, Vt]`` of so many of its rows, in float32 or wider.
    vocab: see `span_kl`.
    """
    with torch.no_grad():
        target, weight = targets(teacher_logits, at, spelt, temperature, student_logits.shape[1])
        said = target.log_().mul_(temperature)
    kl = span_kl(student_logits, said, temperature=temperature, direction="forward", vocab=vocab)
    return weight * kl, weight[at.nodes == 0]


class Places(NamedTuple):
    """Where the student predicts something for which the teacher has a target; each ``[P]``.

    rows, others: of the states of student and teacher.
    nodes: what the student has said already of the teacher's next token; 0: nothing.
    """

    rows: Tensor
    others: Tensor
    nodes: Tensor


def places(student: Side, teacher: Side, offsets: Tensor, spelt: Trie | None) -> Places:
    """Those in spans, and what follows a span that no other follows: the end of a turn, or text
    that no span holds."""
    known = ~(student.first[student.spans[:, 0]] | teacher.first[teacher.spans[:, 0]])
    own, other = student.spans[known], teacher.spans[known]
    alone = student.spans[:-1, 1] != student.spans[1:, 0]
    alone |= teacher.spans[:-1, 1] != teacher.spans[1:, 0]
    alone = torch.cat([alone, alone.new_ones(min(len(known), 1))])
    alone[offsets[1:][offsets.diff() > 0].to(known.device) - 1] = True
    last = alone.nonzero().flatten()
    ends = Places(student.spans[last, 1] - 1, teacher.spans[last, 1] - 1, torch.zeros_like(last))
    if spelt is None:
        starts = Places(own[:, 0] - 1, other[:, 0] - 1, torch.zeros_like(own[:, 0]))
        return in_order([starts, ends])
    return in_order([*in_spans(student.ids, teacher.ids, own, other, spelt), ends])


def in_spans(
    student_ids: Tensor, teacher_ids: Tensor, own: Tensor, other: Tensor, spelt: Trie
) -> list[Places]:
    """The starts of spans ``[S, 2]``, and what goes on inside them, for as long as the student
    spells the first of the teacher's tokens there.

    Where the student's token is not of that spelling, it reaches beyond the teacher's, whose
    probability is not its own: in Chinese, two thirds of Qwen's tokens beside SmolLM2's, with those
    behind them in a span.
    """
    row, stop, at, node = own[:, 0] - 1, own[:, 1] - 1, other[:, 0] - 1, torch.zeros_like(own[:, 0])
    rank = spelt.rank[teacher_ids[other[:, 0]]]
    found = []
    for _ in range(DEPTH):
        child, there = spelt.child(node, student_ids[row + 1])
        low, high = spelt.ranges[child].unbind(1)
        there &= (low <= rank) & (rank < high)
        row, stop, at, node, rank, child = (x[there] for x in (row, stop, at, node, rank, child))
        found.append(Places(row, at, node))
        row, node = row + 1, child + 1
        there = row < stop
        row, stop, at, node, rank = (x[there] for x in (row, stop, at, node, rank))
        if not len(row):
            break
    return found


def in_order(found: Sequence[Places]) -> Places:
    """In the order of the text, so that those of one state of the teacher are neighbours."""
    every = Places(*(torch.cat(x) for x in zip(*found, strict=True)))
    order = every.rows.argsort()
    return Places(*(x[order] for x in every))


def targets(
    logits: Callable[[Tensor], Tensor],
    at: Places,
    spelt: Trie | None,
    temperature: float,
    size: int,
) -> tuple[Tensor, Tensor]:
    """``[P, size]``, probabilities of the student's tokens up to a factor; and weights ``[P]``."""
    others, which = at.others.unique_consecutive(return_inverse=True)
    chances = logits(others).div_(temperature).softmax(dim=-1)
    if spelt is None:
        return chances[which], chances.new_ones(len(which))
    begin_with = by_first_token if chances.device.type == "cpu" else by_spans_of_entries
    target = begin_with(chances, spelt, size)[which]
    weight = target.sum(dim=1)
    inside = at.nodes.nonzero().flatten()
    if len(inside):
        nodes = at.nodes[inside]
        place, child = rows_of(torch.stack([spelt.first[nodes], spelt.first[nodes + 1]], dim=1))
        ranges = torch.cat([spelt.ranges[nodes - 1], spelt.ranges[child]])
        owner, entry = rows_of(ranges)
        row = which[inside][torch.cat([torch.arange(len(nodes), device=place.device), place])]
        ends = (ranges[:, 1] - ranges[:, 0]).cumsum(0)
        spans = torch.stack([ends - ranges[:, 1] + ranges[:, 0], ends], dim=1)
        sums = _span_sums(chances[row[owner], spelt.entries[entry]][:, None], spans)[:, 0]
        whole, parts = sums.split([len(nodes), len(place)])
        target[inside] = 0
        target[inside[place], spelt.tokens[child]] = parts
        tiny = torch.finfo(whole.dtype).tiny
        weight[inside] = target[inside].sum(dim=1) / whole.clamp(min=tiny)
    return target, weight


def by_first_token(chances: Tensor, spelt: Trie, size: int) -> Tensor:
    """``[U, size]``, the probability ``[U, Vt]`` of all entries that begin with each token."""
    known = min(chances.shape[1], len(spelt.begins))  # heads have more rows than there are tokens
    begins = spelt.begins[:known]
    sums = chances.new_zeros(len(chances), size + 1)
    sums.index_add_(1, torch.where(begins < 0, size, begins), chances[:, :known])
    return sums[:, :size]


def by_spans_of_entries(chances: Tensor, spelt: Trie, size: int) -> Tensor:
    """The same without atomics, for GPUs: transposed and in the order of their spellings, entries
    that begin alike are a span of rows."""
    top = spelt.first[1]
    sums = chances.new_zeros(len(chances), size)
    sums[:, spelt.tokens[:top]] = _span_sums(chances.T[spelt.entries], spelt.ranges[:top]).T
    return sums


def _span_sums(values: Tensor, spans: Tensor) -> Tensor:
    """The sum of each span of rows."""
    mean, _ = span_com(values, spans)
    return mean * (spans[:, 1] - spans[:, 0])[:, None]
