"""Hooks of a state dict: parameters that have two names, as a head tied to the embedding has."""

from __future__ import annotations

from typing import Any

from torch import nn


def _tied(module: nn.Module) -> list[tuple[str, str]]:
    """(name, other name) of each parameter that has two, as a head tied to the embedding has."""
    first: dict[int, str] = {}
    every = module.named_parameters(remove_duplicate=False)
    names = [(first.setdefault(id(p), name), name) for name, p in every]
    return [(name, other) for name, other in names if name != other]


def without_tied(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A parameter is saved once: safetensors, which Trainers write, refuses shared memory."""
    for _name, other in _tied(module):
        state.pop(prefix + other, None)


def with_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, other in _tied(module):
        if prefix + name in state:
            state.setdefault(prefix + other, state[prefix + name])
