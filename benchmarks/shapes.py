"""Shapes of real pairs of models, and how many spans and tokens real samples have."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """A model's width, its last layer's heads, and the rows of its head (padding rows included)."""

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SHAPES = {
    "GPT-2": Shape(768, 12, 12, 64, 50_257),
    "Qwen1.5": Shape(2048, 16, 16, 128, 151_936),
    "TinyLlama": Shape(2048, 32, 4, 64, 32_000),
    "Mistral": Shape(4096, 32, 8, 128, 32_000),
    "SmolLM2": Shape(576, 9, 3, 64, 49_152),
    "Qwen2.5": Shape(896, 14, 2, 64, 151_936),
    "Gemma-3": Shape(640, 4, 1, 256, 262_144),
    "Llama-3.2-1B": Shape(2048, 32, 8, 64, 128_256),
    "Llama-3.1-8B": Shape(4096, 32, 8, 128, 128_256),
    "Qwen2.5-7B": Shape(3584, 28, 4, 128, 152_064),
    "small": Shape(24, 4, 2, 8, 131),
    "large": Shape(40, 6, 3, 8, 257),
}
# Entries that the two real tokenizers spell alike; those of Gemma-3 and Llama-3.2 are guesses.
SHARED = {
    ("GPT-2", "Qwen1.5"): 42_256,
    ("TinyLlama", "Mistral"): 24_184,
    ("SmolLM2", "Qwen2.5"): 39_237,
    ("SmolLM2", "Gemma-3"): 36_000,
    ("Llama-3.2-1B", "Qwen2.5-7B"): 100_000,
    ("small", "large"): 90,
}


def seeded() -> torch.Generator:
    """Of the default device, on which a benchmark's inputs are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(0)


def span_counts(batch: int) -> list[int]:
    """Spans in each sample: the middles of `batch` equal parts of the distribution on Dolly.

    It is log-normal to the eye: mean 76, 95th percentile 242, and this one has 76 and 241.
    """
    middles = [NormalDist(3.82, 1.01).inv_cdf((i + 0.5) / batch) for i in range(batch)]
    return torch.tensor(middles).exp().round().int().tolist()


def normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random rows, each different; the 300 million numbers of a large head in 0.3 s, not in 3."""
    block = torch.randn(min(rows * columns, 1_048_573), generator=generator)
    tiled = block.repeat(-(-rows * columns // len(block)))[: rows * columns].view(rows, columns)
    return tiled.mul_(0.5 + torch.rand(rows, 1, generator=generator))


def shared_ids(
    student: int, teacher: int, shared: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ascending on the student's side and in no order on the teacher's, as in real vocabularies."""
    ours = torch.randperm(student, generator=generator)[:shared].sort().values
    return ours, torch.randperm(teacher, generator=generator)[:shared]
