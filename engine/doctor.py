"""What this machine and this installation offer, and what is missing: versions, devices, kernels, folders."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine import hardware
from engine.errors import StoreError
from engine.store import home

PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "gradio", "plotly", "pydantic")
KERNELS = {  # name of the operator by what it computes
    "4 bit on CPU": "_weight_int4pack_mm_for_cpu",
    "8 bit on CPU": "_weight_int8pack_mm",
    "4 bit on CUDA": "_weight_int4pack_mm",
}
LITTLE_DISK = 1 << 30  # bytes


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; not `good` where something is missing or will not work."""

    name: str
    value: str
    good: bool = True


def examine(folder: Path | None = None) -> list[Finding]:
    """Look at everything; `folder` is the data folder where it is not the usual one."""
    return [
        Finding("python", platform.python_version()),
        *(_package(name) for name in PACKAGES),
        Finding("sqlite", sqlite3.sqlite_version, sqlite3.sqlite_version_info >= (3, 37)),  # STRICT tables
        Finding("machine", hardware.machine()),
        _gpu(),
        Finding("threads of a run", f"{hardware.worker_threads()} of {hardware.cores()}"),
        _memory(),
        *_kernels(),
        _home(folder),
    ]


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "not installed: pip install -r requirements.txt", good=False)


def _gpu() -> Finding:
    gpu = hardware.gpu()
    if gpu is None:
        return Finding("gpu", "none: everything runs on the CPU")
    return Finding("gpu", f"{gpu.name}, {(gpu.total - gpu.used) / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB free")


def _memory() -> Finding:
    used, total = hardware.memory()
    return Finding("memory", f"{(total - used) / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def _kernels() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("kernels", f"torch cannot be imported: {error}", good=False)]
    from engine.runtime.native.library import available
    from engine.wide import multiplies_bfloat16

    processor = available()
    ours = f"built for {processor}" if processor else "not here (AVX2 and g++ build them): torch's compute"
    slow = "slow on this processor: what is dense is multiplied in float32"
    return [
        Finding("our own kernels", ours),
        Finding("bfloat16", "multiplied by the processor" if multiplies_bfloat16("cpu") else slow),
        *_operators(torch.ops.aten),
    ]


def _operators(aten: object) -> list[Finding]:
    return [
        Finding(name, operator if hasattr(aten, operator) else f"{operator} is missing: simulated only")
        for name, operator in KERNELS.items()
    ]


def _home(folder: Path | None) -> Finding:
    try:
        chosen = folder.absolute() if folder is not None else home()
    except StoreError as error:
        return Finding("data folder", str(error), good=False)
    there = next(path for path in (chosen, *chosen.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("data folder", f"{chosen} cannot be written", good=False)
    free = shutil.disk_usage(there).free
    return Finding("data folder", f"{chosen}, {free / 2**30:.1f} GiB free", good=free > LITTLE_DISK)
