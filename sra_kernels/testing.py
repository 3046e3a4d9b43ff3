"""Ragged inputs, error bounds and poisoned memory: shared by tests/ and benchmarks/."""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sra_kernels.library import op_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# An error of ours may be this many times that of plain torch in the same dtype, both against
# float64, plus a floor of a few roundings: of the largest value for the largest error, of the norm
# for the norm of the errors (to store a number costs half a rounding at most).
TIMES_TORCH = 1.5
ROUNDINGS: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1024, 1024),
    torch.float32: (8, 8),
    torch.bfloat16: (1, 0.5),
    torch.float16: (1, 0.5),
}


def ragged_spans(lengths: list[int], gap: int = 0, offset: int = 0) -> Tensor:
    """``[S, 2]`` spans of these lengths, `gap` rows apart (negative: overlapping)."""
    spans, begin = [], offset
    for n in lengths:
        spans.append([begin, begin + n])
        begin += max(n + gap, 0)
    return torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)


# Lengths as they fall in real text: 94 % of spans are one token on each side (p99 is 3).
def real_lengths(count: int, generator: torch.Generator | None = None) -> list[int]:
    u = torch.rand(count, generator=generator)
    return (1 + (u > 0.94).int() + (u > 0.985).int() + (u > 0.997).int()).tolist()


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def euclidean(x: Tensor) -> float:
    return float(x.square().sum().sqrt())


def error(actual: Tensor, exact: Tensor, norm: Callable[[Tensor], float] = largest) -> float:
    """A norm of the difference, in float64; NaN counts as infinite."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {[*actual.shape]} instead of {[*exact.shape]}")
    difference = norm(actual.detach().double() - exact.detach().double())
    return torch.inf if difference != difference else difference


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "") -> None:
    """Three-way bound: |ours - exact| <= 1.5 |torch - exact| + a few roundings.

    In the largest absolute difference, which one wrong entry shows in, and in the Euclidean norm,
    which a wrong factor shows in: 1 % is less than a rounding of one bfloat16, not of all together.
    """
    eps = torch.finfo(ours.dtype).eps
    for norm, roundings in zip((largest, euclidean), ROUNDINGS[ours.dtype], strict=True):
        got, torch_error = error(ours, exact, norm), error(torchs, exact, norm)
        size = norm(exact.detach().double())
        bound = TIMES_TORCH * torch_error + roundings * eps * size
        if not got <= bound:
            raise AssertionError(
                f"{what}: {norm.__name__} error {got:.3e} against float64 is above the bound "
                f"{bound:.3e} (torch in {ours.dtype}: {torch_error:.3e}, of {size:.3e})"
            )


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what torch.empty and its kin hand out with NaN, so that a missed write shows."""

    def poison(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(torch.nan)
            return out.fill_(255) if out.dtype == torch.uint8 else out  # kernels' working memory

        return run

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


class AllocatedMemory(TorchDispatchMode):
    """Bytes that the operations inside allocate: the `largest` tensor, the `peak` alive at once.

    Our own operators are looked into, by running their torch backend. Tensors that exist outside
    count for nothing, nor do views of them.

    >>> with AllocatedMemory() as memory:
    ...     op(...)
    >>> memory.peak
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = self.alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage(), outside=True)
        if func.namespace == "sra_kernels":
            name = func._schema.name.split("::")[1]
            portable = importlib.import_module(f"sra_kernels.{op_of(name)}.portable")
            with self:
                return getattr(portable, name)(*args, **kwargs)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage(), outside=False)
        return out

    def _count(self, storage: torch.UntypedStorage, outside: bool) -> None:
        if id(storage) in self._known:
            return
        size = 0 if outside else storage.nbytes()
        self._known.add(id(storage))
        weakref.finalize(storage, self._forget, id(storage), size)
        self.alive += size
        self.largest, self.peak = max(self.largest, size), max(self.peak, self.alive)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size
