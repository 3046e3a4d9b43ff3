"""span_com in CUDA (csrc/cuda/span_com.cu): fills the params struct and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.native import DTYPES, address, rows
from sra_kernels.span_com.cpu import Params

PIECE = 64  # kPiece of span_com.cu: rows of a longer span are summed in pieces


def span_com_forward(
    hidden: Tensor, spans: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    if check.contents(hidden.device):
        check.spans_content(spans, len(hidden))
        check.weights_content(weights)
    hidden = rows(hidden)
    spans = spans.to(torch.int64).contiguous()
    weights = None if weights is None else weights.contiguous()
    com = hidden.new_empty(len(spans), hidden.shape[1])
    mass = hidden.new_empty(len(spans), dtype=check.accumulator(hidden.dtype))
    params = Params(
        hidden=address(hidden),
        spans=address(spans),
        weights=address(weights),
        com=address(com),
        mass=address(mass),
        tokens=hidden.shape[0],
        count=len(spans),
        dim=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        dtype=DTYPES[hidden.dtype],
    )
    native.cuda_call("span_com_forward", params, hidden)
    return com, mass


def span_com_backward(
    grad_com: Tensor,
    grad_mass: Tensor,
    spans: Tensor,
    weights: Tensor | None,
    mass: Tensor,
    hidden: Tensor | None,
    tokens: int,
    need_hidden: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    dim = grad_com.shape[1]
    grad_com, grad_mass = grad_com.contiguous(), grad_mass.contiguous()
    spans = spans.to(torch.int64).contiguous()
    weights = None if weights is None else weights.contiguous()
    hidden = None if hidden is None else rows(hidden)
    grad_hidden = grad_com.new_empty((tokens, dim) if need_hidden else 0)
    grad_weights = mass.new_empty(tokens if need_weights else 0)
    params = Params(
        hidden=address(hidden),
        spans=address(spans),
        weights=address(weights),
        mass=address(mass),
        grad_com=address(grad_com),
        grad_mass=address(grad_mass),
        grad_hidden=address(grad_hidden) if need_hidden else None,
        grad_weights=address(grad_weights) if need_weights else None,
        tokens=tokens,
        count=len(spans),
        dim=dim,
        hidden_stride=0 if hidden is None else hidden.stride(0),
        dtype=DTYPES[grad_com.dtype],
    )
    native.cuda_call("span_com_backward", params, grad_com)
    return grad_hidden, grad_weights


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
