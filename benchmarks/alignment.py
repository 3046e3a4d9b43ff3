"""The aligner on a tokenised pair of real text: what it adds to the two tokenizers' own time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from benchmarks.registry import Benchmark, Job
from sra.alignment import SpanAligner
from sra.packages import fetch_instructions, fetch_model
from sra.token_bytes import ByteTokenizer


@dataclass(frozen=True)
class Case:
    case: str
    student: str
    teacher: str
    language: str
    teacher_tokens: int


def _cases(teacher_tokens: int) -> list[Case]:
    pair = ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct")
    names = {"en": "English", "zh": "Chinese"}
    return [
        Case(f"{name}, {teacher_tokens:,} teacher tokens", *pair, language, teacher_tokens)
        for language, name in names.items()
    ]


class _Encoded:
    """Stands in for a tokenizer that has encoded the text already."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding

    def encode(self, text: str, add_special_tokens: bool) -> Encoding:
        return self.encoding


@dataclass
class Inputs:
    """`tokenised` is `aligner` with the text's encodings at hand; `lengths` are the bytes that each
    student and each teacher token spells."""

    aligner: SpanAligner
    text: str

    def __post_init__(self) -> None:
        sides = [copy.copy(side) for side in (self.aligner.student, self.aligner.teacher)]
        self.lengths = []
        for side in sides:
            encoding = side.backend.encode(self.text, add_special_tokens=False)
            self.lengths.append([len(side.token_bytes[i]) for i in encoding.ids])
            side.backend = _Encoded(encoding)  # type: ignore[assignment]
        self.tokenised = SpanAligner(*sides)


@cache
def _tokenizer(name: str) -> ByteTokenizer:
    return ByteTokenizer(Tokenizer.from_file(str(fetch_model(name) / "tokenizer.json")))


def inputs(case: Case) -> Inputs:
    aligner = SpanAligner(_tokenizer(case.student), _tokenizer(case.teacher))
    rows = fetch_instructions(case.language)
    text = "\n".join(row["completion"] for row in rows[: case.teacher_tokens // 8])
    offsets = aligner.teacher.backend.encode(text).offsets
    return Inputs(aligner, text[: offsets[case.teacher_tokens - 1][1]])


def exact(x: Inputs) -> list[Tensor]:
    """Every byte at which both sides end a token, by sets; the spans lie between neighbours."""
    ends = [[0, *accumulate(lengths)] for lengths in x.lengths]
    shared = sorted(set(ends[0]) & set(ends[1]))
    student, teacher = ([side.index(at) for at in shared] for side in ends)
    return [torch.tensor(list(pairwise(borders))) for borders in (student, teacher, shared)]


def _job(aligner: SpanAligner, text: str) -> Job:
    def run() -> list[Tensor]:
        table = aligner(text)
        return [torch.from_numpy(x) for x in (table.student, table.teacher, table.bytes)]

    return Job(run)


BENCHMARK = Benchmark(
    name="alignment",
    cases=_cases(2048),
    small=_cases(128),
    inputs=inputs,
    exact=exact,
    tolerance=lambda case: 0.0,
    providers={
        "ours": lambda x: _job(x.tokenised, x.text),
        "ours, tokenizers included": lambda x: _job(x.aligner, x.text),
    },
    seconds=10,
)
