"""What this machine has: cores, memory, GPU; and the memory of processes as seen from outside.

Nothing here initialises CUDA or imports torch: the web process may ask as often as it likes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from engine.cradle import NAME

CGROUP = Path("/sys/fs/cgroup")  # of this process, as version 2 shows it inside a container
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # settings of glibc's `mallopt`


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver reports it; bytes."""

    name: str
    used: int
    total: int


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_threads() -> int:
    """Threads for a run: all cores but one, which keeps the page answering."""
    return max(1, cores() - 1)


def memory() -> tuple[int, int]:
    """(used, total) bytes of main memory, within the control group's limit where there is one.

    Cached files count as free in both: the kernel gives them up before it refuses memory. What the machine itself does
    not have counts as used: others may stand in it.
    """
    machine = psutil.virtual_memory()
    used, total = machine.total - machine.available, machine.total
    limit = _cgroup_number("memory.max")
    current = _cgroup_number("memory.current")
    if limit is not None and current is not None and limit < total:
        return min(max(current - _cached(), limit - machine.available, 0), limit), limit
    return used, total


def free_memory() -> int:
    """Bytes of main memory that a run may still take."""
    used, total = memory()
    return total - used


def free_on(device: str) -> int:
    """Bytes that may still be taken on `cuda`, of the GPU where there is one, or on `cpu`."""
    found = gpu() if device == "cuda" else None
    return free_memory() if found is None else found.total - found.used


def give_back_memory(*, collect: bool = True) -> None:
    """Let the system have what this process has freed; the C library keeps much of it for later.

    collect: what stands in circles, too, which takes a tenth of a second, and what was freed on a GPU.
    """
    if collect:
        gc.collect()
        torch = sys.modules.get("torch")  # which servers do not import
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc's own; others give memory back by themselves
        ctypes.CDLL(None).malloc_trim(0)


def keep_memory() -> None:
    """Let the C library keep up to 256 MiB of what this process frees, and take pieces of up to 32 MiB from there.

    It hands each piece of some MiB back by default, and every page of the next one is new: cleared by the system at
    its first use (two cores of Sapphire Rapids, a virtual machine: a training step of the demo model makes 5,000 of
    them, a seventh of its time). `give_back_memory` still returns all that is free.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, 256 << 20)
        library.mallopt(MMAP_THRESHOLD, 32 << 20)


def _cgroup_number(name: str) -> int | None:
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached() -> int:
    """Bytes of files in the control group's memory; active ones too, as in MemAvailable: a download is read again."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    pairs = (line.partition(" ") for line in lines)
    return sum(int(number) for name, _, number in pairs if name in ("inactive_file", "active_file"))


@cache
def _has_driver() -> bool:
    """Whether NVIDIA's library can be opened: looked for once, for it takes milliseconds to find that there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return False
    except pynvml.NVMLError:
        return False
    return True


def _number(name: str) -> int:
    """The number of the first GPU whose UUID begins so, as CUDA finds it; 0 where none does."""
    import pynvml

    for number in range(pynvml.nvmlDeviceGetCount()):
        uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(number))
        if (uuid if isinstance(uuid, str) else uuid.decode()).startswith(name):
            return number
    return 0


def gpu() -> Gpu | None:
    """The first NVIDIA GPU that CUDA shows to this process, or None without one or without its driver."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if shown in ("", "-1") or not _has_driver():
        return None
    import pynvml

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(shown) if shown.isdigit() else _number(shown))
        info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
    except pynvml.NVMLError:
        return None
    return Gpu(name if isinstance(name, str) else name.decode(), int(info.used), int(info.total))


def own_memory(process: int) -> int:
    """Resident bytes of a process without pages that it shares, as of mapped files, which count as free already."""
    try:
        info = psutil.Process(process).memory_info()
    except psutil.Error:
        return 0
    return int(info.rss - getattr(info, "shared", 0))


def group_memory(group: int) -> int:
    """Resident bytes of all processes of a process group; shared pages count for each of them.

    A cradle does nothing, and what it holds are its worker's pages: it does not count.
    """
    total = 0
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.name() != NAME:
                total += process.memory_info().rss
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    return total


@cache
def machine() -> str:
    """One line for reports: processor, cores, memory, GPU."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    device = gpu()
    parts = [name, f"{cores()} core{'s' if cores() > 1 else ''}", f"{memory()[1] / 2**30:.0f} GiB"]
    return ", ".join([*parts, device.name] if device else parts)
