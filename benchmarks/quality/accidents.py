"""The paper's recipe with the accidents of its authors' code, as a variant of the sweep.

The loss is the tests' eager reference, `tests/objective/faithful.py`: attention rows of padding,
spans by character offsets, masses clamped. What a model reads is one text for both sides, written
by the student's template, as the authors do it. The teacher runs in each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sra.chat import render_prompt
from sra.config import SRAConfig
from sra.model import linear_map, state_width
from tests.objective import faithful


class PaperWithAccidents(nn.Module):
    """Its forward is the loss of a batch of rows; the teacher is no part of it."""

    def __init__(
        self, student: Any, teacher: Any, tokenizers: tuple[Any, Any], config: SRAConfig
    ) -> None:
        super().__init__()
        self.student = student
        self.projector = linear_map(student, state_width(student, -1), state_width(teacher, -1))
        nn.init.orthogonal_(self.projector.weight)
        self.others = teacher.eval().requires_grad_(False), tokenizers, config  # no submodules

    def forward(self, rows: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        teacher, tokenizers, config = self.others
        objective: Any = config.objective()
        return faithful.loss(
            self.student, teacher, *tokenizers,
            [{**row, "prompt": question(tokenizers[0], row["prompt"])} for row in rows],
            self.projector.weight,
            alpha=objective.alpha, gamma=objective.gamma, power=objective.power,
            temperature=objective.temperature, max_length=config.max_length,
        )  # fmt: skip


def question(tokenizer: Any, prompt: str) -> str:
    """The prompt in the student's template, less the line break that the reference puts there."""
    return render_prompt(tokenizer, prompt).removesuffix("\n")


class AccidentsTrainer(Trainer):
    """Rows in the order that every other variant sees; projectors at the rate that ours have."""

    def __init__(self, model: PaperWithAccidents, config: SRAConfig, rows: Any) -> None:
        super().__init__(
            model, config, train_dataset=rows, data_collator=lambda batch: {"rows": batch}
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        module: Any = self.model
        args: Any = self.args
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in module.student.parameters() if p.requires_grad]},
                {"params": module.projector.weight, "lr": args.projector_learning_rate},
            ],
            lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=0.0,
        )  # fmt: skip
        return self.optimizer
