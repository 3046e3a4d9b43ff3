"""Loads the libraries built from csrc/ by ctypes and fills their params structs.

Nothing here raises at import: a library that is missing leaves its reason in `problem`, and the
torch backend serves. The structs mirror csrc/include/sra_kernels.h field by field.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from sra_kernels import check

ABI = 1
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
OK = 0


class SpanCom(ctypes.Structure):
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
        ("wide_com", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def _load(file: str) -> tuple[ctypes.CDLL | None, str]:
    path = Path(__file__).with_name(file)
    if not path.exists():
        return None, (
            f"{file} was not built: there was no C++ compiler at install, or "
            "SRA_KERNELS_BUILD=none. Install g++ and run `pip install .` again."
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{file} did not load: {error}. Run `pip install .` again on this machine."
    if library.sra_kernels_abi() != ABI:
        return None, f"{file} is of another version of sra_kernels. Run `pip install .` again."
    return library, ""


cpu, problem = _load("_cpu.so")


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """x itself where its rows lie contiguous, at whatever stride from each other."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def span_com_forward(
    hidden: Tensor, spans: Tensor, weights: Tensor | None, wide_com: bool
) -> tuple[Tensor, Tensor]:
    assert cpu is not None
    hidden = _rows(hidden)
    spans = spans.to(torch.int64).contiguous()
    weights = None if weights is None else weights.contiguous()
    wide = check.accumulator(hidden.dtype)
    com = hidden.new_empty(len(spans), hidden.shape[1], dtype=wide if wide_com else hidden.dtype)
    mass = hidden.new_empty(len(spans), dtype=wide)
    params = SpanCom(
        hidden=_address(hidden),
        spans=_address(spans),
        weights=_address(weights),
        com=_address(com),
        mass=_address(mass),
        tokens=hidden.shape[0],
        count=len(spans),
        dim=hidden.shape[1],
        hidden_stride=hidden.stride(0),
        dtype=DTYPES[hidden.dtype],
        wide_com=wide_com,
        threads=torch.get_num_threads(),
    )
    if cpu.sra_span_com_forward(ctypes.byref(params)) != OK:
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
    com: Tensor | None,
    tokens: int,
    need_hidden: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    assert cpu is not None
    dim = grad_com.shape[1]
    grad_com, grad_mass = grad_com.contiguous(), grad_mass.contiguous()
    spans = spans.to(torch.int64).contiguous()
    weights = None if weights is None else weights.contiguous()
    hidden = None if hidden is None else _rows(hidden)
    grad_hidden = grad_com.new_empty((tokens, dim) if need_hidden else 0)
    grad_weights = mass.new_empty(tokens if need_weights else 0)
    params = SpanCom(
        hidden=_address(hidden),
        spans=_address(spans),
        weights=_address(weights),
        com=_address(com),
        mass=_address(mass),
        grad_com=_address(grad_com),
        grad_mass=_address(grad_mass),
        grad_hidden=_address(grad_hidden) if need_hidden else None,
        grad_weights=_address(grad_weights) if need_weights else None,
        tokens=tokens,
        count=len(spans),
        dim=dim,
        hidden_stride=0 if hidden is None else hidden.stride(0),
        dtype=DTYPES[grad_com.dtype],
        threads=torch.get_num_threads(),
    )
    if cpu.sra_span_com_backward(ctypes.byref(params)) != OK:
        check.spans_content(spans, tokens)
        check.weights_content(weights)
    return grad_hidden, grad_weights
