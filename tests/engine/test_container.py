"""What the container promises, tried without one: nothing but its data and its scratch folder is written, no rights of
root are needed, and the page answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# In mounts of its own everything but one folder becomes read-only; then root's rights are given up for good.
SEALED = """
mount --make-rprivate / && mount --bind "$0" "$0" && mount -o remount,bind,ro / || exit 77
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
RECIPE = {"model": "demo", "steps": [{"quantize/gptq": {"samples": 4}}], "measure": ["size"]}


def sealed(place: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    """A command of this Python where only `place` can be written."""
    (place / "tmp").mkdir(exist_ok=True)
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MAQUETTE", "GRADIO", "XDG"))}
    environment = {
        **known, "MAQUETTE_HOME": str(place / "data"), "XDG_CACHE_HOME": str(place / "data" / "cache"),
        "HF_HOME": str(place / "data" / "huggingface"), "TMPDIR": str(place / "tmp"),
        "GRADIO_TEMP_DIR": str(place / "tmp" / "gradio"), "PYTHONDONTWRITEBYTECODE": "1", "MAQUETTE_NICE": "0",
        **variables,
    }  # fmt: skip
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", SEALED, str(place), sys.executable, *command], cwd=ROOT, text=True,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stays writable where nothing else does; skips where that cannot be had."""
    place = tmp_path_factory.mktemp("sealed")
    tried = f"open({str(place / 'mine')!r}, 'w').close(); open({str(ROOT / 'not-mine')!r}, 'w')"
    try:
        said, _ = sealed(place, "-c", tried).communicate(timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if "Read-only file system" not in said:
        assert not (ROOT / "not-mine").exists()
        pytest.skip(f"mounts cannot be sealed here: {said.strip()[-200:]}")
    assert (place / "mine").exists()
    return place


def test_a_run_needs_no_more_than_its_data_folder(place: Path) -> None:
    recipe = place / "recipe.json"
    recipe.write_text(json.dumps(RECIPE))
    process = sealed(place, "-m", "engine", "run", str(recipe))
    try:
        said, _ = process.communicate(timeout=200)
    finally:
        process.terminate()  # nothing where it has ended
        process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert list((place / "data").glob("runs/*/attempt-1/artifact/config.json")), said


def test_the_page_answers(place: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    process = sealed(place, "app.py", HOST="0.0.0.0", PORT=port, MAQUETTE_MODE="public")
    try:
        deadline = time.monotonic() + 120
        page = b""
        while not page and time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                page = answer.read()
            time.sleep(0.2)
    finally:
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert b"Maquette" in page, said
