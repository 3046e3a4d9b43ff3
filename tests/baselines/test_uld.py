"""ULD against a case worked by hand."""

from __future__ import annotations

import math

import torch

from sra.baselines import baseline
from sra.baselines.baseline import Pair, Side
from sra.model import Head


def side(logits, spans, first=0):
    """A side whose states are its logits."""
    logits = torch.tensor(logits, dtype=torch.float64)
    ids = torch.zeros(len(logits), dtype=torch.int64)
    begins = torch.arange(len(logits)) == first
    head = Head(torch.eye(logits.shape[1], dtype=torch.float64))
    return Side(logits, ids, begins, torch.tensor(spans), head, None)


def test_two_positions_by_hand():
    """Row 0 and 1 predict the answer's two tokens. Teacher: 3 entries, student: 2."""
    student = side([[0.0, 0.0], [0.0, math.log(3)], [9.0, 9.0]], [[1, 3]])
    teacher = side([[math.log(2), 0.0, 0.0], [0.0, math.log(8), 0.0], [5.0, 5.0, 5.0]], [[1, 3]])
    # Position 1: (.5, .5, 0) and (.5, .25, .25); position 2: (.75, .25, 0) and (.8, .1, .1).
    want = (0 + 0.25 + 0.25) + (0.05 + 0.15 + 0.1)
    got = baseline("uld").loss(Pair(student, teacher, torch.tensor([0, 1]), None), [])
    torch.testing.assert_close(got.item(), want)


def test_positions_are_paired_by_number():
    """The teacher's third token has no partner, and changes nothing."""
    student = side([[0.0, 0.0]] * 3, [[1, 2], [2, 3]])
    logits = [[0.0, 0.0]] * 4
    spans, offsets = [[1, 3], [3, 4]], torch.tensor([0, 2])
    for row, want in ((0, 0.5), (1, 0.5), (2, 0.0)):
        changed = [list(x) for x in logits]
        changed[row] = [math.log(3), 0.0]
        pair = Pair(student, side(changed, spans), offsets, None)
        torch.testing.assert_close(baseline("uld").loss(pair, []).item(), want)
