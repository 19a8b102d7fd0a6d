"""Where a case of the table happens, and what a case is."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from engine import cli
from engine.errors import InputError
from engine.recipes import parse_recipe
from engine.records import Run
from engine.scheduler import Scheduler
from tests.faults.served import ANNA, BEN, Served

# refused: before anything is stored. failed: the run began, and ended with its reason. handled: it ended well.
Ends = Literal["refused", "failed", "handled"]
Body = dict[str, Any]
__all__ = ["ANNA", "BEN", "Body", "Case", "Scene"]


@dataclass
class Scene:
    """A scheduler, the page in front of it, a visitor, a good model to damage, and a neighbour's finished run."""

    scheduler: Scheduler
    page: Served
    model: Path
    neighbour: Run = field(init=False)

    def good(self, **more: object) -> Body:
        """A recipe that works, in about a second."""
        step = {"quantize/rtn": {"group_size": 32}}
        return {"model": str(self.model), "steps": [step], "measure": [], "device": "cpu", **more}

    def copy(self, place: Path) -> Path:
        """A model folder of the case's own."""
        return Path(shutil.copytree(self.model, place / "model"))

    def finish(self, run: Run) -> Run:
        """Wait for a run's end."""
        deadline = time.monotonic() + 60
        while not (found := self.scheduler.store.run(run.id)).status.final or self.scheduler._watch_of(run.id):
            assert time.monotonic() < deadline, f"{found} hangs"
            time.sleep(0.01)
        return found

    def submit(self, body: Body) -> str:
        """The line with which `Scheduler.submit` refuses.

        Raises:
            AssertionError: it takes the recipe.
        """
        try:
            run = self.scheduler.submit(parse_recipe(dict(body)), ANNA)
        except InputError as error:
            return str(error)
        raise AssertionError(f"taken: {self.finish(run).reason}")

    def command_line(self, body: Body, place: Path) -> str:
        """The line with which `python -m engine run` refuses, by its exit code 2."""
        file, out, err = place / "recipe.yaml", io.StringIO(), io.StringIO()
        file.write_text(as_text(body))
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(["run", str(file), "--home", str(place / "home")], lambda home: _Judge(self.scheduler))
        assert code == 2, (code, err.getvalue())
        return err.getvalue().removesuffix("\n")

    def pasted(self, body: Body) -> str:
        """The line in the corner of the page where the recipe is pasted and started."""
        lines = self.page.visitor.start(as_text(body))
        assert len(lines) == 1, lines
        return lines[0]


class _Judge:
    """What the command line needs of a scheduler to be refused by it, without a data folder of its own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.store = scheduler.store
        self.submit, self.resume = scheduler.submit, scheduler.resume

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *error: object) -> None: ...


def as_text(body: Body) -> str:
    """A recipe as YAML; JSON where YAML has no way to say it."""
    try:
        return yaml.safe_dump(body, sort_keys=False, allow_unicode=False)
    except yaml.YAMLError:
        return json.dumps(body)


@dataclass(frozen=True)
class Case:
    """One line of the table: what is done, how it ends, and the essential part of what is said.

    make: the recipe, which may be made with a scene and a folder of the case's own.
    act: instead of a recipe, anything else that returns the line.
    """

    name: str
    ends: Ends
    says: str
    make: Callable[[Scene, Path], Body] | None = None
    act: Callable[[Scene, Path, Any], str] | None = None


def recipe(name: str, ends: Ends, says: str, **body: object) -> Case:
    """A case that is a recipe: the good one with some keys changed."""
    return Case(name, ends, says, make=lambda scene, place: {**scene.good(), **body})


def step(name: str, says: str, method: str, **params: object) -> Case:
    """A case that is one step with a bad setting."""
    return recipe(name, "refused", says, steps=[{method: params}])


def folder(name: str, ends: Ends, says: str, damage: Callable[[Path], object], **body: object) -> Case:
    """A case that is a model folder with a damage."""

    def make(scene: Scene, place: Path) -> Body:
        made = scene.copy(place)
        damage(made)
        return {**scene.good(), "model": str(made), **body}

    return Case(name, ends, says, make=make)


def text(name: str, ends: Ends, says: str, content: bytes | Callable[[Path], object], file: str = "text.txt") -> Case:
    """A case that is a calibration text."""

    def make(scene: Scene, place: Path) -> Body:
        path = place / file
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
        step = {"quantize/gptq": {"group_size": 32, "samples": 2, "sequence_length": 32}}
        return {**scene.good(), "steps": [step], "calibration": str(path)}

    return Case(name, ends, says, make=make)


def config(**changes: object) -> Callable[[Path], None]:
    """A damage: other values in config.json; None takes a key away."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        body: Mapping[str, object] = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))

    return edit
