"""Checks of parameters that `fully_shard` spread over the ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from sra import Objective, count_items
from sra.model import head_of, trunk_of
from tests import tiny
from tests.distributed import pairs


def tied(rank: int, world: int, folder: Path) -> None:
    _sharded_student(rank, world, tied=True)


def untied(rank: int, world: int, folder: Path) -> None:
    _sharded_student(rank, world, tied=False)


def a_head_of_its_own(rank: int, world: int, folder: Path) -> None:
    """The output layer is a unit of its own, which no forward pass of its own gathers."""
    _sharded_student(rank, world, tied=False, head=True)


def a_head_with_the_norm(rank: int, world: int, folder: Path) -> None:
    """One unit of two modules, as Accelerate makes it of a bare model."""
    _sharded_student(rank, world, tied=False, head=True, norm=True)


def respelt(rank: int, world: int, folder: Path) -> None:
    """The gradient of the head is formed in the forward pass, and reduced all the same."""
    _sharded_student(rank, world, tied=False, head=True, objective=pairs.RESPELL)


def the_student_alone(rank: int, world: int, folder: Path) -> None:
    """`fully_shard(student)`, resharded after its forward pass; the projectors stay whole."""
    module = pairs.distiller()
    _, want = pairs.alone(module, pairs.collator()(tiny.ROWS))
    for layer in trunk_of(module.student).layers:
        fully_shard(layer)
    fully_shard(module.student, reshard_after_forward=True)
    for _ in range(2):
        batch = pairs.collator()(pairs.shares(tiny.ROWS, rank, world))
        counts = pairs.total(count_items([batch]))
        module.zero_grad()
        (module(**batch, num_items_in_batch=counts).loss * world).backward()
        for projector in module.projectors.parameters():
            projector.grad = pairs.total(projector.grad) / world
        pairs.assert_same(pairs.gradients(module), want)


def _sharded_student(
    rank: int,
    world: int,
    *,
    tied: bool,
    head: bool = False,
    norm: bool = False,
    objective: Objective = pairs.ALL,
) -> None:
    module = pairs.distiller(tied=tied, objective=objective)
    loss, want = pairs.alone(module, pairs.collator()(tiny.ROWS))
    for layer in trunk_of(module.student).layers:
        fully_shard(layer)
    if head:
        unit = [module.student.model.norm, module.student.lm_head]
        fully_shard(unit, reshard_after_forward=False) if norm else fully_shard(unit[1])
    fully_shard(module)
    assert all(isinstance(p, DTensor) for p in module.parameters())
    for padding in ("right", "free"):  # and a second step finds everything as the first did
        batch = pairs.collator(padding=padding)(pairs.shares(tiny.ROWS, rank, world))
        counts = pairs.total(count_items([batch]))
        module.zero_grad()
        own = module(**batch, num_items_in_batch=counts).loss
        (own * world).backward()  # FSDP takes the mean over ranks
        pairs.assert_same(pairs.gradients(module), want)
        torch.testing.assert_close(pairs.total(own.detach()), loss)


def sharded_teacher(rank: int, world: int, folder: Path) -> None:
    """Trunk and head are units; routed rows, so that some ranks have none for a teacher."""
    module = pairs.distiller(2)
    _, want = pairs.alone(module, pairs.collator(2)(pairs.ROUTED))
    heads = [head_of(teacher).weight.clone() for teacher in module.teachers]
    for teacher in module.teachers:
        for layer in trunk_of(teacher).layers:
            fully_shard(layer)
        fully_shard(trunk_of(teacher))
        fully_shard(teacher.lm_head)
        assert all(isinstance(p, DTensor) for p in teacher.parameters())
    wrapped = torch.nn.parallel.DistributedDataParallel(module)
    for padding in ("right", "free"):
        batch = pairs.collator(2, padding=padding)(pairs.shares(pairs.ROUTED, rank, world))
        counts = pairs.total(count_items([batch]))
        wrapped.zero_grad()
        (wrapped(**batch, num_items_in_batch=counts).loss * world).backward()
        pairs.assert_same(pairs.gradients(wrapped), want)
    for teacher, head in zip(module.teachers, heads, strict=True):
        assert isinstance(teacher.lm_head.weight, DTensor)  # gathered for the step alone
        assert torch.equal(head_of(teacher).weight, head)


def whole_teacher_sharded(rank: int, world: int, folder: Path) -> None:
    """As docs/scale.md shards it: what is left belongs to the root, whose forward never runs."""
    module = pairs.distiller()
    _, want = pairs.alone(module, pairs.collator()(tiny.ROWS))
    for layer in trunk_of(module.teachers[0]).layers:
        fully_shard(layer)
    fully_shard(module.teachers[0])
    for _ in range(2):
        batch = pairs.collator()(pairs.shares(tiny.ROWS, rank, world))
        counts = pairs.total(count_items([batch]))
        module.zero_grad()
        (module(**batch, num_items_in_batch=counts).loss).backward()
        pairs.assert_same(
            {name: pairs.total(p) for name, p in pairs.gradients(module).items()}, want
        )


def saved(rank: int, world: int, folder: Path) -> None:
    """The gathered state writes the plain student, tied parameters once."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    module = pairs.distiller()
    whole = copy.deepcopy(module.student)
    for layer in trunk_of(module.student).layers:
        fully_shard(layer)
    fully_shard(module)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    if rank == 0:
        part = {n.removeprefix("student."): x for n, x in state.items() if n.startswith("student.")}
        module.save_pretrained(folder / "fsdp", state_dict=part)
        loaded = AutoModelForCausalLM.from_pretrained(folder / "fsdp", dtype=torch.float64)
        pairs.assert_same(loaded.state_dict(), whole.state_dict(), atol=0)


CHECKS = {
    f"fsdp: {check.__name__}": check
    for check in (
        tied,
        untied,
        a_head_of_its_own,
        a_head_with_the_norm,
        respelt,
        the_student_alone,
        sharded_teacher,
        whole_teacher_sharded,
        saved,
    )
}
