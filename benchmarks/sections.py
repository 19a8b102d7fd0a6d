"""What the benchmarks share: a section of a README that they write, and a page of their own to measure."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from engine.runtime.native.library import available
from engine.wide import multiplies_bfloat16

ROOT = Path(__file__).parents[1]
README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "docs" / "results.md"
CHROMIUM = shutil.which("chromium")  # None leaves the choice to Playwright
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu"]


def write_section(file: Path, name: str, text: str) -> None:
    """Replace what stands between the comments `<!-- name -->` and `<!-- /name -->`.

    Raises:
        SystemExit: the file has no such section.
    """
    before, found, rest = file.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not found or not end:
        raise SystemExit(f"{file.name} has no section <!-- {name} -->")
    file.write_text(f"{before}{found}\n{text}\n\n{end}{after}")


def by_processor(name: str) -> str:
    """The section for this kind of processor of what is measured on several: where products differ, ratios do."""
    if not multiplies_bfloat16("cpu"):
        return f"{name}-float32"
    return f"{name}-amx" if available() == "amx" else name


@contextmanager
def running_page(**variables: str) -> Iterator[tuple[str, float]]:
    """The address of `python app.py` with an empty data folder, and the seconds until it answered.

    variables: more of its environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        environment = {**os.environ, "MAQUETTE_HOME": home, "PORT": str(port), "HOST": "127.0.0.1", **variables}
        began = time.monotonic()
        server = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        try:
            while not _answers(address):
                if server.poll() is not None or time.monotonic() - began > 60:
                    raise SystemExit("the page did not start within a minute")
                time.sleep(0.1)
            yield address, time.monotonic() - began
        finally:
            workers = psutil.Process(server.pid).children(recursive=True)  # which outlive it, to be found again
            server.terminate()
            server.wait(30)
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.kill()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/healthz", timeout=2).close()
    except OSError:
        return False
    return True
