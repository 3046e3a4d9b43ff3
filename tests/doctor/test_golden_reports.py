"""What `sra doctor` says about real pairs, word for word: tests/doctor/golden/."""

from __future__ import annotations

import pytest

from tests.doctor import golden


@pytest.mark.models
@pytest.mark.parametrize("pair", golden.PAIRS, ids=" from ".join)
def test_the_report_is_the_kept_one(pair):
    now = golden.report(*pair)
    assert now == golden.path(*pair).read_text(), (
        "If the change is meant: python -m tests.doctor.golden --update"
    )


@pytest.mark.models
def test_pairing_by_strings_is_advised_against_where_bytes_share_more():
    pair = "Llama-3.2-1B", "Mistral-7B-v0.1"
    found = golden.diagnosis(*pair, vocabulary_match="raw").findings
    (finding,) = (f for f in found if f.topic == "vocabulary")
    assert (finding.level, finding.remedy) == ("note", "Use --vocabulary-match normalised.")
