"""What one pair of entries adds to the divergence, for the Triton kernel; on tiles or on scalars.

r is the student's log-probability less the teacher's. A divergence is Σ p φ(log q − log p) with
φ(x) = eˣ − 1 − x, and near 0 its terms are series: nothing cancels where the two sides agree.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORWARD, REVERSE, JSD = [tl.constexpr(i) for i in range(3)]

# Stands for the logarithm of 0 where it is multiplied with a probability 0.
NOTHING = tl.constexpr(-1e30)


@triton.jit
def _exp_excess(x):
    """φ(x) for |x| < 1/2."""
    if x.dtype == tl.float64:  # Taylor; the term of degree 18 is below 2^-53 of the sum
        p = x / 18.0 + 1.0
        for i in tl.static_range(15):
            p = p / (17 - i) * x + 1.0
        p = p * 0.5
    else:
        p = x * 2.4841679591e-5 + 1.9961957803e-4
        p = p * x + 1.3889040150e-3
        p = p * x + 8.3331827542e-3
        p = p * x + 4.1666664310e-2
        p = p * x + 1.6666667135e-1
        p = p * x + 5.0000000004e-1
    return p * x * x


@triton.jit
def _expm1(x):
    near = tl.abs(x) < 0.5
    close = tl.where(near, x, 0.0)
    return tl.where(near, close + _exp_excess(close), tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    excess = _expm1(tl.minimum(2.0 * tl.abs(x), 40.0))  # 1 to the last bit from there
    y = excess / (excess + 2.0)
    return tl.where(x < 0, -y, tl.where(x == x, y, x))


@triton.jit
def _log1p(u):
    """log(1 + u) for u > −1; near 0 by 2 artanh(s) = 2 (s + s³/3 + s⁵/5 …), s = u / (2 + u)."""
    near = tl.abs(u) < 0.3
    close = tl.where(near, u, 0.0)
    s = close / (2.0 + close)
    square = s * s
    terms: tl.constexpr = 11 if u.dtype == tl.float64 else 5
    series = tl.zeros_like(square)
    for i in tl.static_range(terms):
        series = series * square + 2.0 / (2 * (terms - i) + 1)
    return tl.where(near, 2.0 * s + s * square * series, tl.log(1.0 + u))


@triton.jit
def _divergence(p, q, r, excess):
    """p φ(r), r = log q − log p; q where p is 0. `excess` is φ(r) for |r| < 1/2."""
    far = (q - p) - p * r
    return tl.where(p == 0, q, tl.where(tl.abs(r) < 0.5, p * excess, far))


@triton.jit
def log_ratio(student, teacher, DIRECTION: tl.constexpr):
    """The difference of two logarithms: whichever side the divergence averages over is finite."""
    if DIRECTION != FORWARD:
        student = tl.where(student < NOTHING, NOTHING, student)
    if DIRECTION != REVERSE:
        teacher = tl.where(teacher < NOTHING, NOTHING, teacher)
    return student - teacher


@triton.jit
def term_and_slope(p_s, p_t, r, beta, DIRECTION: tl.constexpr):
    """The term, and the slope: the derivative by the student's logit is p_s (slope − Σ p_s slope);
    but "forward" has the derivative itself, p_s − p_t, for slope."""
    near = tl.abs(r) < 0.5
    close = tl.where(near, r, 0.0)
    if DIRECTION == FORWARD:
        excess = _exp_excess(close)
        term = _divergence(p_t, p_s, r, excess)
        # By the ratio, equal sides give 0 even where products are fused into the difference.
        slope = tl.where(near & (p_t != 0), p_t * (close + excess), p_s - p_t)
    elif DIRECTION == REVERSE:
        term = _divergence(p_s, p_t, -r, _exp_excess(-close))
        slope = tl.where(p_s == 0, 0.0, r)
    else:
        # log(m/s) and log(m/t), m the mixture: from that of the likelier side, which is small.
        likelier = r >= 0
        share = tl.where(likelier, beta, 1.0 - beta)
        over = _log1p(share * _expm1(-tl.abs(r)))
        over_s = tl.where(likelier, over, over - r)
        over_t = tl.where(likelier, over + r, over)
        near_s = p_s * _exp_excess(tl.where(near, over_s, 0.0))
        near_t = p_t * _exp_excess(tl.where(near, over_t, 0.0))
        term_s = tl.where(near, near_s, beta * (p_t - p_s) - p_s * over_s)
        term_t = tl.where(near, near_t, (1.0 - beta) * (p_s - p_t) - p_t * over_t)
        term = beta * term_t + (1.0 - beta) * term_s
        slope = (beta - 1.0) * over_s
    return term, slope
