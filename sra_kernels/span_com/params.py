"""sra_span_com of csrc/include/sra_kernels.h, and the calls that the C++ and CUDA kernels share."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.native import DTYPES, Launch, address, rows


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


def forward(
    launch: Launch, hidden: Tensor, spans: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
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
    launch("span_com_forward", params, hidden)
    return com, mass


def backward(
    launch: Launch,
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
        threads=torch.get_num_threads(),
    )
    launch("span_com_backward", params, grad_com)
    return grad_hidden, grad_weights
