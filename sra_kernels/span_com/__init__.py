"""span_com: the centre of mass of each span, an attention-weighted mean of its hidden states."""

from __future__ import annotations

from torch import Tensor

from sra_kernels import backend, check
from sra_kernels.span_com import reference
from sra_kernels.span_com.autograd import SpanCom


def span_com(hidden: Tensor, spans: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Centre of mass and mass of each span (SRA, arXiv 2605.01205, span representation).

    .. math:: C_i = \frac{\sum_{t \in i} w_t h_t}{m_i}, \qquad m_i = \sum_{t \in i} w_t

    Args:
        hidden: ``[N, D]`` rows, float32, bfloat16, float16 or float64. Rows are read in place at
            any distance from one another. One whose columns are not adjacent, as no model makes
            it, is copied first: that costs 12 times the sum itself (measured, 8,192 x 2,048).
        spans: ``[S, 2]`` int32 or int64, half-open row ranges, both columns non-decreasing. Spans
            may touch, leave gaps, overlap, or be empty.
        weights: ``[N]`` finite and not negative, or None for the plain mean. Need not sum to 1.

    Returns:
        ``com [S, D]`` in the dtype of ``hidden``, and ``mass [S]`` in float32 (float64 for float64
        input). A span of zero mass falls back to its plain mean; an empty span gives zeros, and
        mass 0. Without weights the mass is the span's number of rows.

    Gradients go to ``hidden`` and, if they require it, to ``weights`` (through both outputs):
    :math:`dh_t = \sum_i w_t g_i / m_i` and :math:`dw_t = \sum_i g_i\cdot(h_t - C_i) / m_i`. A
    row in no span gets exactly zero. Sums run in float32 or wider, in a fixed order: same input,
    same bits. Double backward raises.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; spans that are unsorted or out of
            range; weights that are NaN, infinite or negative.

    Cost: N·D elements read and S·D written forward, N·D written backward; nothing is padded.

    >>> com, mass = span_com(hidden, torch.tensor([[0, 1], [1, 4]]), weights)
    """
    check.floating("hidden", hidden, 2)
    check.integers("spans", spans, (None, 2))
    check.same_device("spans", spans, "hidden", hidden)
    if weights is not None:
        check.floating("weights", weights, 1)
        check.length("weights", weights, hidden.shape[0], "row of hidden")
        check.same_device("weights", weights, "hidden", hidden)
        weights = weights.to(check.accumulator(hidden.dtype))
    if backend.current() == "reference":
        return reference.span_com(hidden, spans, weights)
    return SpanCom.apply(hidden, spans, weights)


__all__ = ["span_com"]
