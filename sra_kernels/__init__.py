"""Kernels for cross-tokenizer distillation. Needs torch alone."""

from sra_kernels.attention_mass import attention_mass
from sra_kernels.backend import backends, explain, use_backend
from sra_kernels.linear_span_kl import linear_span_kl
from sra_kernels.span_com import span_com
from sra_kernels.span_geometry import span_geometry
from sra_kernels.span_kl import span_kl

__all__ = [
    "attention_mass",
    "backends",
    "explain",
    "linear_span_kl",
    "span_com",
    "span_geometry",
    "span_kl",
    "use_backend",
]
