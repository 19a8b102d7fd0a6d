"""What a machine has left for a run, where a control group bounds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import hardware

GIB = 1 << 30


def test_files_that_were_only_read_or_written_take_no_memory_from_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container looks after a download: the page cache has filled the limit, and the kernel gives it back."""
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {GIB // 4}\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\n")
    assert hardware.memory() == (GIB // 4, GIB)
    assert hardware.free_memory() == 3 * GIB // 4


def test_a_control_group_without_a_limit_or_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    machine = hardware.memory()[1]
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    assert hardware.memory()[1] == machine
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    assert hardware.memory() == (GIB, GIB)
