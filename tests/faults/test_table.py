"""Every case of the table ends as it says: in one line, without a trace, and nobody else notices."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import artifacts
from engine.attempts import attempt_folder
from engine.recipes import parse_recipe
from engine.records import Status
from tests.faults import hub_cases, machine_cases, repository_cases, setting_cases, web_cases
from tests.faults.scene import ANNA, Body, Case, Scene

TABLE: list[Case] = [
    *repository_cases.CASES, *setting_cases.CASES, *machine_cases.CASES, *web_cases.CASES, *hub_cases.CASES,
]  # fmt: skip
LONGEST = 600  # characters of a line


def check_line(line: str, case: Case) -> None:
    """One line, no traceback, the essential part."""
    said = html.unescape(line)
    assert html.unescape(case.says) in said
    assert "\n" not in said
    assert len(said) <= LONGEST
    for word in ("Traceback", "Internal error", "went wrong on our side", 'File "'):
        assert word not in said


def refuse(case: Case, body: Body, scene: Scene, place: Path) -> None:
    """Nothing is begun, whichever way the recipe comes."""
    for line in (scene.submit(body), scene.command_line(body, place), scene.pasted(body)):
        check_line(line, case)
    assert scene.scheduler.store.runs(ANNA) == []
    assert scene.page.runs(ANNA) == [scene.page.hers]


def work(case: Case, body: Body, scene: Scene) -> None:
    """The run begins, and ends without a result and with its reason, or well."""
    run = scene.finish(scene.scheduler.submit(parse_recipe(dict(body)), ANNA))
    attempt = attempt_folder(scene.scheduler.home, run.id, run.attempt)
    if case.ends == "handled":
        assert run.status is Status.SUCCEEDED, run.reason
        artifacts.verify(Path(str(run.artifact)))
    else:
        assert run.status in (Status.FAILED, Status.REFUSED)
        check_line(run.reason, case)
        assert run.artifact is None
        assert not (attempt / "artifact").exists()
    scene.scheduler.delete(run.id, ANNA)


@pytest.fixture
def afterwards(scene: Scene) -> Iterator[None]:
    """What a case leaves behind when it goes wrong does not spoil the next."""
    yield
    for run in scene.scheduler.store.runs(ANNA):
        scene.scheduler.cancel(run.id, ANNA)
        scene.finish(run)
        scene.scheduler.delete(run.id, ANNA)


@pytest.mark.usefixtures("untouched", "afterwards")
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_fault(case: Case, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.act is not None:
        check_line(case.act(scene, tmp_path, monkeypatch), case)
    else:
        assert case.make is not None
        body = case.make(scene, tmp_path)
        if case.ends == "refused":
            refuse(case, body, scene, tmp_path)
        else:
            work(case, body, scene)
    assert not (tmp_path / "it-ran").exists()


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 80
    assert len({case.name for case in TABLE}) == len(TABLE)
