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
