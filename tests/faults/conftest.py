"""One real scheduler, one real page on loopback and a neighbour's run for the whole table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import JsonValue

from engine import pipeline, verify
from engine.methods import Emit
from engine.records import Recipe, Run, Status
from engine.runners.inline import InlineRunner
from engine.scheduler import Scheduler
from tests.conftest import in_memory, tiny_config
from tests.faults.scene import BEN, Scene
from tests.faults.served import Served


def _child(request: dict[str, JsonValue], folder: Path, emit: Emit, check_cancelled: object) -> None:
    """The pipeline's children in this process: the same work without seconds of importing."""
    if request["kind"] == "verify":
        verify.verify(request)
    else:
        pipeline.measure(request, emit)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model folder, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("good") / "model"
    made = in_memory(tiny_config())
    made.network.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`python app.py` in a process of its own, with a run of Ben's and one of the visitor's in its store."""
    served = Served(tmp_path_factory.mktemp("page"))
    yield served
    served.close()


@pytest.fixture(scope="package")  # no longer: other tests want children that are processes
def scene(tmp_path_factory: pytest.TempPathFactory, page: Served, model: Path) -> Iterator[Scene]:
    """The scheduler, Ben's finished run in it, and the page beside it."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Scheduler(tmp_path_factory.mktemp("home"), runner=InlineRunner()) as scheduler,
    ):
        patch.setattr(pipeline, "child", _child)
        made = Scene(scheduler, page, model)
        made.neighbour = made.finish(scheduler.submit(Recipe.model_validate(made.good()), BEN))
        assert made.neighbour.status is Status.SUCCEEDED, made.neighbour.reason
        page.wait()
        yield made


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def untouched(scene: Scene) -> Iterator[Run]:
    """The neighbour's run, the same afterwards, row and files."""
    run, files = scene.neighbour, digests(scene.scheduler.home / "runs" / scene.neighbour.id)
    yield run
    assert scene.scheduler.store.run(run.id) == run
    assert digests(scene.scheduler.home / "runs" / run.id) == files
