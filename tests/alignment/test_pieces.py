"""Several pieces of a row between two renderings, against alignment of each by definition."""

from __future__ import annotations

import io

import brute_force
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import load
from test_alignment import CROSS, RING, aligner, fragments, spans

from sra.chat import Match, Piece, Rendering
from sra.token_bytes import clean_text

pytestmark = pytest.mark.models


def rendering(pieces: list[str], between: list[str]) -> Rendering:
    """The pieces, each behind its own text of a template."""
    text, found = "", []
    for piece, before in zip(pieces, between, strict=False):
        text += before
        found.append(Piece(piece, (Match(0, len(piece), len(text)),)))
        text += piece
    return Rendering(text + between[-1], tuple(found), ())


# The text of a template before a piece does not end in a space here.
between = st.lists(fragments.map(lambda text: clean_text(text) + "|"), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    pair=st.sampled_from(RING + CROSS),
    pieces=st.lists(fragments.map(clean_text), max_size=3),
    templates=st.tuples(between, between),
    limits=st.tuples(st.none() | st.integers(0, 60), st.none() | st.integers(0, 60)),
)
def test_several_pieces(pair, pieces, templates, limits) -> None:
    """The spans of each piece, as if it were the only one."""
    sides = [rendering(pieces, template) for template in templates]
    table = aligner(*pair).align(*sides, student_max_length=limits[0], teacher_max_length=limits[1])
    ranges = [
        brute_force.token_ranges(name, load(name), side.text)
        for name, side in zip(pair, sides, strict=True)
    ]
    expected, first = [], 0
    for one, other in zip(sides[0].pieces, sides[1].pieces, strict=True):
        length = len(one.text.encode())
        starts = [
            len(side.text[: piece.matches[0].at].encode())
            for side, piece in zip(sides, (one, other), strict=True)
        ]
        for s, t, (low, high) in brute_force.shared_spans(*ranges, length, *starts):
            expected.append((s, t, (low + first, high + first)))
        first += length
    covered = sum(high - low for _, _, (low, high) in expected)
    assert table.text == "".join(pieces)
    assert table.coverage == (covered / first if first else 1.0)
    cut = [float("inf") if limit is None else limit for limit in limits]
    assert spans(table) == [x for x in expected if x[0][1] <= cut[0] and x[1][1] <= cut[1]]
    for ids, name, side, limit in zip(
        (table.student_ids, table.teacher_ids), pair, sides, limits, strict=True
    ):
        assert ids.tolist() == load(name).encode(side.text, add_special_tokens=False).ids[:limit]
    table.show(width=60, color=False, file=io.StringIO())


def test_a_space_of_the_template_is_not_the_pieces() -> None:
    """SentencePiece writes the template's space into the first token of the answer."""
    piece = Piece("so be it", (Match(0, 8, 3),))
    student, teacher = (
        Rendering("A:\nso be it", (piece,), ()),
        Rendering("A: so be it", (piece,), ()),
    )
    table = aligner("gpt2", "mistral-v1").align(student, teacher)
    assert load("mistral-v1").encode(teacher.text).tokens[-3:] == ["▁so", "▁be", "▁it"]
    assert table.coverage == 1
    assert table.bytes.tolist() == [[0, 2], [2, 5], [5, 8]]
    assert np.diff(table.teacher).tolist() == [[1], [1], [1]]


def test_what_one_side_left_out_is_in_no_span() -> None:
    """The teacher's template dropped the middle of the text, and the student's its last letter."""
    text = "one two three"
    student = Rendering("S:one two thre", (Piece(text, (Match(0, 12, 2),)),), ())
    parts = (Match(0, 4, 3), Match(7, 13, 7))
    teacher = Rendering("T.:one  three", (Piece(text, parts),), ())
    table = aligner("gpt2", "gpt2").align(student, teacher)
    raw = text.encode()
    assert [raw[low:high] for low, high in table.bytes] == [b"one"]
    assert table.coverage == 3 / 13
