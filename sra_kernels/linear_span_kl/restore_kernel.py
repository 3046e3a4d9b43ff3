"""The head's gradient from that of its rows in use, in Triton: each row is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sra_kernels.span_kl.tables import tables
from sra_kernels.tuning import Config, chosen

CONFIGS = {
    "narrow": (Config({"ROWS": 32, "COLUMNS": 64}),),
    "wide": (
        Config({"ROWS": 4, "COLUMNS": 1024}),
        Config({"ROWS": 8, "COLUMNS": 512}),
        Config({"ROWS": 2, "COLUMNS": 2048}, num_warps=8),
    ),
}
NARROW = 64  # columns


@triton.jit(do_not_specialize=["entries"])
def _restore_kernel(
    rows, factor, place, head, entries, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """head[e] = factor * rows[place[e]], or 0 where place[e] is -1."""
    entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = (entry < entries)[:, None] & (column < dim)[None, :]
    source = tl.load(place + entry, mask=entry < entries, other=-1)
    at = source.to(tl.int64)[:, None] * dim + column[None, :]
    x = tl.load(rows + at, mask=within & (source >= 0)[:, None], other=0.0).to(ACC)
    if factor is not None:
        # Not 0 * factor, which is NaN where that is not finite.
        x = tl.where((source >= 0)[:, None], x * tl.load(factor).to(ACC), 0.0)
    at = entry.to(tl.int64)[:, None] * dim + column[None, :]
    tl.store(head + at, x.to(head.dtype.element_ty), mask=within)


def linear_span_kl_restore(
    grad: Tensor, factor: Tensor | None, ids: Tensor, entries: int, dtype: torch.dtype
) -> Tensor:
    dim = grad.shape[1]
    head = grad.new_empty((entries, dim), dtype=dtype)
    if head.numel() == 0:
        return head
    place, _ = tables(ids, None, entries, len(grad))
    grad = grad.contiguous()
    wide = tl.float64 if torch.float64 in (grad.dtype, dtype) else tl.float32

    def launch(config: Config) -> None:
        grid = (
            triton.cdiv(entries, config.blocks["ROWS"]),
            triton.cdiv(dim, config.blocks["COLUMNS"]),
        )
        _restore_kernel[grid](grad, factor, place, head, entries, dim, ACC=wide, **config.launch())

    size = "narrow" if dim <= NARROW else "wide"
    launch(chosen("linear_span_kl_restore", CONFIGS, size, grad.device, launch))
    return head
