"""attention_mass beside eager attention: one query row (SRA's weights) and all of them.

Transformers hands out attention as whole matrices (`output_attentions`), "eager, full matrix"; the
best that plain torch can do is "eager": one row where one is asked for, chunks of rows otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.providers import compiled, differentiated, on_backend
from benchmarks.registry import Absent, Benchmark, Job
from benchmarks.shapes import SHAPES, seeded
from sra_kernels import attention_mass

ONE, ALL = "one row", "all rows"
CHUNK = 256  # query rows; 128 and 512 are no faster
LARGEST_MATRIX = 2 << 30  # bytes of scores that a benchmark may ask for


@dataclass(frozen=True)
class Case:
    """`window` 0: none. `padding`: the side on which the samples, of random lengths, are padded."""

    case: str
    mode: str
    dtype: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    padding: str


def _case(
    model: str,
    mode: str,
    batch: int,
    tokens: int,
    dtype: str = "float32",
    window: int = 0,
    padding: str = "none",
) -> Case:
    shape = SHAPES[model]
    return Case(
        f"{model}, batch {batch}, {tokens:,} tokens",
        mode,
        dtype,
        batch,
        tokens,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        window,
        padding,
    )


CASES = [
    _case("TinyLlama", ONE, 1, 2048),
    _case("TinyLlama", ALL, 1, 2048),
    _case("SmolLM2", ONE, 4, 512, padding="right"),
    _case("Qwen2.5", ONE, 16, 512, "bfloat16", padding="left"),
    _case("GPT-2", ONE, 1, 32_768),
    _case("SmolLM2", ALL, 4, 512, padding="right"),
    _case("Qwen2.5", ALL, 4, 512, "bfloat16"),
    _case("Gemma-3", ALL, 1, 2048, window=512),
]
GPU = [
    _case("Llama-3.1-8B", ALL, 1, 8192, "bfloat16"),
    _case("Llama-3.1-8B", ALL, 1, 2048, "bfloat16"),
    _case("Gemma-3", ALL, 4, 2048, "bfloat16", window=512),
    _case("Llama-3.1-8B", ONE, 1, 32_768, "bfloat16"),
    _case("Llama-3.1-8B", ONE, 16, 1024, "bfloat16", padding="right"),
]
SMALL = [
    _case("small", mode, 3, 40, dtype, window, padding)
    for mode, dtype, window, padding in (
        (ONE, "float32", 0, "right"),
        (ONE, "bfloat16", 7, "left"),
        (ALL, "float32", 7, "left"),
        (ALL, "bfloat16", 0, "right"),
        (ALL, "float32", 0, "none"),
    )
]


@dataclass
class Inputs:
    """`index`: each sample's last real row; `real` [B, T]: which keys are no padding."""

    case: Case
    query: Tensor
    key: Tensor
    index: Tensor
    real: Tensor

    def __post_init__(self) -> None:
        self.scale = self.case.head_dim**-0.5
        # Visible keys [B or 1, 1, rows, T] of the asked rows, made in advance as models do.
        position = torch.arange(self.case.tokens)
        rows = self.index[:, None] if self.case.mode == ONE else position[None]
        distance = rows[:, :, None] - position
        mask = distance >= 0
        if self.case.window:
            mask &= distance < self.case.window
        if self.case.padding != "none":
            mask = mask & self.real[:, None]
        self.mask = mask[:, None]
        self.used = self.real[:, None, :, None]  # the rows of ALL that count


def inputs(case: Case) -> Inputs:
    generator = seeded()
    dtype = getattr(torch, case.dtype)
    query = torch.randn(case.batch, case.heads, case.tokens, case.head_dim, generator=generator)
    key = torch.randn(case.batch, case.kv_heads, case.tokens, case.head_dim, generator=generator)
    lengths = torch.full((case.batch,), case.tokens)
    if case.padding != "none":
        lengths = torch.randint(case.tokens // 4, case.tokens, (case.batch,), generator=generator)
    position = torch.arange(case.tokens)
    if case.padding == "left":
        index = torch.full((case.batch,), case.tokens - 1)
        real = position >= case.tokens - lengths[:, None]
    else:
        index = lengths - 1
        real = position < lengths[:, None]
    # Scores of a few units: attention that looks at some keys more than at others.
    return Inputs(case, (2 * query).to(dtype), key.to(dtype), index, real)


def ours(x: Inputs) -> Job:
    return differentiated(
        lambda: attention_mass(
            x.query,
            x.key,
            query_index=x.index if x.case.mode == ONE else None,
            scale=x.scale,
            key_mask=None if x.case.padding == "none" else x.real,
            window=x.case.window or None,
        )
    )


def one_row_in_cuda(x: Inputs) -> Job:
    if x.case.mode == ALL:
        raise Absent("left out: there is no CUDA kernel for all rows")
    return on_backend("cuda", ours)(x)


def shares(x: Inputs, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Attention [B, H, rows, T]; the heads that share keys are stacked, so keys are not copied."""
    (batch, heads, rows, dim), kv_heads = query.shape, key.shape[1]
    stacked = query.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    scores = (stacked @ key.transpose(2, 3)).view(batch, heads, rows, -1)
    return softmax(scores * x.scale, mask)


def softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """In float32, as in transformers."""
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(3, dtype=torch.promote_types(scores.dtype, torch.float32))


def normalised(mass: Tensor) -> Tensor:
    return mass / mass.sum(1, keepdim=True)


def full_matrix(x: Inputs) -> Job:
    case = x.case
    if 4 * case.batch * case.heads * case.tokens**2 > LARGEST_MATRIX:
        raise Absent("left out: the matrix would take more than 2 GiB")
    every = x.mask
    if case.mode == ONE:
        position = torch.arange(case.tokens)
        distance = position[:, None] - position
        every = (distance >= 0) & (distance < (case.window or case.tokens))
        every = (every & x.real[:, None])[:, None]

    def forward() -> Tensor:
        key = x.key.repeat_interleave(case.heads // case.kv_heads, dim=1)  # as transformers does
        attention = softmax(x.query @ key.transpose(2, 3) * x.scale, every)
        if case.mode == ONE:
            return normalised(attention[torch.arange(case.batch), :, x.index].sum(1))
        return normalised((attention * x.used).sum((1, 2)))

    return differentiated(forward)


def one_row(x: Inputs, query: Tensor, key: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    row = query[torch.arange(query.shape[0]), :, index][:, :, None]
    return normalised(shares(x, row, key, mask).sum((1, 2)))


def chunked(x: Inputs, query: Tensor, key: Tensor, used: Tensor, mask: Tensor) -> Tensor:
    mass = torch.zeros(
        key.shape[0], key.shape[2], dtype=torch.promote_types(key.dtype, torch.float)
    )
    for begin in range(0, query.shape[2], CHUNK):
        rows = slice(begin, begin + CHUNK)
        seen = slice(max(0, begin - x.case.window) if x.case.window else 0, rows.stop)
        part = shares(x, query[:, :, rows], key[:, :, seen], mask[:, :, rows, seen])
        mass[:, seen] += (part * used[:, :, rows]).sum((1, 2))
    return normalised(mass)


def eager(x: Inputs, wrap: Callable[[Callable], Callable] = lambda function: function) -> Job:
    if x.case.mode == ONE:
        one = wrap(lambda *tensors: one_row(x, *tensors))
        return differentiated(lambda: one(x.query, x.key, x.index, x.mask))
    every = wrap(lambda *tensors: chunked(x, *tensors))
    return differentiated(lambda: every(x.query, x.key, x.used, x.mask))


def exact(x: Inputs) -> list[Tensor]:
    """The chunked formula in float64, sample by sample."""
    masses = []
    for i in range(x.case.batch):
        one = slice(i, i + 1)
        query, key = x.query[one].double(), x.key[one].double()
        mask = x.mask[one] if len(x.mask) > 1 else x.mask
        if x.case.mode == ONE:
            masses.append(one_row(x, query, key, x.index[one], mask))
        else:
            masses.append(chunked(x, query, key, x.used[one], mask))
    return [torch.cat(masses)]


def bytes_moved(x: Inputs) -> int:
    """The keys, the asked query rows, the masses."""
    case = x.case
    rows = 1 if case.mode == ONE else case.tokens
    read = case.kv_heads * case.tokens + case.heads * rows
    return case.batch * (read * case.head_dim * x.query.element_size() + 4 * case.tokens)


def flops(x: Inputs) -> int:
    """Of the scores that some row sees; their exponentials are not counted."""
    case = x.case
    visible = x.mask if case.mode == ONE else x.mask & x.used
    seen = int(visible.sum()) * case.batch // len(visible)
    return 2 * case.heads * case.head_dim * seen


BENCHMARK = Benchmark(
    name="attention_mass",
    cases=CASES,
    small=SMALL,
    gpu=GPU,
    gpu_providers={"ours (CUDA)": one_row_in_cuda},
    inputs=inputs,
    exact=exact,
    tolerance=lambda case: {"float32": 1e-4, "bfloat16": 5e-2}[case.dtype],
    providers={
        "ours": ours,
        "ours (torch backend)": on_backend("torch", ours),
        "eager": eager,
        "eager, full matrix": full_matrix,
        "torch.compile": lambda x: eager(x, compiled),
    },
    bytes_moved=bytes_moved,
    flops=flops,
    headline=lambda case: case in (*CASES[:2], *GPU),
    headline_only=["ours (torch backend)", "eager, full matrix", "torch.compile"],
    seconds=35,
)
