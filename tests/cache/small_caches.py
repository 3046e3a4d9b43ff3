"""Caches of the tiny teacher: written here, for the tests of reading and of writing."""

from __future__ import annotations

import torch

from sra.teacher_cache.writer import CacheWriter, teacher_sequences
from tests import tiny


def sequences(rows=tiny.ROWS, **options):
    return teacher_sequences(rows, tiny.teacher_tokenizer(), **options)


def write(folder, teacher=None, rows=tiny.ROWS, *, batch_size=3, **options):
    """A cache of some rows, in shards of two or three texts; returns the number of texts read."""
    teacher = teacher or tiny.teacher_model(torch.bfloat16)
    options = {"shard_bytes": 6000, **options}
    with CacheWriter(folder, teacher, tiny.teacher_tokenizer(), name="tiny", **options) as writer:
        batches = [*writer.batches(sequences(rows), batch_size)]
        for batch in batches:
            writer.add(batch)
    return sum(map(len, batches))


def teacher_inputs(batch):
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: batch["teachers"][0][name] for name in names if name in batch["teachers"][0]}


def relative(got, want):
    return float((got - want).norm() / want.norm())
