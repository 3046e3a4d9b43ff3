"""span_com in CUDA (csrc/cuda/span_com.cu)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sra_kernels import check, native
from sra_kernels.span_com import params

PIECE = 64  # kPiece of span_com.cu: rows of a longer span are summed in pieces

span_com_backward = partial(params.backward, native.cuda_call)


def span_com_forward(
    hidden: Tensor, spans: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    if check.contents(hidden.device):
        check.spans_content(spans, len(hidden))
        check.weights_content(weights)
    return params.forward(native.cuda_call, hidden, spans, weights)


def plan(hidden: Tensor, spans: Tensor, weights: Tensor | None = None) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): com, mass, the gradient of hidden, and the
    workspace: pieces of long spans and, where the weights learn, a wide centre of each span."""
    wide = check.accumulator(hidden.dtype).itemsize
    tokens, dim = hidden.shape
    pieces = 2 * -(-tokens // PIECE) if tokens > PIECE else 0
    centres = len(spans) if weights is not None and weights.requires_grad else 0
    outputs = (len(spans) + tokens) * dim * hidden.element_size() + wide * len(spans)
    return (
        f"spans of more than {PIECE} rows in pieces",
        outputs + (pieces + centres) * dim * wide,
    )
