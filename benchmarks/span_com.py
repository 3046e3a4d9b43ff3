"""span_com beside what else can take a ragged weighted mean on a CPU.

What each provider computes is the same: the centres of mass and, with `forward+backward`, the
gradient of the hidden states for a given upstream gradient (`grads=hidden`: the weights are
detached, as in SRA) or of hidden states and weights (`grads=hidden+weights`). Where the weights are
detached the rivals get their normalised weights for nothing; ours normalises each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Benchmark, Job
from sra_kernels import span_com, use_backend
from sra_kernels.testing import ragged_spans, real_lengths

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Case:
    """`lengths`: tokens in each span; "mixed" is one long span (half of the tokens, 4,096 in the
    full suite) and the lengths of real text (94 % ones) in random order."""

    mode: str
    grads: str
    dtype: str
    tokens: int
    dim: int
    lengths: str
    spans: int


def span_lengths(tokens: int, family: str) -> list[int]:
    if family != "mixed":
        n = int(family)
        rest = tokens % n
        return [n] * (tokens // n) + ([rest] if rest else [])
    lengths, left = [tokens // 2], tokens - tokens // 2
    generator = torch.Generator().manual_seed(0)
    for n in real_lengths(left, generator):
        lengths.append(min(n, left))
        left -= lengths[-1]
        if not left:
            break
    return [lengths[i] for i in torch.randperm(len(lengths), generator=generator)]


def _cases(tokens: int, dim: int, lengths: Sequence[str], grads: Sequence[str]) -> list[Case]:
    return [
        Case(
            FORWARD if grad == "none" else BOTH,
            grad,
            dtype,
            tokens,
            dim,
            n,
            len(span_lengths(tokens, n)),
        )
        for n in lengths
        for dtype in ("float32", "bfloat16")
        for grad in grads
        if not (n == "1" and grad == "hidden+weights")  # the share of a lone token is constant
    ]


ALL_LENGTHS = ("1", "3", "16", "mixed")
ALL_GRADS = ("none", "hidden", "hidden+weights")
CASES = [
    *_cases(8192, 2048, ALL_LENGTHS, ALL_GRADS),
    *_cases(8192, 768, ("3", "mixed"), ("hidden",)),
    *_cases(8192, 4096, ("3", "mixed"), ("hidden",)),
]
SMALL = _cases(256, 72, ALL_LENGTHS, ALL_GRADS)


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

    def normalised(self) -> Tensor:
        """Each row's share of its span, differentiable; made in advance where no gradient asks."""
        return self._normalised() if self.weights.requires_grad else self.shares

    def _normalised(self) -> Tensor:
        mass = self.weights.new_zeros(len(self.spans)).index_add_(0, self.owner, self.weights)
        return (self.weights / mass[self.owner]).to(self.hidden.dtype)


def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
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


def job(x: Inputs, forward: Callable[[], Tensor]) -> Job:
    if not x.backward:

        def run_forward() -> list[Tensor]:
            with torch.no_grad():
                return [forward()]

        return Job(run_forward)
    leaves = [t for t in (x.hidden, x.weights) if t.requires_grad]

    def run() -> list[Tensor]:
        com = forward()
        com.backward(x.upstream)
        return [com.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Job(run, reset)


def ours(backend: str) -> Callable[[Inputs], Job]:
    def provider(x: Inputs) -> Job:
        inner = job(x, lambda: span_com(x.hidden, x.spans, x.weights)[0])

        def run() -> Sequence[Tensor]:
            with use_backend(backend):
                return inner.run()

        return Job(run, inner.reset)

    return provider


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


def index_add(x: Inputs) -> Job:
    return job(x, lambda: _index_add(x.hidden, x.normalised(), x.owner, len(x.spans)))


def compiled_index_add(x: Inputs) -> Job:
    torch._dynamo.reset()
    compiled = torch.compile(_index_add, fullgraph=True, dynamic=False)
    return job(x, lambda: compiled(x.hidden, x.normalised(), x.owner, len(x.spans)))


def segment_reduce(x: Inputs) -> Job:
    # In the input's own dtype: with float32 sums bfloat16 takes twice as long.
    return job(
        x,
        lambda: torch.segment_reduce(
            x.hidden * x.normalised()[:, None], "sum", lengths=x.lengths, unsafe=True
        ),
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


def copy(x: Inputs) -> tuple[Job, int]:
    hidden = x.hidden.detach()
    out = torch.empty_like(hidden)
    return Job(lambda: [out.copy_(hidden)]), 2 * hidden.numel() * hidden.element_size()


BENCHMARK = Benchmark(
    name="span_com",
    cases=CASES,
    small=SMALL,
    inputs=inputs,
    exact=exact,
    # Enough for a mean of 4,096 rows, which is small beside them, summed in float32 (ours 1.1e-6,
    # embedding_bag 2.7e-6) or rounded to bfloat16; not for a wrong row.
    tolerance=lambda case: {"float32": 4e-6, "bfloat16": 6e-2}[case.dtype],
    providers={
        "ours": ours("cpu"),
        "ours (torch backend)": ours("torch"),
        "embedding_bag": embedding_bag,
        "index_add": index_add,
        "torch.compile(index_add)": compiled_index_add,
        "segment_reduce": segment_reduce,
    },
    bytes_moved=bytes_moved,
    copy=copy,
    memory=lambda case: case.grads == "hidden" and case.dim in (72, 2048),
)
