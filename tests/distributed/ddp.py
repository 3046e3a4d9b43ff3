"""Checks of DistributedDataParallel and of a plain loop with Accelerate."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from sra import SpanDistiller, count_items
from tests import tiny
from tests.distributed import pairs


def any_padding(rank: int, world: int, folder: Path) -> None:
    module = pairs.distiller()
    loss, want = pairs.alone(module, pairs.collator()(tiny.ROWS))
    wrapped = DistributedDataParallel(module)
    for padding in ("right", "left", "free"):
        batch = pairs.collator(padding=padding)(pairs.shares(tiny.ROWS, rank, world))
        counts = pairs.total(count_items([batch]))
        wrapped.zero_grad()
        own = wrapped(**batch, num_items_in_batch=counts).loss
        (own * world).backward()  # DDP takes the mean over ranks
        pairs.assert_same(pairs.gradients(wrapped), want)
        torch.testing.assert_close(pairs.total(own.detach()), loss)


def micro_batches(rank: int, world: int, folder: Path) -> None:
    """Row by row, and the ranks have 1 to 5 of them: gradients meet at the last one."""
    module = pairs.distiller()
    _, want = pairs.alone(module, pairs.collator()(tiny.ROWS))
    wrapped = DistributedDataParallel(module)
    batches = [pairs.collator()([row]) for row in pairs.shares(tiny.ROWS, rank, world)]
    counts = pairs.total(count_items(batches))
    with wrapped.no_sync():
        for batch in batches[:-1]:
            (wrapped(**batch, num_items_in_batch=counts).loss * world).backward()
    (wrapped(**batches[-1], num_items_in_batch=counts).loss * world).backward()
    pairs.assert_same(pairs.gradients(wrapped), want)


def routed(rank: int, world: int, folder: Path) -> None:
    """Some ranks have no row for one of the two teachers; the projectors of both get gradients."""
    _routed(rank, world, pairs.distiller(2))


def respelt(rank: int, world: int, folder: Path) -> None:
    """The same without projectors: the head's gradient is formed in the forward pass."""
    _routed(rank, world, pairs.distiller(2, objective=pairs.RESPELL))


def _routed(rank: int, world: int, module: SpanDistiller) -> None:
    make = pairs.collator(2)
    batch = make(pairs.shares(pairs.ROUTED, rank, world))
    empty = [not teacher["input_ids"].numel() for teacher in batch["teachers"]]
    assert any(empty) or rank  # the first rank has none for the second teacher
    _, want = pairs.alone(module, make(pairs.ROUTED))
    wrapped = DistributedDataParallel(module)
    counts = pairs.total(count_items([batch]))
    (wrapped(**batch, num_items_in_batch=counts).loss * world).backward()
    pairs.assert_same(pairs.gradients(wrapped), want)


def no_spans(rank: int, world: int, folder: Path) -> None:
    """A rank whose rows have no span at all still takes part."""
    module = pairs.distiller()
    short = pairs.collator(teacher_max_length=1)
    batches = [short(tiny.ROWS[:3]), pairs.collator()(tiny.ROWS[3:])]
    if world == 4:
        batches = [batches[0], *(pairs.collator()(tiny.ROWS[i : i + 2]) for i in (2, 4, 6))]
    assert not len(batches[0]["teachers"][0]["student_spans"])
    counts = count_items(batches)
    want = [pairs.alone(module, batch, counts)[1] for batch in batches]
    wrapped = DistributedDataParallel(module)
    (wrapped(**batches[rank], num_items_in_batch=counts).loss * world).backward()
    pairs.assert_same(
        pairs.gradients(wrapped), {name: sum(one[name] for one in want) for name in want[0]}
    )


def accelerate_loop(rank: int, world: int, folder: Path) -> None:
    """As docs/scale.md writes it: prepare, accumulate, global counts."""
    module = pairs.distiller()
    _, want = pairs.alone(module, pairs.collator()(tiny.ROWS))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    rows = pairs.shares(tiny.ROWS, rank, world)
    batches = [pairs.collator()(rows[:1]), pairs.collator()(rows[1:] or rows[:1])]
    if len(rows) == 1:  # its only row twice would count twice
        batches[1]["labels"][:] = -100
        for teacher in batches[1]["teachers"]:
            teacher["student_spans"] = teacher["student_spans"][:0]
            teacher["teacher_spans"] = teacher["teacher_spans"][:0]
            teacher["span_offsets"] = teacher["span_offsets"][:1]
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    assert isinstance(wrapped, DistributedDataParallel)
    counts = accelerator.reduce(count_items(batches), "sum")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for batch in batches:
        with accelerator.accumulate(wrapped):
            loss = wrapped(**batch, num_items_in_batch=counts).loss
            scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
            accelerator.backward(loss * scale)
            optimizer.step()
            optimizer.zero_grad()
    after = dict(module.named_parameters())
    pairs.assert_same({name: before[name] - after[name] for name in before}, want)


CHECKS = {
    f"ddp: {check.__name__}": check
    for check in (any_padding, micro_batches, routed, respelt, no_spans, accelerate_loop)
}
