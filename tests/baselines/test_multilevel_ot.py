"""MultiLevelOT against cases worked by hand and a slow reference."""

from __future__ import annotations

import math
import random

import pytest
import torch

from sra.baselines.baseline import Pair, Side
from sra.baselines.multilevel_ot import MultiLevelOT, sinkhorn_distance
from sra.model import Head

# Of two logits, over their standard deviation the larger is sqrt(2) above the other.
HIGH = math.exp(math.sqrt(2)) / (1 + math.exp(math.sqrt(2)))
LOW = 1 - HIGH
UP, DOWN = [5.0, 1.0], [-2.0, 3.0]  # (HIGH, LOW) and (LOW, HIGH)


def side(logits, spans, first=(0,)):
    """A side whose states are its logits."""
    logits = torch.as_tensor(logits, dtype=torch.float64)
    begins = torch.isin(torch.arange(len(logits)), torch.tensor(first))
    ids = torch.zeros(len(logits), dtype=torch.int64)
    head = Head(torch.eye(logits.shape[1], dtype=torch.float64))
    return Side(logits, ids, begins, torch.tensor(spans), head, None)


def loss(student, teacher, offsets=None, **options):
    offsets = torch.tensor([0, len(student.spans)] if offsets is None else offsets)
    return MultiLevelOT(**options).loss(Pair(student, teacher, offsets, None), [])


def test_three_positions_by_hand():
    """Ranks belong to the sequence: the third token's are the wrong way round, and stay so.

    Each side's last row predicts nothing.
    """
    student = side([UP, UP, UP, DOWN], [[1, 4]])
    teacher = side([UP, UP, DOWN, UP], [[1, 4]])
    gap = 2 * (HIGH - LOW)
    alike = -(HIGH * math.log(HIGH) + LOW * math.log(LOW))
    crossed = -(LOW * math.log(HIGH) + HIGH * math.log(LOW))
    absolute, logarithmic = gap / 3, (2 * alike + crossed) / 3
    transport = gap  # the student's rows are one: all that goes to the third token costs the gap
    for weights in ((0.0, 0.0), (2.0, 3.0)):
        want = absolute + weights[0] * logarithmic + weights[1] * transport
        got = loss(student, teacher, logarithmic=weights[0], sinkhorn=weights[1])
        torch.testing.assert_close(got.item(), want)
    want = absolute + 0.1 * logarithmic + 1e-4 * transport
    torch.testing.assert_close(loss(student, teacher).item(), want)


def test_names_of_entries_do_not_matter():
    student = side([UP, UP, DOWN], [[1, 3]])
    turned = side([row[::-1] for row in (UP, UP, DOWN)], [[1, 3]])
    assert loss(student, turned, logarithmic=0.0).item() == 0


def test_transport_between_lengths():
    """One token against two: half of it goes to each. Two against one: each goes whole."""
    a, b = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.8, 0.2], [0.5, 0.5]]).double()
    torch.testing.assert_close(sinkhorn_distance(a, b).item(), (0.4 + 1.0) / 2)
    torch.testing.assert_close(sinkhorn_distance(b, a).item(), 0.4 + 1.0)
    # Far apart, the plan is a matching, whatever the order.
    far = torch.eye(3, dtype=torch.float64)
    assert sinkhorn_distance(far, far[[2, 0, 1]]).item() < 1e-6


def test_transport_under_autocast():
    torch.manual_seed(0)
    student, teacher = (torch.randn(n, 8).mul(3).softmax(-1) for n in (12, 9))
    want = sinkhorn_distance(student.double(), teacher.double()).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = sinkhorn_distance(student, teacher)
    torch.testing.assert_close(got, want)


def test_a_sequence_does_not_depend_on_its_neighbours():
    """Public code ranks by the whole batch, in which these two would rank otherwise."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 9, 5, dtype=torch.float64)
    spans = [[1, 4], [5, 9]]
    both = [side(x, spans, first=(0, 4)) for x in logits]
    alone = [
        loss(*(side(x[start:end], [[1, end - start]]) for x in logits)).item()
        for start, end in ((0, 4), (4, 9))
    ]
    torch.testing.assert_close(loss(*both, offsets=[0, 1, 2]).item(), sum(alone))


def test_equal_logits_have_a_gradient():
    student = side([[0.0] * 3] * 3, [[1, 3]])
    student.hidden.requires_grad_()
    loss(student, side([UP] * 3, [[1, 3]])).backward()
    assert student.hidden.grad.isfinite().all()


def test_a_sequence_without_a_partner():
    """All that the student says in the second one begins it; the third has no span."""
    student = side([UP] * 4, [[1, 3], [3, 4]], first=(0, 3))
    teacher = side([UP] * 4, [[1, 3], [3, 4]])
    one = loss(side([UP] * 3, [[1, 3]]), side([UP] * 3, [[1, 3]]))
    torch.testing.assert_close(loss(student, teacher, [0, 1, 2, 2]), one)
    # Only there: nothing at all.
    assert loss(side([UP], [[0, 1]]), side([UP] * 2, [[1, 2]])).item() == 0


@pytest.mark.parametrize("seed", range(3))
def test_slow_reference(seed):
    """More tokens than are taken at once; more entries than are kept, or fewer on one side."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [(80, 70), (1, 3), (5, 5), (4, 1)]
    top, sizes = draw.choice([3, 9]), (7, 11)
    sides = [ragged([pair[i] for pair in lengths], sizes[i]) for i in (0, 1)]
    want = 0.0
    for number, (count, other) in enumerate(lengths):
        student, teacher = (
            ranked(x.hidden[start - 1 : start - 1 + n].tolist(), min(top, *sizes))
            for x, (start, _), n in zip(
                sides, (x.spans[number].tolist() for x in sides), (count, other), strict=True
            )
        )
        n = min(count, other)
        absolute = sum(
            abs(a - b) for s, t in zip(student[:n], teacher[:n], strict=True)
            for a, b in zip(s, t, strict=True)
        )  # fmt: skip
        logarithmic = -sum(
            b * math.log(a) for s, t in zip(student[:n], teacher[:n], strict=True)
            for a, b in zip(s, t, strict=True)
        )  # fmt: skip
        want += absolute / n + 0.3 * logarithmic / n + 0.05 * transport(student, teacher)
    got = loss(*sides, offsets=[0, 1, 2, 3, 4], top=top, temperature=1.5, logarithmic=0.3,
               sinkhorn=0.05)  # fmt: skip
    torch.testing.assert_close(got.item(), want)


def ragged(lengths, entries):
    spans, first, rows = [], [], 0
    for length in lengths:
        first.append(rows)
        spans.append([rows + 1, rows + 1 + length])
        rows += 1 + length
    return side(2 * torch.randn(rows, entries, dtype=torch.float64), spans, first)


def ranked(logits, top):
    rows = []
    for row in logits:
        mean = sum(row) / len(row)
        std = math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))
        powers = [math.exp(x / std / 1.5) for x in row]
        rows.append([x / sum(powers) for x in powers])
    columns = sorted(range(len(rows[0])), key=lambda i: -sum(row[i] for row in rows))[:top]
    return [[row[i] for i in columns] for row in rows]


def transport(student, teacher):
    """As the paper has it: rows and columns of the plan made to sum up in turn."""
    cost = [[sum(abs(a - b) for a, b in zip(s, t, strict=True)) for t in teacher] for s in student]
    plan = [[math.exp(-c / 0.1) for c in row] for row in cost]
    share = len(student) / len(teacher)
    for _ in range(20):
        sums = [sum(column) / share for column in zip(*plan, strict=True)]
        plan = [[x / y for x, y in zip(row, sums, strict=True)] for row in plan]
        plan = [[x / sum(row) for x in row] for row in plan]
    return sum(p * c for ps, cs in zip(plan, cost, strict=True)
               for p, c in zip(ps, cs, strict=True))  # fmt: skip
