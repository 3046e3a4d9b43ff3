import pytest
import torch

from sra_kernels.testing import poisoned_empty


def pytest_collection_modifyitems(items):
    """GPU tests skip with a reason where there is no GPU."""
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="no GPU on this machine")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(reason)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """What torch.empty hands out is NaN inside the test: a missed write cannot pass by luck."""
    with poisoned_empty():
        yield
