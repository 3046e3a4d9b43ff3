"""span_com in Triton: a few spans a program, no atomics, nothing that makes the host wait.

Rows are cut into chunks at fixed places. A chunk that lies within a span is averaged once, for all
the spans around it, and a span adds up the chunks inside it and its other rows: fewer than
2 * CHUNK of these, however long it is. The host knows the number of chunks, and need not know the
spans.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from sra_kernels import check
from sra_kernels.native import rows as adjacent
from sra_kernels.span_com.triton_kernels import (
    chunks_kernel,
    cover_kernel,
    grad_hidden_kernel,
    grad_weights_kernel,
    spans_kernel,
)
from sra_kernels.tuning import Config, chosen

CHUNK = 32  # rows
NARROW = 128  # columns
PROBES = 32  # entries that one step of a search looks at

CONFIGS = {
    "chunks": (
        Config({"BLOCK_D": 128}),
        Config({"BLOCK_D": 256}, num_warps=8),
        Config({"BLOCK_D": 64}, num_warps=2),
    ),
    "spans, narrow": (Config({"BLOCK_S": 8, "BLOCK_D": 128, "UNROLL": 2}),),
    "spans, wide": (
        Config({"BLOCK_S": 2, "BLOCK_D": 1024, "UNROLL": 2}),
        Config({"BLOCK_S": 2, "BLOCK_D": 512, "UNROLL": 2}),
        Config({"BLOCK_S": 4, "BLOCK_D": 512, "UNROLL": 1}),
        Config({"BLOCK_S": 4, "BLOCK_D": 256, "UNROLL": 2}),
        Config({"BLOCK_S": 4, "BLOCK_D": 1024, "UNROLL": 2}, num_warps=8),
    ),
    "cover": (Config({"BLOCK_T": 64}),),
    "grad_hidden, narrow": (Config({"BLOCK_T": 8, "BLOCK_D": 128}),),
    "grad_hidden, wide": (
        Config({"BLOCK_T": 4, "BLOCK_D": 512}),
        Config({"BLOCK_T": 4, "BLOCK_D": 256}),
        Config({"BLOCK_T": 8, "BLOCK_D": 256}),
        Config({"BLOCK_T": 2, "BLOCK_D": 1024}),
        Config({"BLOCK_T": 4, "BLOCK_D": 1024}, num_warps=8),
    ),
    "grad_weights, narrow": (Config({"BLOCK_T": 8, "BLOCK_D": 128}),),
    "grad_weights, wide": (
        Config({"BLOCK_T": 4, "BLOCK_D": 512}),
        Config({"BLOCK_T": 2, "BLOCK_D": 512}),
        Config({"BLOCK_T": 4, "BLOCK_D": 1024}, num_warps=8),
    ),
}


def span_com_forward(
    hidden: Tensor, spans: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    if check.contents(hidden.device):
        check.spans_content(spans, hidden.shape[0])
        check.weights_content(weights)
    com = hidden.new_empty(len(spans), hidden.shape[1])
    return com, _centres(hidden, spans, weights, com, least=0)


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
    grad_com, spans, dim = adjacent(grad_com), spans.contiguous(), grad_com.shape[1]
    weights = None if weights is None else weights.contiguous()
    device, acc = grad_com.device, _accumulator(mass)
    cover = spans.new_empty(tokens, 2, dtype=torch.int32)
    grad_hidden = grad_com.new_empty((tokens, dim) if need_hidden else 0)
    grad_weights = mass.new_empty(tokens if need_weights else 0)

    def launch_cover(config: Config) -> None:
        cover_kernel[(triton.cdiv(tokens, config.blocks["BLOCK_T"]),)](
            spans, cover, tokens, len(spans), PROBES=PROBES, **config.launch()
        )

    _launch("cover", device, launch_cover)

    if need_hidden:

        def launch_hidden(config: Config) -> None:
            grad_hidden_kernel[_grid(triton.cdiv(tokens, config.blocks["BLOCK_T"]), dim, config)](
                grad_com, spans, weights, mass, cover, grad_hidden, tokens, dim,
                grad_com.stride(0), ACC=acc, **config.launch(),
            )  # fmt: skip

        _launch(_bucket("grad_hidden", dim), device, launch_hidden)

    if need_weights:
        assert hidden is not None
        rows, grad_mass = adjacent(hidden), grad_mass.contiguous()
        # A com that is rounded to a narrow dtype would be too far from the rows around it.
        com = mass.new_empty(len(spans), dim)
        _centres(rows, spans, weights, com, least=2)

        def launch_weights(config: Config) -> None:
            grad_weights_kernel[(triton.cdiv(tokens, config.blocks["BLOCK_T"]),)](
                grad_com, grad_mass, rows, com, spans, mass, cover, grad_weights, tokens, dim,
                grad_com.stride(0), rows.stride(0), ACC=acc, **config.launch(),
            )  # fmt: skip

        _launch(_bucket("grad_weights", dim), device, launch_weights)
    return grad_hidden, grad_weights


def plan(hidden: Tensor, spans: Tensor, weights: Tensor | None = None) -> tuple[str, int]:
    """(how the work is cut, bytes above the inputs): com, mass, the gradient of hidden, the means
    of chunks and which spans are around each row; where weights learn, com in wide precision."""
    (tokens, dim), count = hidden.shape, len(spans)
    wide, narrow = check.accumulator(hidden.dtype).itemsize, hidden.element_size()
    means = tokens // CHUNK * (dim + 1) * wide
    backward = tokens * (dim * narrow + 8)
    if weights is not None and weights.requires_grad:
        backward += means + count * (dim + 1) * wide + tokens * wide
    peak = count * (dim * narrow + wide) + max(means, backward)
    return f"rows are read in place, means of {CHUNK} rows inside longer spans", peak


def _centres(
    hidden: Tensor, spans: Tensor, weights: Tensor | None, com: Tensor, least: int
) -> Tensor:
    """Fills com for the spans of at least `least` rows; gives their mass."""
    hidden, spans = adjacent(hidden), spans.contiguous()
    weights = None if weights is None else weights.contiguous()
    (tokens, dim), count = hidden.shape, len(spans)
    mass = hidden.new_empty(count, dtype=check.accumulator(hidden.dtype))
    chunks = tokens // CHUNK
    means, masses = mass.new_empty(chunks, dim), mass.new_empty(chunks)
    acc = _accumulator(mass)

    def launch_chunks(config: Config) -> None:
        chunks_kernel[_grid(chunks, dim, config)](
            hidden, spans, weights, means, masses, count, dim, hidden.stride(0),
            CHUNK=CHUNK, PROBES=PROBES, ACC=acc, **config.launch(),
        )  # fmt: skip

    def launch_spans(config: Config) -> None:
        spans_kernel[_grid(triton.cdiv(count, config.blocks["BLOCK_S"]), dim, config)](
            hidden, spans, weights, means, masses, com, mass, tokens, count, dim, hidden.stride(0),
            LEAST=least, CHUNK=CHUNK, ACC=acc, **config.launch(),
        )  # fmt: skip

    if chunks:
        _launch("chunks", hidden.device, launch_chunks)
    _launch(_bucket("spans", dim), hidden.device, launch_spans)
    return mass


def _launch(bucket: str, device: torch.device, launch: Callable[[Config], None]) -> None:
    launch(chosen("span_com", CONFIGS, bucket, device, launch))


def _bucket(kernel: str, dim: int) -> str:
    return f"{kernel}, {'narrow' if dim <= NARROW else 'wide'}"


def _grid(blocks: int, dim: int, config: Config) -> tuple[int]:
    return (blocks * max(1, triton.cdiv(dim, config.blocks["BLOCK_D"])),)


def _accumulator(wide: Tensor) -> tl.dtype:
    return tl.float64 if wide.dtype == torch.float64 else tl.float32
