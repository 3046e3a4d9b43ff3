"""Every operator of the library on one screen: its schema, its implementations, its fake.

Operators are defined here and called from each op's autograd.py; `torch.compile` sees one node for
each. An implementation is chosen inside the node, so a compiled graph follows `use_backend` too.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sra_kernels import backend

_LINEAR = (
    "Tensor student, Tensor student_head, Tensor? student_bias, Tensor teacher, "
    "Tensor teacher_head, Tensor? teacher_bias, Tensor? student_ids, Tensor? teacher_ids, "
    "Tensor? span_weights, float? student_scale, float? student_softcap, float? teacher_scale, "
    "float? teacher_softcap, float temperature, str direction, float? beta, str outside"
)

SCHEMAS = {
    "span_com_forward": "(Tensor hidden, Tensor spans, Tensor? weights) -> (Tensor, Tensor)",
    "span_com_backward": "(Tensor grad_com, Tensor grad_mass, Tensor spans, Tensor? weights, "
    "Tensor mass, Tensor? hidden, SymInt tokens, bool need_hidden, bool need_weights) "
    "-> (Tensor, Tensor)",
    "attention_mass_forward": "(Tensor query, Tensor key, Tensor? query_index, float scale, "
    "Tensor? key_mask, float? softcap, SymInt? window, Tensor? lse) -> Tensor",
    "span_kl_forward": "(Tensor student_logits, Tensor teacher_logits, Tensor? student_ids, "
    "Tensor? teacher_ids, float temperature, str direction, float? beta, str outside, "
    "bool need_mass, bool need_grad) -> (Tensor, Tensor, Tensor)",
    "span_kl_backward": "(Tensor grad_kl, Tensor stats, Tensor student_logits, "
    "Tensor teacher_logits, Tensor? student_ids, Tensor? teacher_ids, float temperature, "
    "str direction, float? beta, str outside) -> Tensor",
    "linear_span_kl_forward": f"({_LINEAR}, bool need_mass, bool need_student, bool need_head, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_span_kl_backward": f"(Tensor grad_kl, {_LINEAR}, bool need_student, bool need_head, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
    "linear_span_kl_restore": "(Tensor grad, Tensor? factor, Tensor ids, SymInt entries, "
    "ScalarType dtype) -> Tensor",
    "linear_span_kl_tiles": f"({_LINEAR}) -> Tensor",
    "span_geometry_forward": "(Tensor student, Tensor teacher, Tensor weights, Tensor offsets, "
    "bool need_grad) -> (Tensor, Tensor)",
}

# What only the Triton kernels can do.
TRITON_ALONE = {"linear_span_kl_tiles": "linear_span_kl(preset='tiles')"}

# What remembers tables of ids from call to call (span_kl/tables.py). Made inside the memory pool of
# a CUDA graph they would keep it from being used again, so torch.compile captures around these.
REMEMBER = {
    "span_kl_forward",
    "span_kl_backward",
    "linear_span_kl_forward",
    "linear_span_kl_backward",
    "linear_span_kl_restore",
}

_library = torch.library.Library("sra_kernels", "DEF")
ops = torch.ops.sra_kernels


def _implementation(op: str, function: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        device = args[0].device
        name, _ = backend.select(op, device)
        if function in TRITON_ALONE and backend.MODULES[name] != "triton":
            raise RuntimeError(
                f"The backend {name!r} does not serve {TRITON_ALONE[function]}. "
                "use_backend('triton') does, on a GPU, and 'interpreter' on a CPU, very slowly."
            )
        module = importlib.import_module(f"sra_kernels.{op}.{backend.MODULES[name]}")
        # Kernels are launched on the current device, which need not be that of the tensors.
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        # Each op says itself what it multiplies in: autocast would round some products, not all.
        with on_device, torch._C._DisableAutocast():
            return getattr(module, function)(*args)

    return run


def _guard(op: str, function: str) -> Callable[..., Any]:
    """Without this, autograd would trace through the Python body of a raw operator."""
    overload = getattr(torch.ops.sra_kernels, function).default

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise RuntimeError(
                f"torch.ops.sra_kernels.{function} has no gradient of its own. "
                f"Call sra_kernels.{op} instead."
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return run


def op_of(function: str) -> str:
    """The op that a function of SCHEMAS belongs to: its name but for the last word."""
    return function.rpartition("_")[0]


def _register() -> None:
    for function, schema in SCHEMAS.items():
        op = op_of(function)
        tags = (torch.Tag.cudagraph_unsafe,) if function in REMEMBER else ()
        _library.define(function + schema, tags=tags)
        _library.impl(function, _implementation(op, function), "CompositeExplicitAutograd")
        _library.impl(function, _guard(op, function), "Autograd")
        fake = importlib.import_module(f"sra_kernels.{op}.fake")
        torch.library.register_fake(f"sra_kernels::{function}", getattr(fake, function))


_register()
