import pytest

from tests import tiny


@pytest.fixture(scope="module")
def batch():
    return tiny.collator()(tiny.ROWS)
