"""For TRL: a `SpanDistiller` in `SFTTrainer`, and the span loss in `GOLDTrainer`."""

from sra.trl.gold import SpanULDLoss
from sra.trl.sft import SpanSFTTrainer

__all__ = ["SpanSFTTrainer", "SpanULDLoss"]
