"""Distil a large language model into a small one when their tokenizers differ.

Names are imported when they are first used, so that `import sra` does not load transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "SpanAligner": "alignment",
    "SpanTable": "alignment",
    "SharedVocabulary": "vocabulary",
    "SpanCollator": "collator",
    "load_rows": "data",
    "stream_rows": "data",
    "Objective": "objective",
    "recipe": "objective",
    "SpanDistiller": "distiller",
    "count_items": "batch",
    "TeacherCache": "teacher_cache",
    "DiskCache": "teacher_cache",
    "CacheWriter": "teacher_cache",
    "teacher_sequences": "teacher_cache",
    "SRAConfig": "config",
    "SRATrainer": "trainer",
    "diagnose": "doctor",
    "bits_per_byte": "evaluation",
    "evaluate": "evaluation",
    "span_agreement": "evaluation",
}

__all__ = list(_HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sra' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sra.{_HOMES[name]}"), name)
