"""What the processor can do, as Linux tells it; nothing here imports torch."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def instructions() -> frozenset[str]:
    """The processor's instructions as Linux names them; nothing where there is no Linux to say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = (line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, "").split())


def multiplies_bfloat16() -> bool:
    """Whether torch has fast products of bfloat16 here; as far as Linux says, and else it is believed."""
    known = instructions()
    return not known or {"avx512bw", "avx512dq", "avx512vl"} <= known or bool({"avx_ne_convert", "bf16"} & known)
