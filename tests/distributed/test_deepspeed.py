"""DeepSpeed's ZeRO, on two ranks: the gradient of one."""

from __future__ import annotations

import os

import pytest
import torch

from tests.distributed import ranks, runs, zero


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("zero")
    runs.references(folder, torch.float32)
    return ranks.run(2, ["zero"], [*zero.CHECKS], folder)


@pytest.mark.parametrize("check", zero.CHECKS)
def test_zero(results, check):
    assert not results[check], results[check]
