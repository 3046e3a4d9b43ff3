"""SimpleCTKD: KL on the shared vocabulary where both sides say one token (arXiv 2603.01875)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sra.baselines.baseline import Baseline, Pair
from sra_kernels import linear_span_kl


@dataclass(frozen=True)
class SimpleCTKD(Baseline):
    """L = sum over spans that are one token on both sides, and the same one, of
    KL(teacher || student) between the states that predict it, renormalised over the vocabulary
    that both share: `simple_ctkd` of KDFlow, whose positions are the exact token alignment of
    DSKDv2 (arXiv 2504.11426).

    Tokens are the same if `SharedVocabulary` pairs them; with one vocabulary, if their ids are
    equal. Public code strips every mark of a word's start before it compares (a token and the same
    one behind a space are one to it), holds two histories for equal if they have one length, and
    aligns a batch as a single sequence. It also pairs the two ends of a turn, which no span holds.
    """

    temperature: float = 1.0
    name: ClassVar[str] = "simple-ctkd"

    def loss(self, pair: Pair, projections: Sequence[Tensor]) -> Tensor:
        student, teacher, _, shared = pair
        rows, others = student.spans[:, 0], teacher.spans[:, 0]
        vocabulary = None
        ids, wanted = student.ids[rows], teacher.ids[others]
        if shared is not None:
            vocabulary = shared.student_ids.to(ids.device), shared.teacher_ids.to(ids.device)
            partner = ids.new_full((len(student.head.weight),), -1)
            partner[vocabulary[0]] = vocabulary[1]
            ids = partner[ids]
        lengths = torch.stack([student.spans, teacher.spans]).diff(dim=-1).squeeze(-1)
        keep = (ids == wanted) & (lengths == 1).all(dim=0)
        keep &= ~(student.first[rows] | teacher.first[others])
        return linear_span_kl(
            student.hidden[rows[keep] - 1].to(student.head.weight.dtype),
            student.head.weight,
            teacher.hidden[others[keep] - 1].to(teacher.head.weight.dtype),
            teacher.head.weight,
            temperature=self.temperature,
            direction="forward",
            vocab=vocabulary,
            outside="renormalise",
            reduction="sum",
            student_bias=student.head.bias,
            student_softcap=student.head.softcap,
            student_scale=student.head.scale,
            teacher_bias=teacher.head.bias,
            teacher_softcap=teacher.head.softcap,
            teacher_scale=teacher.head.scale,
        )
