"""What a model's code does with a batch, counted without weights or data.

The trunk is run on fake tensors (shapes alone), forward and backward, with one and with two layers;
what a layer adds is multiplied. So the counts follow the model's own code, whatever it is.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, int, int]


def shrunk(config: Any, layers: int, **widths: int) -> Any:
    """A copy of a model's configuration with fewer layers."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    count = text.num_hidden_layers
    for name, value in {"num_hidden_layers": layers, **widths}.items():
        setattr(text, name, value)
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == count:  # one entry a layer, as layer_types
            setattr(text, name, value[:layers])
    return small


class Work(NamedTuple):
    """What one pass does.

    gemms: how often each product ``[m, k] @ [k, n]`` is made.
    moved: bytes that all other operations read and write.
    operations: how many there are.
    """

    gemms: Counter[Shape]
    moved: float
    operations: float

    def flops(self) -> float:
        return sum(2.0 * m * n * k * count for (m, n, k), count in self.gemms.items())


class Trace(NamedTuple):
    """A model's trunk, forward and backward, as its code runs."""

    forward: Work
    backward: Work
    saved: float  # bytes kept for the backward
    layer_saved: float  # of them, those of one layer
    width: float  # bytes of the largest set of tensors that one layer holds while it runs


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.gemms: Counter[Shape] = Counter()
        self.moved = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::_grouped_mm":
            return self._experts(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if not name.startswith("aten::") or func.is_view or name in _FREE:
            return out
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(x)]
        outputs = [x for x in torch.utils._pytree.tree_leaves(out) if _is_tensor(x)]
        self.operations += 1
        if name in _PRODUCTS:
            a, b = inputs[-2:]
            self.gemms[a.numel() // a.shape[-1], b.shape[-1], a.shape[-1]] += 1
        elif "scaled_dot_product" in name:
            for shape, count in _attention(name, inputs).items():
                self.gemms[shape] += count
        elif name not in _GATHERS:
            self.moved += sum(_nbytes(x) for x in inputs)
            self.moved += sum(_nbytes(x) for x in outputs)
        else:
            self.moved += 2 * sum(_nbytes(x) for x in outputs)
        return out

    def _experts(self, a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
        """Products of the rows of each expert, all of one shape: the fake one is for bf16 alone."""
        groups = [len(offs)] if b.dim() == 2 else []  # the gradient of the weights
        self.gemms[a.shape[0], b.shape[-1], a.shape[-1]] += 1
        out = a.new_empty(*groups, a.shape[0], b.shape[-1])
        self.moved += _nbytes(out if groups else b)  # every expert's weights
        self.operations += len(offs)
        return out

    def work(self) -> Work:
        return Work(self.gemms, self.moved, self.operations)


_FREE = ("aten::detach", "aten::_unsafe_view", "aten::scalar_tensor", "aten::arange")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_GATHERS = ("aten::embedding", "aten::index", "aten::index_select", "aten::gather")


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _nbytes(x: Tensor) -> int:
    """Bytes that reading `x` touches; an expanded tensor repeats some."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * torch.Size(sizes).numel()


def _attention(name: str, inputs: list[Tensor]) -> Counter[Shape]:
    """Products of a fused attention: two forward, five backward (it makes the scores again)."""
    first = 1 if "backward" in name else 0
    query, key = inputs[first], inputs[first + 1]
    batch, heads, rows, size = query.shape
    pairs = batch * heads
    return Counter({(rows, key.shape[2], size): pairs * (5 if first else 2)})


def trace(
    config: Any, *, batch_size: int, tokens: int, dtype: torch.dtype, backward: bool = True
) -> Trace:
    """Run the trunk of a model on fake tensors, as in a batch with padding.

    Args:
        backward: False for a model that is not trained; `Trace.backward` and `saved` are then 0.

    Raises:
        ValueError: the model's code cannot run without data (it routes tokens by value, say).
    """
    return _remembered(_Described(config), batch_size, tokens, dtype, backward)


class _Described:
    """A configuration that is equal to another that says the same."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.content = type(config), config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Described) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


@functools.lru_cache(maxsize=64)
def _remembered(
    described: _Described, batch_size: int, tokens: int, dtype: torch.dtype, backward: bool
) -> Trace:
    config = described.config
    rest = config.get_text_config().num_hidden_layers - 1
    one, two = (
        _trace(shrunk(config, layers), batch_size, tokens, dtype, backward) for layers in (1, 2)
    )
    works = []
    for a, b in ((one.forward, two.forward), (one.backward, two.backward)):
        gemms = {k: a.gemms[k] + rest * (b.gemms[k] - a.gemms[k]) for k in {*a.gemms, *b.gemms}}
        works.append(
            Work(
                Counter(gemms),
                a.moved + rest * (b.moved - a.moved),
                a.operations + rest * (b.operations - a.operations),
            )
        )
    layer = two.saved - one.saved
    return Trace(works[0], works[1], one.saved + rest * layer, layer, one.width)


def _trace(
    config: Any, batch_size: int, tokens: int, dtype: torch.dtype, with_backward: bool
) -> Trace:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    kept: dict[int, tuple[Any, int]] = {}
    forward, backward = _Recorder(), _Recorder()
    try:
        with quiet(), FakeTensorMode(), torch.random.fork_rng(devices=[]):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
            trunk = model.base_model
            weights = {p.untyped_storage()._cdata for p in trunk.parameters()}
            ids = torch.zeros(batch_size, tokens, dtype=torch.int64)

            def keep(x: Tensor) -> Tensor:
                storage = x.untyped_storage()
                if storage._cdata not in weights:
                    kept[storage._cdata] = storage, storage.nbytes()
                return x

            cast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with torch.set_grad_enabled(with_backward), cast, hooks, forward:
                states = trunk(input_ids=ids, use_cache=False).last_hidden_state
            if with_backward:
                with backward:
                    states.float().sum().backward()
    except Exception as error:  # the model's own code, whatever it does
        raise ValueError(
            f"{type(config).__name__} cannot be run without data, so its memory and time are not "
            f"predicted ({type(error).__name__}: {str(error).splitlines()[0]:.120})."
        ) from error
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    width = batch_size * tokens * (3 * inner + 2 * text.hidden_size) * dtype.itemsize
    return Trace(forward.work(), backward.work(), sum(n for _, n in kept.values()), 0.0, width)


def count_parameters(config: Any) -> int:
    """Parameters of the causal language model of a configuration; takes no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@contextmanager
def quiet() -> Iterator[None]:
    """Torch logs an error of its own when a fake tensor fails, though it is caught here."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
