"""How good a model is: bits per byte, agreement with a teacher, ROUGE-L."""

from sra.evaluation.likelihood import bits_per_byte
from sra.evaluation.scores import evaluate
from sra.evaluation.span_comparison import span_agreement

__all__ = ["bits_per_byte", "evaluate", "span_agreement"]
