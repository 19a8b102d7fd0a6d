"""What a machine has left for a run, where a control group bounds it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("shown", "asked"),
    [(None, 0), ("0", 0), ("1,0", 1), ("GPU-cd0,GPU-ab", 1), ("GPU-c", 1), ("MIG-x", 0), ("", None), ("-1", None)],
)
def test_the_gpu_is_the_first_that_cuda_shows(
    shown: str | None, asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimpleNamespace(
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetUUID=lambda handle: ("GPU-ab0", "GPU-cd0")[handle],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=1, total=4),
        nvmlDeviceGetName=lambda handle: f"number {handle}", NVMLError=OSError,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(hardware, "_has_driver", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    found = hardware.gpu()
    assert (None if found is None else found.name) == (None if asked is None else f"number {asked}")
    if asked is not None:
        assert hardware.free_on("cuda") == 3


def test_what_others_took_of_a_machine_is_not_free_within_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may take 24 GiB, and of the host's 64 GiB only 3 are left."""
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    busy = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=64 * GIB, available=3 * GIB))
    monkeypatch.setattr(hardware, "psutil", busy)
    (tmp_path / "memory.max").write_text(f"{24 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    assert hardware.memory() == (21 * GIB, 24 * GIB)
    assert hardware.free_memory() == 3 * GIB


def test_a_control_group_without_a_limit_or_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    machine = hardware.memory()[1]
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    assert hardware.memory()[1] == machine
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    assert hardware.memory() == (GIB, GIB)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own")
def test_memory_that_is_kept_is_not_made_anew() -> None:
    """Pages that a process asks for while it takes and frees 8 MiB, after the first time; of 4 KiB."""
    script = """
import ctypes, resource, sys
from engine import hardware
if sys.argv[1] == "keep":
    hardware.keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for turn in range(20):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = libc.malloc(8 << 20)
    ctypes.memset(place, 1, 8 << 20)
    libc.free(place)
    if turn == 19:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # as it begins: the library moves it later
    pages = [
        int(
            subprocess.run(
                [sys.executable, "-c", script, what], env=env, check=True, capture_output=True, text=True
            ).stdout
        )
        for what in ("leave", "keep")
    ]
    assert pages[0] >= 19 * 2048
    assert pages[1] < 2048
