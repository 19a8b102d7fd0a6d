"""Memory of a model: what loading it takes, the most that is taken while it generates, what keys and values hold.

On CUDA it is what torch's allocator handed out. On a CPU it is the growth of the process's resident memory,
and is called so. Resident memory also grows by what is done for the first time (imported code, a
tokenizer, thread stacks), so the model is loaded once and dropped before the load that counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from pydantic import JsonValue

from engine import hardware
from engine.generate import cache_bytes, cache_label
from engine.models import LoadedModel
from engine.records import Measurement

T = TypeVar("T")
EVERY = 0.005  # seconds between two looks, where the kernel does not keep the peak itself
CACHE_TOKENS = 256
CUDA = "cuda allocated"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def loading(load: Callable[[], T], device: str, warm: Callable[[T], object] | None = None) -> tuple[T, Measurement]:
    """What `load` gives, and `memory.loaded`: the bytes by which loading it a second time grew the memory.

    `warm` is called with what the first load gave, before it is dropped: a short generation there keeps
    what generating does only once out of the peak.
    """
    cuda = device.startswith("cuda")
    first = load()
    if warm is not None:
        warm(first)
    del first
    hardware.give_back_memory()  # so that it does not count
    before = _taken(cuda)
    loaded = load()
    hardware.give_back_memory()  # so that it does not count
    return loaded, _measurement("memory.loaded", max(0, _taken(cuda) - before), cuda, "growth by loading")


def generating(work: Callable[[], T], loaded: Measurement) -> tuple[T, Measurement]:
    """What `work` gives, and `memory.peak`: `loaded` and the most bytes taken beyond it meanwhile."""
    cuda = loaded.details["kind"] == CUDA
    hardware.give_back_memory()  # so that it does not count
    before = _taken(cuda)
    watch = _watch_allocator if cuda else _watch_high_water if _kernel_keeps_peak() else _watch_by_looking
    with watch() as highest:
        result = work()
    protocol = f"loaded + highest growth, {highest.method}"
    return result, _measurement("memory.peak", loaded.value + max(0, highest.bytes - before), cuda, protocol)


def of_cache(model: LoadedModel, text: list[int]) -> Measurement:
    """`memory.kv_cache`: the bytes of keys and values that one sequence of CACHE_TOKENS tokens holds, scales included.

    They are counted from the tensors that the decoder really keeps, room for one more token included where these are
    packed: on a CPU the lean decoder's exact ones are float32.
    """
    config = model.network.config.get_text_config()
    count = min(CACHE_TOKENS, getattr(config, "max_position_embeddings", CACHE_TOKENS))
    held = cache_bytes(model, (text * count)[:count])
    details: dict[str, JsonValue] = {
        "protocol": "tensors that are held after reading one sequence", "tokens": count, "per_token": held / count,
        "kind": cache_label(model, count + 1) or "exact",
    }  # fmt: skip
    return Measurement(name="memory.kv_cache", value=held, unit="B", higher_is_better=False, details=details)


def resident() -> int:
    """Resident bytes of this process."""
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def _taken(cuda: bool) -> int:
    return torch.cuda.memory_allocated() if cuda else resident()


@dataclass
class _Highest:
    """The highest memory that was seen, and how."""

    method: str
    bytes: int = 0


@contextlib.contextmanager
def _watch_allocator() -> Iterator[_Highest]:
    highest = _Highest("by the allocator")
    torch.cuda.reset_peak_memory_stats()
    yield highest
    highest.bytes = torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def _watch_high_water() -> Iterator[_Highest]:
    highest = _Highest("high-water mark of the kernel")
    yield highest
    highest.bytes = _high_water()


@contextlib.contextmanager
def _watch_by_looking() -> Iterator[_Highest]:
    highest = _Highest(f"looked at every {EVERY * 1000:.0f} ms", resident())
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(EVERY):
            highest.bytes = max(highest.bytes, resident())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        ended.set()
        thread.join()
    highest.bytes = max(highest.bytes, resident())


def _kernel_keeps_peak() -> bool:
    """Whether Linux lets this process set its resident high-water mark back to now."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return _high_water() > 0


def _high_water() -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _measurement(name: str, value: float, cuda: bool, protocol: str) -> Measurement:
    details: dict[str, JsonValue] = {"kind": CUDA if cuda else "resident", "protocol": protocol}
    return Measurement(name=name, value=value, unit="B", higher_is_better=False, details=details)
