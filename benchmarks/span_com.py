"""span_com beside the weighted ragged sums of torch, fbgemm and torch-scatter.

Of fbgemm's CPU operators, `batched_dense_vec_jagged_2d_mul` is the one that sums weighted ragged
rows in both dtypes; its embedding lookup is as fast (13.7 ms against 15.2), but for float32 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import compiled, differentiated, on_backend, rival
from benchmarks.registry import Benchmark, Job
from benchmarks.shapes import seeded
from sra_kernels import span_com
from sra_kernels.testing import ragged_spans, real_lengths

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Case:
    """`lengths`: tokens in each span; "real": those of real text, 94 % ones; "mixed": that and one
    long span of half of the tokens, in random order."""

    case: str
    mode: str
    grads: str
    dtype: str
    tokens: int
    dim: int
    lengths: str
    spans: int


def span_lengths(tokens: int, family: str) -> list[int]:
    if family not in ("real", "mixed"):
        n = int(family)
        rest = tokens % n
        return [n] * (tokens // n) + ([rest] if rest else [])
    lengths = [tokens // 2] if family == "mixed" else []
    left = tokens - sum(lengths)
    with torch.device("cpu"):  # the same lengths whatever the device
        generator = seeded()
        for n in real_lengths(left, generator):
            lengths.append(min(n, left))
            left -= lengths[-1]
            if not left:
                break
        return [lengths[i] for i in torch.randperm(len(lengths), generator=generator)]


WORDS = {
    "1": "single tokens",
    "3": "words",
    "20": "sentences",
    "32": "paragraphs",
    "4096": "one long span",
    "real": "token spans",
    "mixed": "token spans and a long one",
}


def _case(
    tokens: int, dim: int, lengths: str, dtype: str = "float32", grads: str = "hidden"
) -> Case:
    return Case(
        f"{tokens:,} × {dim:,}, {WORDS[lengths]}",
        FORWARD if grads == "none" else BOTH,
        grads,
        dtype,
        tokens,
        dim,
        lengths,
        len(span_lengths(tokens, lengths)),
    )


# Rows of a batch of 16 × 512 tokens, of the 4 × 80 tokens that a small batch's responses have, and
# of one sample; widths of GPT-2, TinyLlama and Mistral.
CASES = [
    _case(8192, 2048, "mixed"),
    _case(8192, 2048, "mixed", "bfloat16"),
    _case(8192, 2048, "real", grads="none"),
    _case(8192, 2048, "3", grads="hidden+weights"),
    _case(8192, 768, "20"),
    _case(8192, 4096, "3", "bfloat16"),
    _case(320, 768, "real"),
    _case(4096, 2048, "4096"),
    _case(16, 768, "1", grads="none"),
]
GPU = [
    _case(8192, 2048, "real", "bfloat16"),
    _case(8192, 4096, "real", "bfloat16"),
    _case(8192, 4096, "32", "bfloat16"),
    _case(8192, 4096, "mixed", "bfloat16"),
    _case(8192, 2048, "3", "bfloat16", "hidden+weights"),
    _case(8192, 2048, "real", grads="none"),
    _case(320, 2048, "real", "bfloat16"),
]
SMALL = [
    _case(256, 72, lengths, dtype, grads)
    for lengths in ("1", "3", "20", "mixed")
    for dtype in ("float32", "bfloat16")
    for grads in ("none", "hidden", "hidden+weights")
    if not (lengths == "1" and grads == "hidden+weights")  # a lone token's share is constant
]


@dataclass
class Inputs:
    """`owner[t]` is the span of row t, `offsets` where each span begins (and, last, the end)."""

    hidden: Tensor
    weights: Tensor
    spans: Tensor
    upstream: Tensor
    backward: bool

    def __post_init__(self) -> None:
        self.lengths = self.spans[:, 1] - self.spans[:, 0]
        self.owner = torch.repeat_interleave(self.lengths)
        self.rows = torch.arange(len(self.hidden), dtype=torch.int32)
        self.offsets = torch.cat([self.spans[:, 0], self.spans[-1:, 1]]).int()
        self.shares = self._normalised()
        leaves = [self.hidden, self.weights] if self.weights.requires_grad else [self.hidden]
        self.leaves = leaves if self.backward else []

    def normalised(self) -> Tensor:
        """Each row's share of its span, differentiable; made in advance where no gradient asks."""
        return self._normalised() if self.weights.requires_grad else self.shares

    def _normalised(self) -> Tensor:
        mass = self.weights.new_zeros(len(self.spans)).index_add_(0, self.owner, self.weights)
        return (self.weights / mass[self.owner]).to(self.hidden.dtype)


def inputs(case: Case) -> Inputs:
    generator = seeded()
    dtype = getattr(torch, case.dtype)
    spans = ragged_spans(span_lengths(case.tokens, case.lengths))
    hidden = torch.randn(case.tokens, case.dim, generator=generator).to(dtype)
    upstream = torch.randn(len(spans), case.dim, generator=generator).to(dtype)
    weights = torch.rand(case.tokens, generator=generator) + 0.05
    return Inputs(
        hidden.requires_grad_(case.mode == BOTH),
        weights.requires_grad_(case.grads == "hidden+weights"),
        spans,
        upstream,
        case.mode == BOTH,
    )


def exact(x: Inputs) -> list[Tensor]:
    """In float64, the backward written out; some columns at a time, to stay in memory."""
    weights, hidden, owner = x.weights.detach().double(), x.hidden.detach(), x.owner
    spans = len(x.spans)
    mass = torch.zeros(spans, dtype=torch.float64).index_add_(0, owner, weights)
    share = weights / mass[owner]
    coms, grads, grad_weights = [], [], torch.zeros_like(weights)
    for h, g in zip(hidden.split(512, dim=1), x.upstream.split(512, dim=1), strict=True):
        h, g = h.double(), g.double()[owner]
        com = torch.zeros(spans, h.shape[1], dtype=torch.float64)
        com.index_add_(0, owner, share[:, None] * h)
        coms.append(com)
        if x.backward:
            grads.append(share[:, None] * g)
            grad_weights += (g * (h - com[owner])).sum(1) / mass[owner]
    results = [torch.cat(part, dim=1) for part in (coms, grads) if part]
    return [*results, grad_weights] if x.weights.requires_grad else results


def job(x: Inputs, forward: Callable[[], Tensor], package: str = "") -> Job:
    return differentiated(forward, x.upstream, x.leaves, package)


def ours(x: Inputs) -> Job:
    return job(x, lambda: span_com(x.hidden, x.spans, x.weights)[0])


def embedding_bag(x: Inputs) -> Job:
    # int32 indices and include_last_offset: its fastest call.
    return job(
        x,
        lambda: F.embedding_bag(
            x.rows,
            x.hidden,
            x.offsets,
            mode="sum",
            per_sample_weights=x.normalised(),
            include_last_offset=True,
        ),
    )


def _index_add(hidden: Tensor, shares: Tensor, owner: Tensor, spans: int) -> Tensor:
    com = torch.zeros(spans, hidden.shape[1], device=hidden.device)
    com = com.index_add(0, owner, hidden.float() * shares[:, None].float())
    return com.to(hidden.dtype)


def index_add(x: Inputs, function: Callable[..., Tensor] = _index_add) -> Job:
    return job(x, lambda: function(x.hidden, x.normalised(), x.owner, len(x.spans)))


def segment_reduce(x: Inputs) -> Job:
    # In the input's own dtype: with float32 sums bfloat16 takes twice as long.
    return job(
        x,
        lambda: torch.segment_reduce(
            x.hidden * x.normalised()[:, None], "sum", lengths=x.lengths, unsafe=True
        ),
    )


def fbgemm(x: Inputs) -> Job:
    rival("fbgemm_gpu", "fbgemm-gpu-cpu==1.8.0")
    offsets = x.offsets.long()
    # Its weights are a padded [S, longest]: made in advance where no gradient asks.
    place = (x.owner, torch.arange(len(x.owner)) - offsets[x.owner])
    longest = int(x.lengths.max())

    def padded() -> Tensor:
        shares = x.normalised()
        return shares.new_zeros(len(x.spans), longest).index_put(place, shares)

    ready = padded()
    learnt = x.weights.requires_grad
    multiply = torch.ops.fbgemm.batched_dense_vec_jagged_2d_mul
    return job(
        x, lambda: multiply(padded() if learnt else ready, x.hidden, offsets), "fbgemm-gpu-cpu"
    )


def segment_csr(x: Inputs) -> Job:
    scatter = rival("torch_scatter", "torch-scatter")
    offsets = x.offsets.long()
    return job(
        x,
        lambda: scatter.segment_csr(x.hidden * x.normalised()[:, None], offsets, reduce="sum"),
        "torch-scatter",
    )


def bytes_moved(x: Inputs) -> int:
    """Forward: rows and weights in, centres and masses out. Backward: the upstream gradient in, the
    gradient out, and for the weights' gradient rows and centres once more."""
    rows = x.hidden.numel() * x.hidden.element_size()
    centres = x.upstream.numel() * x.upstream.element_size()
    small = 4 * len(x.weights) + 20 * len(x.spans)
    forward = rows + centres + small
    if not x.backward:
        return forward
    again = rows + centres if x.weights.requires_grad else 0
    return forward + centres + rows + again + small


BENCHMARK = Benchmark(
    name="span_com",
    cases=CASES,
    small=SMALL,
    gpu=GPU,
    gpu_providers={"ours (CUDA)": on_backend("cuda", ours)},
    inputs=inputs,
    exact=exact,
    # Enough for a mean of 4,096 rows, which is small beside them, summed in float32 (ours 1.1e-6,
    # embedding_bag 2.7e-6) or rounded to bfloat16; not for a wrong row.
    tolerance=lambda case: {"float32": 4e-6, "bfloat16": 6e-2}[case.dtype],
    providers={
        "ours": ours,
        "ours (torch backend)": on_backend("torch", ours),
        "embedding_bag": embedding_bag,
        "index_add": index_add,
        "torch.compile(index_add)": lambda x: index_add(x, compiled(_index_add)),
        "segment_reduce": segment_reduce,
        "fbgemm": fbgemm,
        "torch-scatter": segment_csr,
    },
    bytes_moved=bytes_moved,
    headline=lambda case: case in (*CASES[:2], *GPU),
    headline_only=["ours (torch backend)", "torch.compile(index_add)"],
    seconds=35,
)
