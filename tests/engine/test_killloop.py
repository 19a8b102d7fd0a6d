"""The kill loop, short; and the broken products that it must catch. The long one is `make killloop`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LOOP = Path(__file__).parent.parent / "killloop.py"


def loop(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, LOOP, *arguments], capture_output=True, text=True, timeout=280, check=False)


def test_5_runs_keep_every_promise() -> None:
    done = loop("--runs", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every promise was kept" in done.stdout


@pytest.mark.parametrize(
    ("mutant", "finding"),
    [
        ("commit-before-publish", "artifact is half written"),
        ("no-temporary-folder", "artifact is half written"),
        ("forgets-blocks", "0 were reused"),
    ],
)
def test_the_loop_bites(mutant: str, finding: str) -> None:
    done = loop("--runs", "25", "--mutant", mutant)
    assert done.returncode == 1, done.stdout + done.stderr
    assert finding in done.stdout
