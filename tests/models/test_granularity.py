"""Spans of words and of sentences through the distiller, against the plain objective."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from sra import SpanAligner, SpanCollator, SpanDistiller, recipe
from tests import tiny
from tests.objective import plain

ROWS = [
    {"prompt": "Tell me.", "completion": "The Nile flows. It is long! Is it? Yes, 6650 km."},
    {"prompt": "Deutsch?", "completion": "Guten Tag, schöne Grüße! Wie geht es?\nGut."},
    {"prompt": "你好吗？", "completion": "我很好。谢谢你！ 12 + 30 = 42"},
]
# Where a word or a sentence ends: written from the docstring of SpanAligner.
ENDS = {
    "word": re.compile(r"\s*(?:\w+|[^\w\s]+)"),
    "sentence": re.compile(r".*?(?:(?:[.!?…](?=\s)|[。！？])\n?|\n)", re.DOTALL),
}


def merged(sides, tokenizer, completion, granularity):
    """A sample's spans, each run of them up to a word's or a sentence's end as one."""
    ends = {
        len(completion[: match.end()].encode()) for match in ENDS[granularity].finditer(completion)
    }
    length = len(completion.encode())
    firsts, kept, at = [0], [], 0
    for index, (a, b) in enumerate(sides[0].spans):
        at += len("".join(tokenizer.convert_ids_to_tokens(sides[0].ids[a:b])))  # bytes
        if at in ends or at == length:
            kept.append(index)
            firsts.append(index + 1)
    return [
        replace(
            side,
            spans=[
                (side.spans[first][0], side.spans[last][1])
                for first, last in zip(firsts, kept, strict=False)
            ],
        )
        for side in sides
    ]


@pytest.mark.parametrize("name", ["paper", "boundary", "respell"])
@pytest.mark.parametrize("granularity", ENDS)
def test_terms_are_those_of_the_plain_objective(granularity, name):
    student, teacher = tiny.student_model(torch.float64).eval(), tiny.teacher_model(torch.float64)
    tokenizers = tiny.student_tokenizer(), tiny.teacher_tokenizer()
    objective = recipe(name)
    torch.manual_seed(0)
    module = SpanDistiller(student, teacher, objective, vocabulary=tiny.vocabulary())
    collator = SpanCollator(SpanAligner(*tokenizers, granularity=granularity))
    batch = collator(ROWS)
    samples = []
    for row in ROWS:
        fine = plain.sample(student, teacher, *tokenizers, row)
        coarse = merged(fine, tokenizers[0], row["completion"], granularity)
        assert 1 < len(coarse[0].spans) < len(fine[0].spans)
        samples.append(coarse)
    with torch.no_grad():
        got = module(**batch)
        options = {
            option: getattr(objective, option)
            for option in (
                "alpha", "gamma", "power", "temperature", "cosine", "logit", "direction", "beta",
                "logit_state", "outside", "normaliser",
            )
        }  # fmt: skip
        want = plain.objective(
            samples,
            student_head=student.get_output_embeddings(),
            teacher_head=teacher.get_output_embeddings(),
            projector=next(module.projectors.parameters(), None),
            spelling=plain.spellings(*tokenizers, tiny.TEACHER_ROWS),
            vocabulary=plain.shared_ids(*tokenizers, tiny.STUDENT_ROWS, tiny.TEACHER_ROWS),
            **options,
        )
    weights = {"cosine": objective.cosine, "geometry": objective.gamma, "logit": objective.logit}
    for term, value in want.items():
        if weights.get(term, 1):
            assert value > 0
            assert got[term].item() == pytest.approx(value.item(), rel=1e-9), term
