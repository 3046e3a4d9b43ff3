"""attention_mass: how much attention each key receives, without the attention matrix."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sra_kernels import backend, check, library
from sra_kernels.attention_mass import reference


def attention_mass(
    query: Tensor,
    key: Tensor,
    *,
    query_index: Tensor | None = None,
    scale: float,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    lse: Tensor | None = None,
    lse_base: Literal["e", "2"] | None = None,
) -> Tensor:
    r"""Attention that each key receives, summed over heads (SRA, arXiv 2605.01205, token weights).

    .. math:: w_j = \frac{1}{Z} \sum_h \sum_i \mathrm{softmax}_j\big(\mathrm{softcap}(
        \mathrm{scale} \cdot q_{h,i} \cdot k_{h,j})\big)

    over the visible keys j, with Z such that a sample's masses sum to 1.

    Args:
        query: ``[B, Hq, Tq, d]`` float32, bfloat16, float16 or float64, rotary embedding applied.
        key: ``[B, Hkv, T, d]`` in the same dtype, ``Hq`` a multiple of ``Hkv`` (query head h reads
            key head ``h // (Hq / Hkv)``), ``Tq <= T``. Any strides.
        query_index: ``[B]`` integers, the one row of ``query`` that counts in each sample: for a
            causal model the last real token (SRA). None sums over all rows, leaving out those whose
            own position is masked.
        scale: the factor on the scores, usually ``d ** -0.5``.
        key_mask: ``[B, T]`` bool, True for a real key; None when all are.
        softcap: c in ``c * tanh(score / c)`` (Gemma-2's ``attn_logit_softcapping``), or None.
        window: a sliding window: a row sees its own key and the ``window - 1`` before it. Or None.
        lse: ``[B, Hq, Tq]`` float32 (float64 for float64 inputs), each row's log-sum-exp of the
            visible scores, scaled and capped, as an attention kernel returns it: the scores need
            not be kept until their sum is known. For all rows only. None computes it.
        lse_base: of the logarithm in ``lse``, which every ``lse`` comes with: ``"e"``
            (FlashAttention, FlexAttention) or ``"2"`` (FlashInfer, Triton's tutorial).

    Query row i stands at key position ``i + T - Tq``, and sees no later key.

    Returns:
        ``[B, T]`` float32 (float64 for float64 inputs). Masked keys get 0; a sample in which
        nothing is visible gets zeros.

    No gradient: inputs that require grad are fine, and the result is detached. Scores and sums are
    float32 whatever the inputs. Same input, same bits.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; a ``query_index`` out of range, or
            together with ``lse``; an ``lse`` without its base.

    Cost: one row reads the keys once, 2·B·Hq·T·d flops; all rows 2·B·Hq·Tq·T·d (half of that when
    causal), with a tile of query rows in memory at a time, never a T×T tensor.

    >>> weights = attention_mass(q, k, query_index=mask.sum(1) - 1, scale=64**-0.5, key_mask=mask)
    """
    check.floating("query", query, 4)
    check.floating("key", key, 4)
    check.same_dtype("key", key, "query", query)
    check.same_device("key", key, "query", query)
    batch, heads, queries, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(
            f"query has shape {[*query.shape]} and key {[*key.shape]}: batch and head sizes must "
            "agree. Both are [batch, heads, tokens, head size]."
        )
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"query has {heads} heads and key {key.shape[1]}: the number of query heads must be a "
            "multiple of the number of key heads."
        )
    if queries > key.shape[2]:
        raise ValueError(
            f"query has {queries} rows and key only {key.shape[2]}: each query row has a key of "
            "its own. Pass the whole sequence's keys, cached ones included."
        )
    if query_index is not None:
        check.integers("query_index", query_index, (batch,))
        check.same_device("query_index", query_index, "query", query)
        query_index = query_index.long()
    if key_mask is not None:
        if key_mask.dtype != torch.bool or key_mask.shape != (batch, key.shape[2]):
            raise TypeError(
                f"key_mask is {key_mask.dtype} {[*key_mask.shape]}; it must be torch.bool "
                f"{[batch, key.shape[2]]}, True for real keys. Pass attention_mask.bool()."
            )
        check.same_device("key_mask", key_mask, "query", query)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}; None for no cap.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}; None for no window.")
    if lse is not None:
        wide = check.accumulator(query.dtype)
        if query_index is not None:
            raise ValueError("lse goes with all rows of query: leave out query_index or lse.")
        if lse.dtype != wide or lse.shape != query.shape[:3]:
            raise TypeError(
                f"lse is {lse.dtype} {[*lse.shape]}; it must be {wide} {[*query.shape[:3]]}: "
                "batch, query heads, query rows."
            )
        check.same_device("lse", lse, "query", query)
        if lse_base not in ("e", "2"):
            raise ValueError(
                f"lse_base must say which logarithm lse is, 'e' or '2', not {lse_base!r}: the "
                "wrong one gives other masses, not an error."
            )
        lse = lse.detach() if lse_base == "e" else lse.detach() * math.log(2)
    elif lse_base is not None:
        raise ValueError("lse_base belongs to lse; without it, leave it out.")
    run = reference.attention_mass
    if backend.current() != "reference":
        run = library.ops.attention_mass_forward
    return run(query.detach(), key.detach(), query_index, scale, key_mask, softcap, window, lse)


__all__ = ["attention_mass"]
