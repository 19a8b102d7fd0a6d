"""A process that waits to be the next worker: what it takes over, and what becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from engine import hardware
from engine.attempts import EventReader, is_live, prepare, read_pid
from engine.records import Recipe, Status
from engine.runners import standby
from engine.runners.local import LocalRunner, environment
from engine.runners.standby import Standby
from engine.scheduler import Scheduler
from tests.engine.test_scheduler import FAKE, LONG, does, until

COMMAND = (sys.executable, "-m", "tests.engine.fake_standby")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standby]:
    monkeypatch.setattr(hardware, "free_memory", lambda: 16 << 30)
    made = Standby("cpu", lambda: environment("cpu", 1) | {"PYTEST_CURRENT_TEST": ""}, COMMAND)  # it changes
    made.prepare()
    yield made
    made.close()


def pid_of(waits: Standby) -> int | None:
    return None if waits._process is None else waits._process.pid


def request_of(home: Path, what: str, attempt: int = 1, *, secret: bool = False) -> Path:
    recipe = does(what).model_dump(mode="json")
    body = {"kind": "run", "run": "r", "attempt": attempt, "recipe": recipe, "secret": secret}
    return prepare(home, "r", attempt, body)


def test_a_process_in_standby_becomes_the_worker(waiting: Standby, tmp_path: Path) -> None:
    runner, pid = LocalRunner(FAKE, 1, waiting), pid_of(waiting)
    assert pid is not None
    until(lambda: waiting.held("cpu") > 1 << 20)
    assert waiting.held("cuda") == 0
    assert os.getpgid(pid) == pid  # a group of its own
    request = request_of(tmp_path, "surroundings", secret=True)
    worker = runner.start(request, "cpu", "hf_secret")
    assert worker.pid == pid == read_pid(request.parent)
    until(lambda: not worker.alive())
    assert worker.exit_code() == 0
    assert not is_live(request.parent)
    said = {str(event.data["text"]) for event in EventReader(request.parent).read() if event.kind == "log"}
    assert said == {f"cwd {request.parent}", f"temp {request.parent / 'tmp'}", "stdin "}  # the token is read already
    assert "written" in (request.parent / "worker.log").read_text()
    assert (pid_of(waiting), waiting.held("cpu")) == (None, 0)
    waiting.prepare()
    assert pid_of(waiting) not in (None, pid)


def test_without_one_that_fits_a_worker_starts_as_ever(waiting: Standby, tmp_path: Path) -> None:
    runner, pid = LocalRunner(FAKE, 1, waiting), pid_of(waiting)
    assert pid is not None
    with_gpu = runner.start(request_of(tmp_path, "quick", 1), "cuda")
    assert with_gpu.pid != pid
    assert pid_of(waiting) == pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    worker = runner.start(request_of(tmp_path, "quick", 2), "cpu")
    assert worker.pid != pid
    until(lambda: (worker.exit_code(), with_gpu.exit_code()) == (0, 0))
    waiting.prepare()
    assert pid_of(waiting) is None  # what dies at once is not started ten times a second


def test_another_environment_is_for_another_process(
    waiting: Standby, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = pid_of(waiting)
    monkeypatch.setenv("MAQUETTE_NICE", "7")
    worker = LocalRunner(FAKE, 1, waiting).start(request_of(tmp_path, "quick"), "cpu")
    assert worker.pid != pid
    until(lambda: worker.exit_code() == 0)


def test_none_waits_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: standby.PLENTY - 1)
    waits = Standby("cpu", partial(environment, "cpu", 1), COMMAND)
    waits.prepare()
    assert pid_of(waits) is None


def test_it_ends_with_its_server(tmp_path: Path) -> None:
    script = (
        "import sys, time; from functools import partial; from engine.runners.local import environment\n"
        "from engine.runners.standby import Standby\n"
        f"waits = Standby('cpu', partial(environment, 'cpu', 1), {COMMAND!r}); waits.prepare()\n"
        "print(waits._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        process = psutil.Process(int(server.stdout.readline()))
        assert process.is_running()
        server.kill()
    process.wait(LONG)


def test_a_scheduler_keeps_one_while_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real process, from the server's start to a finished run."""
    monkeypatch.setattr(hardware, "gpu", lambda: None)
    monkeypatch.setattr(hardware, "free_memory", lambda: 16 << 30)
    with Scheduler(tmp_path, standby=True) as scheduler:
        waits = scheduler._standby
        assert waits is not None
        until(lambda: pid_of(waits))
        pid = pid_of(waits)
        run = scheduler.submit(Recipe.model_validate({"model": "demo", "steps": [], "measure": ["size"]}))
        until(lambda: scheduler.store.run(run.id).status.final and not scheduler._watches)
        ended = scheduler.store.run(run.id)
        assert ended.status is Status.SUCCEEDED, ended.reason
        assert read_pid(tmp_path / "runs" / run.id / "attempt-1") == pid
        until(lambda: pid_of(waits) not in (None, pid))
        left = psutil.Process(pid_of(waits))
    assert not left.is_running()
