"""A folder to run in, and one finished run in it, of which each test takes a copy."""

from __future__ import annotations

import shutil

import pytest

from tests.faults.children import sra
from tests.faults.runs import Folder, left


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def finished(folder):
    """(its output, what it left)"""
    output = folder.path / "finished"
    log = folder.path / "finished.log"
    assert sra(folder.argv(output), log) == 0, log.read_text()
    return output, left(output)


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run, as if it had been killed before it wrote the student."""
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    shutil.rmtree(output / "student")
    return output
