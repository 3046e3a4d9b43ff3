"""Probabilities by their rank, whatever entries they are of."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sorted_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Sum over rows and ranks of |sort(ours) - sort(theirs)|, the narrower filled with zeros."""
    width = max(ours.shape[-1], theirs.shape[-1])
    ranked = (F.pad(descending(x), (0, width - x.shape[-1])) for x in (ours, theirs))
    return torch.sub(*ranked).abs().sum()


def descending(rows: Tensor) -> Tensor:
    """``[R, V]``, each row in descending order, with gradient.

    On a CPU by numpy: 64 rows of 151,936 numbers take 25 ms on a core with AVX-512, with the order
    that a gradient needs 120, and 890 by torch.
    """
    if rows.device.type != "cpu":
        return rows.sort(dim=-1, descending=True).values
    known = rows.detach().numpy()
    if not (rows.requires_grad and torch.is_grad_enabled()):
        return torch.from_numpy(np.sort(known, axis=-1)).flip(-1)
    return rows.gather(-1, torch.from_numpy(np.argsort(known, axis=-1)).flip(-1))
