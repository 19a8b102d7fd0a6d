"""ZeroGPU's runner with the decorator in its place: passing through, and in a daemonic fork as on Spaces."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import pytest

from engine import artifacts, preflight
from engine.errors import TooBig
from engine.fit import Need
from engine.methods import Emit
from engine.records import Recipe, Run, Status
from engine.runners import zero
from engine.scheduler import Scheduler
from tests import small_model

ROOT = Path(__file__).parents[2]
FORKED = """
import multiprocessing, pathlib, sys, time
from engine import artifacts
from engine.recipes import parse_recipe
from engine.runners import zero
from engine.scheduler import Scheduler

def gpu(work):  # as the package spaces does it
    def call(path):
        process = multiprocessing.get_context("fork").Process(target=work, args=(path,), daemon=True)
        process.start()
        process.join()
    return call

home, model = map(pathlib.Path, sys.argv[1:])
recipe = parse_recipe({"model": str(model / "model"), "measure": ["size"], "calibration": str(model / "text.txt"),
                       "steps": [{"quantize/rtn": {"group_size": 32}}], "device": "cpu"})
with Scheduler(home, runner=zero.ZeroRunner(gpu), refuses=zero.check) as scheduler:
    run = scheduler.submit(recipe)
    while not (run := scheduler.store.run(run.id)).status.final:
        time.sleep(0.05)
    samples = [e for e in scheduler.store.events(run.id, kinds=("sample",)) if e.data["value"] > 1e8]
    print(run.status, run.reason, len(samples) > 0, sorted(scheduler.store.measurements(run.id))[:1])
    artifacts.verify(pathlib.Path(run.artifact))
    import torch
    assert not torch.cuda.is_initialized()
"""


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(scheduler: Scheduler, run: Run) -> Run:
    until(lambda: scheduler.store.run(run.id).status.final)
    return scheduler.store.run(run.id)


def test_a_run_inside_a_daemonic_fork(tmp_path: Path) -> None:
    small_model.write(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", FORKED, tmp_path / "home", tmp_path / "small"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "succeeded  True ['size.bits_per_weight']", done.stdout + done.stderr


def test_a_run_where_the_decorator_passes_through(tmp_path: Path) -> None:
    small_model.write(tmp_path)
    body = {"model": str(tmp_path / "model"), "steps": [{"quantize/rtn": {"group_size": 32}}], "measure": []}
    with Scheduler(tmp_path / "home", runner=zero.ZeroRunner()) as scheduler:
        run = ended(scheduler, scheduler.submit(Recipe.model_validate({**body, "device": "cpu"})))
        assert run.status is Status.SUCCEEDED, run.reason
        artifacts.verify(Path(str(run.artifact)))


def test_cancelled_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "check", lambda *asked: None)

    def endless(recipe: Recipe, folder: Path, emit: Emit, check: Callable[[], None]) -> None:
        emit("log", {"text": "works"})
        while True:
            check()
            time.sleep(0.01)

    with Scheduler(tmp_path, runner=zero.ZeroRunner(lambda work: work, endless)) as scheduler:
        run = scheduler.submit(Recipe())
        while not scheduler.store.events(run.id, kinds=("log",)):
            time.sleep(0.01)
        scheduler.cancel(run.id)
        assert ended(scheduler, run).status is Status.CANCELLED


def test_who_asked_is_known_to_the_call_and_why_there_was_none_to_the_asker(tmp_path: Path) -> None:
    visitor: ContextVar[str] = ContextVar("visitor", default="nobody")

    def refuse(path: str) -> None:
        raise RuntimeError(f"{visitor.get()} has no time left.")

    with Scheduler(tmp_path, runner=zero.ZeroRunner(lambda work: refuse)) as scheduler:
        token = visitor.set("ada")
        run = scheduler.submit(Recipe())
        visitor.reset(token)
        run = ended(scheduler, run)
        assert run.status is Status.FAILED
        assert run.reason.endswith("Resume it later. It said: ada has no time left.")
        until(lambda: not scheduler._watches)
        assert ended(scheduler, scheduler.resume(run.id)).reason == run.reason.replace("ada", "nobody")


def test_what_one_call_cannot_hold_is_refused(tmp_path: Path) -> None:
    estimate = preflight.estimate(Recipe())
    zero.check(Recipe(), estimate)
    with pytest.raises(TooBig, match="on ZeroGPU a run has 120"):
        zero.check(Recipe(), replace(estimate, times={"steps": 4000.0}))
    with pytest.raises(TooBig, match="on ZeroGPU 4 can be used"):
        zero.check(Recipe(), replace(estimate, needs=(Need("compress", {"weights": 9 << 30}),)))


@pytest.mark.parametrize(("said", "chosen"), [("true", "ZeroRunner"), ("", "LocalRunner")])
def test_the_environment_chooses(said: str, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", said)
    scheduler = Scheduler(tmp_path)
    assert type(scheduler._runner).__name__ == chosen
    scheduler.store.close()


def test_the_readme_tells_spaces_what_they_need() -> None:
    import yaml

    front = yaml.safe_load((ROOT / "README.md").read_text().split("---")[1])
    assert {key: front[key] for key in ("sdk", "app_file", "python_version")} == {
        "sdk": "gradio", "app_file": "app.py", "python_version": "3.12"
    }  # fmt: skip
    assert (ROOT / front["app_file"]).is_file()
    assert json.dumps(front["sdk_version"]) >= json.dumps("6.30.0")
