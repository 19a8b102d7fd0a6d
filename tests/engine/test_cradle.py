"""Children that are forked from a process which has imported everything, and what becomes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine import cradle, hardware

ROOT = Path(__file__).parent.parent.parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are forked on Linux alone")

# A parent that has children and tells what it saw, in a process of its own: pytest's has threads.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from engine import cradle, hardware

def main(arguments):
    what = Path(arguments[0]).read_text()
    if what == "sleep":
        print(os.getpid(), flush=True)
        time.sleep(60)
    if what == "fail":
        raise ValueError("as asked")
    quiet, comm = sys.stdin.read() == "", Path("/proc/self/comm").read_text().strip()
    print(what, os.getpid(), os.getpgid(0), quiet, comm, len(os.listdir("/proc/self/fd")))
    return len(what)

def request(what):
    path = Path(f"{what}.txt")
    path.write_text(what)
    return path

os.setsid()
lock = open("lock", "w")
with cradle.cradle(main):
    found = {"forked": isinstance(child := cradle.start(request("hello")), cradle.Forked)}
    found["said"], found["code"] = child.stdout.read().decode().split(), child.wait()
    child = cradle.start(request("again"))
    found["second"], found["second code"] = child.stdout.read().decode().split(), child.wait()
    child = cradle.start(request("fail"))
    found["failed"] = (child.stdout.read().decode(), child.wait())
    child = cradle.start(request("sleep"))
    child.stdout.readline()
    found["running"] = child.poll()
    found["counted"] = hardware.group_memory(os.getpid())
    found["resident"] = sum(
        int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        for pid in (os.getpid(), child.pid)
    )
    child.kill()
    found["killed"] = child.wait()
    child.kill()
found["after"] = len(os.listdir("/proc/self/task"))
print(json.dumps({**found, "own": os.getpid()}))
if sys.argv[1:] == ["die"]:
    try:
        with cradle.cradle(main):
            print(cradle.start(request("sleep")).stdout.readline().decode(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    finally:
        print("left by", os.getpid(), flush=True)
"""


def run(folder: Path, *arguments: str) -> tuple[str, str]:
    """What the script wrote and complained of; into files, which its children may hold longer than it lives."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "said", "w") as said, open(folder / "errors", "w") as errors:
        command = [sys.executable, "-c", SCRIPT, *arguments]
        subprocess.run(command, cwd=folder, env=environment, stdout=said, stderr=errors, timeout=60)
    return (folder / "said").read_text(), (folder / "errors").read_text()


@linux
def test_children_start_fresh_say_what_they_have_to_and_can_be_killed(tmp_path: Path) -> None:
    said, errors = run(tmp_path)
    found = json.loads(said)
    assert found["forked"]
    name, pid, group, nothing_to_read, comm, handles = found["said"]
    assert (name, nothing_to_read, comm, found["code"]) == ("hello", "True", cradle.BORN, 5)
    assert int(pid) != found["own"] == int(group)  # a signal to the group reaches it
    assert int(handles) == 4  # the three of every process, and that of the folder which tells: no lock of the worker's
    assert found["second"][1] != pid
    assert found["failed"] == ["", 1]
    assert "ValueError: as asked" in errors
    assert (found["running"], found["killed"], found["after"]) == (None, -9, 1)
    assert found["counted"] == pytest.approx(found["resident"], rel=0.1)  # the cradle's pages are its parent's


@linux
def test_a_cradle_goes_with_its_parent(tmp_path: Path) -> None:
    said, _ = run(tmp_path, "die")
    child = int(said.splitlines()[1])
    group = json.loads(said.splitlines()[0])["own"]
    assert hardware.group_memory(group) > 0  # the child, which a runner kills with its group
    os.kill(child, 9)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_group(process) == group for process in psutil.process_iter()):
        time.sleep(0.05)
    assert not [process for process in psutil.process_iter() if _group(process) == group]
    assert "left by" not in (tmp_path / "said").read_text()  # its copy of the worker did nothing of the worker's


def _group(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.Error, ProcessLookupError):
        return None


@pytest.mark.parametrize(("devices", "threads"), [("0", 1), ("", 2)])
def test_where_forking_is_not_safe_children_start_as_any_process(
    devices: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has spoken with CUDA must not be forked, nor one with threads."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    monkeypatch.setattr("threading.active_count", lambda: threads)
    with cradle.cradle(lambda arguments: 0):
        child = cradle.start(tmp_path / "missing.json")
    assert isinstance(child, subprocess.Popen)
    child.communicate()
    assert child.wait() != 0
