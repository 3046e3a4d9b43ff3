"""span_com in C++ (csrc/cpu/span_com.cpp): fills the params struct and calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sra_kernels import check, native
from sra_kernels.native import DTYPES, OK, address, rows


class Params(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("com", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("grad_com", ctypes.c_void_p),
        ("grad_mass", ctypes.c_void_p),
        ("grad_hidden", ctypes.c_void_p),
        ("grad_weights", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("hidden_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def span_com_forward(
    hidden: Tensor, spans: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert native.cpu is not None
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
        threads=torch.get_num_threads(),
    )
    if native.cpu.sra_span_com_forward(ctypes.byref(params)) != OK:
        check.spans_content(spans, len(hidden))
        check.weights_content(weights)
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
    assert native.cpu is not None
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
        threads=torch.get_num_threads(),
    )
    if native.cpu.sra_span_com_backward(ctypes.byref(params)) != OK:
        check.spans_content(spans, tokens)
        check.weights_content(weights)
    return grad_hidden, grad_weights


def plan(hidden: Tensor, spans: Tensor, weights: Tensor | None = None) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): com, mass, and the gradient of hidden."""
    rows = len(spans) + hidden.shape[0]
    peak = rows * hidden.shape[1] * hidden.element_size() + 4 * len(spans)
    return "no chunks: rows are read in place", peak
