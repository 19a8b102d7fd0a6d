"""The model picker and what the page asks of the hub, through the handlers' own functions and a hub on loopback."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import BadModel, InputError
from engine.hub import Hub
from engine.modes import Limits, Mode
from engine.places import DEMO
from engine.records import Model, Recipe
from engine.repos import Found
from engine.scheduler import Scheduler
from tests import hub as loopback
from tests.ui.conftest import ANNA, BEN, request
from ui.desk import Desk
from ui.pages import compress, models

NAME = "org/tiny"
TOKEN = "hf_canary0123456789"


@pytest.fixture
def server() -> Iterator[loopback.Hub]:
    with loopback.Hub() as hub:
        hub.add(NAME, DEMO / "model", licence="mit", tags=("v1",))
        yield hub


@pytest.fixture
def scheduler(server: loopback.Hub, tmp_path: Path) -> Iterator[Scheduler]:
    """A real one that was not started: it judges, and runs nothing."""
    hub = Hub(tmp_path / "home" / "cache" / "hub", endpoint=server.url, offline=False)
    made = Scheduler(tmp_path / "home", hub=hub, limits=Limits(folders=False))
    yield made
    made.store.close()


@pytest.fixture
def desk(scheduler: Scheduler) -> Desk:
    """Others can reach this page."""
    return Desk(scheduler.store, scheduler, None, Mode.PUBLIC)


def draft(text: str) -> compress.Draft:
    return compress.as_draft(Recipe(model=Model.model_validate(text)))


def test_a_model_of_the_hub_is_judged_and_queued_at_a_commit(desk: Desk, server: loopback.Hub) -> None:
    shown = compress.judge(desk, draft(f"{NAME}@v1"))
    for words in ("llama", "2,296,064", "4.38 MiB", "mit", server.repos[NAME].commit[:12]):
        assert words in shown
    run_id = compress.submit(desk, draft(f"{NAME}@v1"), False, request(ANNA))
    run = desk.run(run_id, ANNA)
    assert run.recipe.model == Model(source=NAME, revision=server.repos[NAME].commit)
    assert models.used(desk, ANNA) == [NAME]
    assert models.used(desk, BEN) == []  # nor does the cache tell what others have used
    assert models.known(desk, Model.model_validate(f"{NAME}@v1")) == run.recipe.model  # without asking anybody
    assert compress.recipe_from_link(desk, f"model: {NAME}@v1").model.revision == "v1"


def test_folders_are_not_for_those_who_are_far(desk: Desk, tmp_path: Path) -> None:
    for text in ("/etc", "./x", "../x", "~root", str(tmp_path)):
        assert "cannot be used on a shared server" in compress.judge(desk, draft(text))
        with pytest.raises(InputError):
            compress.submit(desk, draft(text), False, request(ANNA))
    assert desk.runs(ANNA) == []


def test_a_gated_model_wants_a_token_and_nothing_shows_it(desk: Desk, server: loopback.Hub) -> None:
    server.add("org/gated", DEMO / "model", gated=True, tokens=(TOKEN,))
    assert "is gated" in compress.judge(desk, draft("org/gated"))
    shown = compress.judge(desk, draft("org/gated"), TOKEN)
    assert "llama" in shown
    assert TOKEN not in shown
    run_id = compress.submit(desk, draft("org/gated"), False, request(ANNA), TOKEN)
    assert TOKEN not in desk.run(run_id, ANNA).model_dump_json()
    with pytest.raises(BadModel, match="The token holds spaces"):
        models.clean("hf x")
    home = desk.scheduler.home
    assert not [path for path in home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_hit_is_one_line() -> None:
    assert models.label(Found("org/a", 1200, 5 << 30, True)) == "org/a · 1,200 downloads · 5.00 GiB · gated"
    assert models.label(Found("org/a")) == "org/a · 0 downloads"


def test_search_as_one_types(desk: Desk, server: loopback.Hub) -> None:
    asked = len(server.requests)
    ((said, hits),) = models.search(desk, "t", "")
    assert (said, hits["visible"]) == ("", False)
    assert len(server.requests) == asked  # one letter asks nobody
    (searching, _), (_, hits) = models.search(desk, "tin", "")
    assert "Searching" in searching
    assert hits["choices"] == [(f"{NAME} · 0 downloads · 4.38 MiB", NAME)]
    assert "has &lt;b&gt; in its name" in str([*models.search(desk, "<b>", "")][-1][0])
    server.fail(file="search", status=503)
    assert "out of order" in str([*models.search(desk, "other", "")][-1][0])


def test_questions_to_the_hub_are_counted_and_what_it_said_lately_is_not(desk: Desk, server: loopback.Hub) -> None:
    desk.scheduler.limits = replace(desk.scheduler.limits, questions=2)

    def judged(text: str, owner: str) -> str:
        return str(compress._assess(desk, draft(text), owner, "", desk.hub(request(owner)))[0])

    def found(text: str, owner: str) -> str:
        return str([*models.search(desk, text, "", desk.hub(request(owner)))][-1])

    for _ in range(5):
        assert "llama" in judged(NAME, ANNA)
        assert NAME in found("tin", ANNA)
    asked = len(server.requests)
    assert "too often in a short time. Try again in" in found("tiny", ANNA)
    assert "too often in a short time. Try again in" in judged(f"{NAME}@v1", ANNA)
    assert len(server.requests) == asked
    assert "llama" in judged(NAME, ANNA)
    assert NAME in found("tiny", BEN)
    assert "llama" in judged(f"{NAME}@v1", BEN)
