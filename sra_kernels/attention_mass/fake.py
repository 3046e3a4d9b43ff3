"""Shapes and dtypes of attention_mass's operator, for torch.compile."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sra_kernels import check


def attention_mass_forward(query: Tensor, key: Tensor, *args: Any) -> Tensor:
    return query.new_empty(query.shape[0], key.shape[2], dtype=check.accumulator(query.dtype))
