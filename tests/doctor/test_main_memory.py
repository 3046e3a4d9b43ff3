"""Free memory: a container's limit counts where it is lower than the machine's."""

from __future__ import annotations

import psutil
import pytest

from sra.main_memory import available_bytes, total_bytes


@pytest.mark.parametrize("version", [1, 2])
def test_a_container(tmp_path, version):
    names = {
        2: ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        1: (
            "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
            "total_inactive_file",
        ),
    }[version]  # fmt: skip
    (tmp_path / "memory").mkdir()
    for name, content in zip(names, ("1000", "700", f"anon 3\n{names[3]} 200"), strict=False):
        (tmp_path / name).write_text(content + "\n")
    assert total_bytes(tmp_path) == 1000
    assert available_bytes(tmp_path) == 1000 - (700 - 200)


def test_no_container(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert total_bytes(tmp_path) == psutil.virtual_memory().total
    assert 0 < available_bytes(tmp_path) <= total_bytes(tmp_path)
