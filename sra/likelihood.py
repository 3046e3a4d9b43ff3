"""How likely each side finds the text of a span: the term of ALM (arXiv 2503.20083, section 3).

It needs no shared vocabulary: both sides have a probability for the text that is there, whatever
the tokens that they spell it with.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sra.side import Side, rows_of
from sra_kernels import span_com

ROWS = 256  # whose logits are held at once


def span_likelihood(student: Side, teacher: Side, temperature: float) -> Tensor:
    """Sum over spans of tau * KL(Bernoulli(p_teacher) || Bernoulli(p_student)), fp32 or wider.

    p = exp(l / tau), l being the sum of log p(token | what is before) over the span's tokens. The
    paper has no factor tau, so that its gradient vanishes with the temperature that it recommends
    (100); with it, the gradient in l tends to l_teacher / l_student - 1. Subtracting the teacher's
    own entropy makes the least value 0. Spans that hold a sequence's first token, which nothing
    predicts, are left out. Gradient to the student alone.
    """
    spans = student.spans, teacher.spans
    known = [
        ~_holds(side.first, part) for side, part in zip((student, teacher), spans, strict=True)
    ]
    keep = known[0] & known[1]
    own = span_log_likelihood(student, spans[0][keep])
    with torch.no_grad():
        other = span_log_likelihood(teacher, spans[1][keep]).to(own.dtype)
    return temperature * _bernoulli_kl(other / temperature, own / temperature).sum()


def span_log_likelihood(side: Side, spans: Tensor) -> Tensor:
    """``[S]``, log p of the tokens of each span after what is before them, in nats."""
    lengths = spans[:, 1] - spans[:, 0]
    ends = lengths.cumsum(0)
    _, rows = rows_of(spans)
    states, targets = side.hidden[rows - 1], side.ids[rows]

    def score(states: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(side.head.logits(states), targets, reduction="none")

    parts = [
        checkpoint(score, *part, use_reentrant=False)
        for part in zip(states.split(ROWS), targets.split(ROWS), strict=True)
    ]
    tokens = torch.cat(parts) if parts else states.new_zeros(0)
    # The mean of each span's tokens, times their number.
    inside = torch.stack([ends - lengths, ends], dim=1)
    mean, _ = span_com(tokens[:, None], inside, torch.ones_like(tokens))
    return mean[:, 0] * lengths


def _holds(marked: Tensor, spans: Tensor) -> Tensor:
    """Which spans hold a marked row."""
    before = F.pad(marked.long().cumsum(0), (1, 0))
    return before[spans[:, 1]] > before[spans[:, 0]]


def _bernoulli_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of two coins from the logarithms of their probabilities."""
    least = -torch.finfo(log_q.dtype).eps  # a certain text: log(1 - p) must stay finite
    log_p, log_q = log_p.clamp(max=least), log_q.clamp(max=least)
    rest_p, rest_q = _log_rest(log_p), _log_rest(log_q)
    return log_p.exp() * (log_p - log_q) + rest_p.exp() * (rest_p - rest_q)


def _log_rest(log_p: Tensor) -> Tensor:
    """log(1 - p) without cancellation at either end."""
    near_one = log_p > -math.log(2)
    small = torch.where(near_one, log_p, -1.0)
    return torch.where(near_one, (-torch.expm1(small)).log(), torch.log1p(-log_p.exp()))
