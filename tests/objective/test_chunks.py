"""Sums over rows as wide as a vocabulary, chunk by chunk, against the whole at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sra import chunks
from sra.chunks import cross_entropy, sum_by_chunks
from sra.data import IGNORED
from sra.model import Head

ROWS, WIDTH, VOCABULARY = 11, 5, 17


def tensors(rows=ROWS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,), (rows, 2)
    return [
        torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes
    ]


def part(states, head, here, column):
    return (head.logits(states).logsumexp(1) * column.prod(1)).sum()


@pytest.mark.parametrize("rows", [0, 3, 4, ROWS])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunks_sum_to_the_whole(rows, softcap):
    states, weight, bias, column = inputs = tensors(rows)
    head = Head(weight, bias, softcap=softcap)
    found = 3 * sum_by_chunks(part, states, head, column, rows=4)
    expected = 3 * part(states, head, slice(None), column)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)
    )


def test_what_is_frozen_gets_no_gradient():
    states, weight, _, column = tensors()
    for frozen in (states, weight, column):
        frozen.requires_grad_(False)
        sum_by_chunks(part, states, Head(weight), column, rows=4).backward()
        for x in (states, weight, column):
            assert (x.grad is None) == (x is frozen)
            x.grad = None
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not sum_by_chunks(part, states, Head(weight), column, rows=4).requires_grad


def test_half_precision_adds_up_in_float32():
    """Of many chunks whose gradients are alike, each would be lost beside the sum in bfloat16."""
    states = torch.ones(1000, WIDTH, dtype=torch.bfloat16)
    weight = torch.zeros(2, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    def logits(states, head, here):
        return head.logits(states).sum()

    total = sum_by_chunks(logits, states, Head(weight), rows=1)
    assert total.dtype == torch.float32
    total.backward()
    assert weight.grad.eq(1000).all()
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("few", [1000, 0])
@pytest.mark.parametrize("biased", [False, True])
def test_cross_entropy_of_few_labels_and_of_many(monkeypatch, few, biased):
    monkeypatch.setattr(chunks, "FEW", few)
    monkeypatch.setattr(chunks, "ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 7, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    _, weight, bias, _ = tensors()
    labels = torch.randint(VOCABULARY, (3, 7), generator=generator)
    labels[:, :2] = IGNORED
    labels[1] = IGNORED
    seen = []

    class Watched(Head):
        def logits(self, states):
            seen.append(len(states))
            return super().logits(states)

    inputs = [states, weight, *([bias] if biased else [])]
    found = cross_entropy(states, Watched(*inputs[1:]), labels)
    assert seen == ([10] if few else [4, 4, 2])
    logits = F.linear(states[:, :-1], *inputs[1:]).flatten(0, 1)
    expected = F.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)
    )
    labels[:] = IGNORED
    nothing = cross_entropy(states, Head(*inputs[1:]), labels)
    assert nothing == 0
    assert all(not grad.any() for grad in torch.autograd.grad(nothing, inputs))
