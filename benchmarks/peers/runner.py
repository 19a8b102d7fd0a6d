"""What the three runners share; imports nothing but the standard library, as it runs in each peer's environment."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path


def request() -> dict[str, str]:
    """What to do: `model`, `dtype` to load it in, `rows` (a JSON file of token ids), `task`, `out`."""
    found: dict[str, str] = json.loads(sys.argv[1])
    return found


def token_rows(file: str) -> list[list[int]]:
    """The calibration's token ids."""
    found: list[list[int]] = json.loads(Path(file).read_text())
    return found


def mark(name: str) -> None:
    """Say on stdout when something begins, and the largest resident memory so far, as the kernel counts it."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    peak = int(found.group(1)) * 1024 if found else 0
    sys.stdout.write(f"@mark {name} {time.monotonic()} {peak}\n")
    sys.stdout.flush()


def say(name: str, value: object) -> None:
    """Say a figure on stdout."""
    sys.stdout.write(f"@said {name} {value}\n")
    sys.stdout.flush()
