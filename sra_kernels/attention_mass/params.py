"""sra_attention_mass of csrc/include/sra_kernels.h, and the call that C++ and CUDA share."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sra_kernels import check
from sra_kernels.native import DTYPES, Launch, address, rows


class Params(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("query_index", ctypes.c_void_p),
        ("key_mask", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("query_strides", ctypes.c_int64 * 3),
        ("key_strides", ctypes.c_int64 * 3),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def forward(
    launch: Launch,
    query: Tensor,
    key: Tensor,
    query_index: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    softcap: float | None,
    window: int | None,
    lse: Tensor | None,
) -> Tensor:
    query, key = rows(query), rows(key)
    query_index = None if query_index is None else query_index.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    lse = None if lse is None else lse.contiguous()
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    mass = query.new_empty(batch, keys, dtype=check.accumulator(query.dtype))
    params = Params(
        query=address(query),
        key=address(key),
        query_index=address(query_index),
        key_mask=address(key_mask),
        lse=address(lse),
        mass=address(mass),
        query_strides=query.stride()[:3],
        key_strides=key.stride()[:3],
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        dim=dim,
        window=min(window or 0, keys),
        scale=scale,
        softcap=softcap or 0,
        dtype=DTYPES[query.dtype],
        threads=torch.get_num_threads(),
    )
    launch("attention_mass_forward", params, query)
    return mass
