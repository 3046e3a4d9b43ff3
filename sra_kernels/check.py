"""What the operations demand of their inputs, said in one voice: what, where, how to mend.

Shapes, dtypes and devices are checked by the public functions. Contents are checked inside the
operators, where they do not break a compiled graph: at once on a CPU, by a device-side assertion
elsewhere, because reading a GPU tensor would make the host wait. Our GPU kernels run faster than
these checks: they mark bad contents with NaN instead, and SRA_KERNELS_CHECK=1 tells what is wrong.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

VARIABLE = "SRA_KERNELS_CHECK"


def contents(device: torch.device) -> bool:
    """Whether a GPU kernel's inputs are looked through before it runs."""
    return device.type == "cpu" or os.environ.get(VARIABLE, "0") == "1"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and losses: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def floating(name: str, x: Tensor, dims: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}.")
    if x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, not {x.dim()} (shape {[*x.shape]}).")
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{name} is {x.dtype}; the kernels take float32, bfloat16, float16 or float64. "
            f"Cast it first, e.g. {name}.float()."
        )


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name} is on {x.device} but {other_name} is on {other.device}. "
            f"Move it: {name}.to({other_name}.device)."
        )


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(
            f"{name} is {x.dtype} but {other_name} is {other.dtype}. "
            f"Cast one of them: {name}.to({other_name}.dtype)."
        )


def length(name: str, x: Tensor, n: int, of: str) -> None:
    if x.dim() != 1 or x.shape[0] != n:
        raise ValueError(f"{name} has shape {[*x.shape]}; it needs one entry for each {of}: [{n}].")


def integers(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, not {kind}.")
    fits = x.dim() == len(shape) and all(
        n is None or m == n for m, n in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {[*x.shape]}; it must be [{wanted}].")


def constant(name: str, x: Tensor | None, why: str) -> None:
    """Refuses a tensor that requires grad where the operation gives it none."""
    if x is not None and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but {why}. Pass {name}.detach(), or compute it under "
            "torch.no_grad()."
        )


def spans_content(spans: Tensor, tokens: int) -> None:
    """Both columns non-decreasing, 0 <= begin <= end <= tokens."""
    if spans.numel() == 0:
        return
    begin, end = spans[:, 0], spans[:, 1]
    bad = (begin > end) | (begin < 0) | (end > tokens)
    bad[1:] |= (spans[1:] < spans[:-1]).any(dim=1)
    if spans.device.type != "cpu":
        torch._assert_async(~bad.any(), f"spans must be sorted ranges within 0..{tokens}")
        return
    if bad.any():
        i = int(bad.nonzero()[0, 0])
        before = f" after {spans[i - 1].tolist()}" if i else ""
        raise ValueError(
            f"spans[{i}] = {spans[i].tolist()}{before} is not valid: spans are half-open row "
            f"ranges within 0..{tokens} whose begins and ends never decrease. Sort them by begin "
            "and clip them to the number of rows."
        )


def weights_content(weights: Tensor | None, name: str = "weights") -> None:
    """Finite and not negative."""
    if weights is None or weights.numel() == 0:
        return
    good = (weights >= 0) & weights.isfinite()
    if weights.device.type != "cpu":
        torch._assert_async(good.all(), f"{name} must be finite and not negative")
        return
    if not good.all():
        i = int((~good).nonzero()[0, 0])
        raise ValueError(
            f"{name}[{i}] = {float(weights[i])}: {name} are masses, so they must be finite and not "
            "negative. Look for NaN or overflow in what produced them."
        )
