"""Two and four ranks give the gradient, the losses and the weights of one."""

from __future__ import annotations

import pytest

from tests.distributed import ddp, fsdp, ranks, runs

CHECKS = {**ddp.CHECKS, **runs.CHECKS, **fsdp.CHECKS}
# What depends on more than whether there are others runs on four ranks too.
FOUR = [
    "ddp: any_padding", "ddp: routed", "trainer: one_micro_batch", "trainer: streamed",
    "trainer: fully_sharded", "fsdp: tied", "fsdp: a_head_of_its_own", "fsdp: sharded_teacher",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = {}
    for world, names in ((2, [*CHECKS]), (4, FOUR)):
        folder = tmp_path_factory.mktemp("ranks")
        runs.references(folder)
        found[world] = ranks.run(world, ["ddp", "runs", "fsdp"], names, folder)
    return found


@pytest.mark.parametrize(
    ("world", "check"), [*((2, name) for name in CHECKS), *((4, name) for name in FOUR)]
)
def test_ranks(results, world, check):
    assert not results[world][check], results[world][check]
