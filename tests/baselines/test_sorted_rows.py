"""Sorting by numpy on a CPU: the same order, and the same gradient, as torch's."""

import pytest
import torch

from sra.baselines.ranks import descending, sorted_distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 1000), (1, 1), (0, 7)], ids=str)
def test_descending_is_that_of_torch(dtype, shape):
    rows = torch.rand(shape, dtype=dtype, requires_grad=True)
    upstream = torch.rand(shape, dtype=dtype)
    want = rows.sort(dim=-1, descending=True).values
    got = descending(rows)
    assert torch.equal(got, want)
    assert torch.equal(descending(rows.detach()), want)
    with torch.no_grad():
        assert torch.equal(descending(rows), want)
    wanted, gotten = (torch.autograd.grad(x, rows, upstream)[0] for x in (want, got))
    assert torch.equal(gotten, wanted)


def test_columns_of_a_wider_tensor():
    rows = torch.rand(4, 10)[:, [7, 2, 9]].T.T
    assert torch.equal(descending(rows), rows.sort(dim=-1, descending=True).values)


def test_sorted_distance_by_hand():
    ours = torch.tensor([[0.1, 0.7, 0.2]], requires_grad=True)
    distance = sorted_distance(ours, torch.tensor([[0.5, 0.5]]))
    assert distance.item() == pytest.approx(0.2 + 0.3 + 0.1)
    distance.backward()
    assert ours.grad.tolist() == [[1.0, 1.0, -1.0]]


def test_gradcheck():
    ours = torch.rand(3, 8, dtype=torch.float64, requires_grad=True)
    theirs = torch.rand(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(sorted_distance, (ours, theirs))
