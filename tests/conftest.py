import os
import zlib

import pytest
import torch

from sra_kernels import backends, use_backend
from sra_kernels.testing import poisoned_empty

# The tests of the operations run on any backend: `SRA_TEST_BACKENDS=interpreter pytest` runs those
# alone, on the Triton kernels. That takes half an hour; with SRA_TEST_CASES=3 only three cases of
# each test run, those whose names have the smallest checksums: any three, but always the same.
VARIABLE, AT_MOST = "SRA_TEST_BACKENDS", "SRA_TEST_CASES"
BACKENDS = os.environ.get(VARIABLE, "cpu,torch").split(",")
# Before any test file is read: some make their tensors then.
if set(BACKENDS) <= {"triton", "cuda"} and torch.cuda.is_available():
    torch.set_default_device("cuda")


def pytest_collection_modifyitems(config, items):
    """GPU tests skip with a reason where there is no GPU."""
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="no GPU on this machine")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(reason)
    if VARIABLE in os.environ:
        kept = [x for x in items if "backend" in x.fixturenames and "cpu_only" not in x.keywords]
        kept = some_of_each(kept, int(os.environ.get(AT_MOST, len(items))))
        config.hook.pytest_deselected(items=[x for x in items if x not in set(kept)])
        items[:] = kept


def some_of_each(items, most):
    tests = {}
    for item in items:
        tests.setdefault((item.path, item.originalname), []).append(item)
    kept = set()
    for cases in tests.values():
        kept.update(sorted(cases, key=lambda x: zlib.crc32(x.nodeid.encode()))[:most])
    return [item for item in items if item in kept]


@pytest.fixture(params=BACKENDS)
def backend(request):
    status = backends()[request.param]
    if not status.available:
        pytest.skip(status.reason)
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """What torch.empty hands out is NaN inside the test: a missed write cannot pass by luck."""
    with poisoned_empty():
        yield
