"""Teacher states that are computed once for each text and then looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sra.distiller import model_states


class TeacherCache:
    """A teacher that remembers, in memory: pass it to `SpanDistiller` in the teacher's place.

    Keeps the post-final-norm states and attention masses of each token sequence that it has seen,
    not logits, in main memory: 2 * hidden_size + 4 bytes a token in bf16. Worth it from the second
    epoch on.
    """

    def __init__(self, teacher: Any) -> None:
        self._model = teacher.eval().requires_grad_(False)
        self._rows: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.config = teacher.config

    def get_output_embeddings(self) -> Any:
        return self._model.get_output_embeddings()

    def to(self, device: torch.device | str) -> TeacherCache:
        """Move the model; what is remembered stays in main memory."""
        self._model.to(device)
        return self

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for row in self._rows.values() for x in row)

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """As `model_states`; padding rows are zero."""
        real = attention_mask.bool()
        keys = [
            ids[keep].cpu().numpy().tobytes() for ids, keep in zip(input_ids, real, strict=True)
        ]
        missing = [i for i, key in enumerate(keys) if key not in self._rows and key not in keys[:i]]
        if missing:
            width = int(real[missing].any(dim=0).nonzero().max()) + 1
            hidden, mass = model_states(
                self._model, input_ids[missing, :width], attention_mask[missing, :width]
            )
            for row, i in enumerate(missing):
                keep = real[i, :width]
                self._rows[keys[i]] = hidden[row][keep].cpu(), mass[row][keep].cpu()
        states, masses = self._rows[keys[0]]
        hidden = states.new_zeros(*input_ids.shape, states.shape[-1])
        mass = masses.new_zeros(input_ids.shape)
        for i, (key, keep) in enumerate(zip(keys, real.cpu(), strict=True)):
            hidden[i, keep], mass[i, keep] = self._rows[key]
        return hidden.to(input_ids.device), mass.to(input_ids.device)
