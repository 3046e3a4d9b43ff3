"""Sums over rows as wide as a vocabulary, of which a few are held at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sra.data import IGNORED
from sra.model import Head

ROWS = 256  # whose logits are held at once: 256 * 150,000 fp32 is 154 MB
FEW = 1024  # labels: up to so many, chunks save less than the head's second gradient, theirs, takes


def sum_by_chunks(
    part: Callable[..., Tensor],
    states: Tensor,
    head: Head,
    *columns: Tensor,
    rows: int | None = None,
) -> Tensor:
    """Sum of ``part(states, head, slice, *columns)`` over chunks of rows.

    Their gradients are formed at once, so that nothing as wide as a vocabulary outlives its chunk,
    and nothing is computed twice. fp32 or wider.

    Args:
        states: ``[N, D]``, of which a chunk is given to `part`, with the place of it.
        head: gradients go to its weight and bias.
        columns: ``[N, ...]`` more to be cut into chunks, with gradient where they ask for it.
        rows: of a chunk (None: `ROWS`).
    """
    learns = torch.is_grad_enabled()  # which `forward` below cannot ask
    inputs = head.weight, head.bias, states, *columns
    wanted = [learns and x is not None and x.requires_grad for x in inputs]
    return _SumByChunks.apply(part, head, rows or ROWS, wanted, *inputs)


def cross_entropy(states: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Sum over label tokens. Rows without a label never meet the head.

    states: ``[B, T, D]``; labels: ``[B, T]``, label i belongs to the state of i - 1.
    """
    wanted = labels[:, 1:] != IGNORED
    states, targets = states[:, :-1][wanted], labels[:, 1:][wanted]

    def part(states: Tensor, head: Head, here: slice) -> Tensor:
        return F.cross_entropy(head.logits(states), targets[here], reduction="sum")

    if len(targets) <= FEW:
        return part(states, head, slice(None))
    return sum_by_chunks(part, states, head)


class _SumByChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        part: Callable[..., Tensor],
        head: Head,
        rows: int,
        wanted: Sequence[bool],
        weight: Tensor,
        bias: Tensor | None,
        states: Tensor,
        *columns: Tensor,
    ) -> Tensor:
        inputs = weight, bias, states, *columns
        dtype = torch.promote_types(states.dtype, torch.float32)
        total = states.new_zeros((), dtype=dtype)
        # Those of the head are begun by the first chunk: they are its largest, and zeros to add to
        # would be as large again.
        grads: list[Any] = [
            torch.zeros_like(x, dtype=dtype)
            if x is not None and want and (i >= 2 or not len(states))
            else None
            for i, (x, want) in enumerate(zip(inputs, wanted, strict=True))
        ]
        for start in range(0, len(states), rows):
            here = slice(start, start + rows)
            places = [slice(None), slice(None)] + [here] * (len(inputs) - 2)
            own: list[Any] = [
                None if x is None else x[place].detach().requires_grad_(want)
                for x, place, want in zip(inputs, places, wanted, strict=True)
            ]
            with torch.set_grad_enabled(any(wanted)):
                value = part(own[2], head._replace(weight=own[0], bias=own[1]), here, *own[3:])
            total += value.detach()
            leaves = [x for x in own if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(value, leaves) if leaves else ())
            for i, (want, place) in enumerate(zip(wanted, places, strict=True)):
                if not want:
                    continue
                grad = next(found)
                if grads[i] is None:
                    grads[i] = grad.to(dtype)
                else:
                    grads[i][place] += grad
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else (above * grad).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, *grads
