"""Kernels for cross-tokenizer distillation. Needs torch alone."""

from sra_kernels.backend import backends, explain, use_backend
from sra_kernels.span_com import span_com

__all__ = ["backends", "explain", "span_com", "use_backend"]
