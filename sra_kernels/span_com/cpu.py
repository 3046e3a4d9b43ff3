"""span_com in C++ (csrc/cpu/span_com.cpp), which checks the contents itself."""

from __future__ import annotations

import ctypes

from torch import Tensor

from sra_kernels import check, native
from sra_kernels.native import OK
from sra_kernels.span_com import params


def span_com_forward(
    hidden: Tensor, spans: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    return params.forward(_launch(spans, weights, len(hidden)), hidden, spans, weights)


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
    return params.backward(
        _launch(spans, weights, tokens), grad_com, grad_mass, spans, weights, mass, hidden, tokens,
        need_hidden, need_weights,
    )  # fmt: skip


def _launch(spans: Tensor, weights: Tensor | None, tokens: int) -> native.Launch:
    def launch(function: str, given: ctypes.Structure, like: Tensor) -> None:
        if native.cpu_call(function, given) != OK:
            check.spans_content(spans, tokens)
            check.weights_content(weights)

    return launch


def plan(hidden: Tensor, spans: Tensor, weights: Tensor | None = None) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): com, mass, and the gradient of hidden."""
    rows = len(spans) + hidden.shape[0]
    peak = rows * hidden.shape[1] * hidden.element_size() + 4 * len(spans)
    return "no chunks: rows are read in place", peak
