"""Other formats, as the Runs tab offers them and its buttons make them: for the run that is shown, by its owner."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import gradio as gr
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine import export
from engine.attempts import EXPORTS
from engine.errors import Cancelled, TooBig
from engine.exporting import offered
from engine.files import MANIFEST
from engine.records import Run
from tests.ui import fakes
from tests.ui.conftest import ANNA, BEN, request
from tests.ui.fakes import FakeScheduler
from tests.ui.hosts import close_no_loops
from ui import language
from ui.desk import Desk
from ui.downloads import Downloads
from ui.edge import COOKIE
from ui.journal import Journal
from ui.language import CHINESE, ENGLISH
from ui.pages import exports, runs
from ui.wording import DICTIONARIES

Handlers = Mapping[str, Callable[..., Iterator[object]]]
UNPAINTED = ("", "", "")


@pytest.fixture
def handlers(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Handlers:
    """What the section's buttons do, by name."""
    close_no_loops(monkeypatch)
    with gr.Blocks() as page:
        exports.build(desk, gr.State(""), gr.State(UNPAINTED), runs.shown)
    return {str(function.name): function.fn for function in page.fns.values() if function.fn is not None}


@pytest.fixture
def packed(scheduler: FakeScheduler) -> Run:
    """A run of Anna's whose artifact says that it holds symmetric codes of 4 bits."""
    run = fakes.finished(scheduler, fakes.GPTQ, ANNA)
    group = {"targets": ["Linear"], "weights": {"num_bits": 4}, "input_activations": None}
    stored = {"format": "pack-quantized", "config_groups": {"group_0": group}}
    folder = Path(str(run.artifact))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": stored}))
    index = {"weight_map": {"model.layers.0.q_proj.weight_packed": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return run


def offers(desk: Desk, run: Run, owner: str) -> tuple[bool, list[str]]:
    """Whether the Runs tab shows the section, and which formats it has."""
    found = runs.refresh(desk, Journal(desk.store), owner, run.id, "", UNPAINTED)
    section, choice = cast(list[dict[str, object]], found[-2:])
    names = [name for _, name in cast(list[tuple[str, str]], choice["choices"])]
    assert choice["value"] == (names[0] if names else None)
    return bool(section["visible"]), names


def test_only_its_owner_is_offered_what_the_run_can_be_exported_to(
    desk: Desk, scheduler: FakeScheduler, packed: Run
) -> None:
    assert offers(desk, packed, ANNA) == (True, ["awq", "gptq", "gptq_v2", "gguf"])
    scheduler.share(packed.id, True, ANNA)
    desk.open_link([packed.id], BEN)
    assert packed.id in str(runs.refresh(desk, Journal(desk.store), BEN, packed.id, "", UNPAINTED)[1])
    assert offers(desk, packed, BEN) == (False, [])
    (Path(str(packed.artifact)) / "config.json").write_text('{"model_type": "opt"}')
    assert offers(desk, packed, ANNA) == (False, [])
    assert offers(desk, fakes.running(scheduler, fakes.GPTQ, ANNA), ANNA) == (False, [])
    scheduler.store.expire(packed.id)
    assert offers(desk, packed, ANNA) == (False, [])


def test_every_format_has_words_in_both_languages(packed: Run) -> None:
    for words in (DICTIONARIES[ENGLISH], DICTIONARIES[CHINESE]):
        for name in export.formats():
            assert {f"format.{name}", f"format.{name}.for"} <= set(words)
    with language.use(CHINESE):
        _, choice = cast(list[dict[str, list[tuple[str, str]]]], exports.offer(packed))
    assert [name for _, name in choice["choices"]] == offered(Path(str(packed.artifact)))
    assert all("可读取" in label for label, _ in choice["choices"])


def test_an_export_is_a_file_of_the_run_for_whoever_may_see_it(
    desk: Desk, handlers: Handlers, scheduler: FakeScheduler, packed: Run
) -> None:
    client = TestClient(Starlette(routes=Downloads(desk).routes()))

    def get(owner: str, name: str = "awq.zip") -> int:
        return client.get(f"/runs/{packed.id}/{name}", cookies={COOKIE: owner}).status_code

    journal = Journal(desk.store)
    before = runs.news(desk, journal, ANNA, packed.id, "")
    assert (get(ANNA), get(ANNA, "nothing.zip")) == (404, 404)
    working, done = map(str, handlers["export"](packed.id, UNPAINTED, "awq", 1.0, request(ANNA)))
    assert "Exporting GPTQ 4 bit as AWQ" in working
    assert f'href="./runs/{packed.id}/awq.zip"' in done
    assert runs.news(desk, journal, ANNA, packed.id, "") != before
    assert f'href="./runs/{packed.id}/awq.zip"' in str(runs.describe(desk, journal, ANNA, packed))
    assert (get(ANNA), get(BEN), get("")) == (200, 404, 404)
    scheduler.share(packed.id, True, ANNA)
    assert get(BEN) == 200
    answer = client.get(f"/runs/{packed.id}/awq.zip", cookies={COOKIE: ANNA})
    assert f'filename="maquette-{packed.id}-awq.zip"' in answer.headers["content-disposition"]
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    files = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    assert files["README.md"] == b"# As awq"  # its own: the numbers are those of other files
    manifest = json.loads(files["MANIFEST.json"])["files"]
    assert {name: each["sha256"] for name, each in manifest.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != "MANIFEST.json"
    }


def test_what_an_export_says_of_itself_is_shown_in_the_readers_language(
    desk: Desk, scheduler: FakeScheduler, packed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "Written in BF16, for groups of 16 weights fill no blocks of 32: model.layers.0.<b>."
    fakes.export(packed, "gguf")
    manifest = Path(str(packed.artifact)).parent / EXPORTS / "gguf" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "notes": [said]}))
    monkeypatch.setattr(scheduler, "export", lambda *asked, **more: iter([1.0]), raising=False)
    *_, last = exports.go(desk, ANNA, packed.id, "gguf", threading.Event())
    assert f"<li>{said.replace('<b>', '&lt;b&gt;')}</li>" in str(last)
    with language.use(CHINESE):
        *_, last = exports.go(desk, ANNA, packed.id, "gguf", threading.Event())
    assert "因为每组 16 个权重不能填满 32 个一块：model.layers.0." in str(last)


def test_what_goes_wrong_stays_on_the_page_as_one_line(
    handlers: Handlers, scheduler: FakeScheduler, packed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*asked: object, **more: object) -> Iterator[float]:
        yield 0.0
        raise TooBig("The disk has <b>no</b> room.")

    monkeypatch.setattr(scheduler, "export", full, raising=False)
    *_, last = handlers["export"](packed.id, UNPAINTED, "awq", 1.0, request(ANNA))
    assert 'class="mq-notice bad"' in str(last)
    assert "&lt;b&gt;" in str(last)
    scheduler.share(packed.id, True, ANNA)
    (refused,) = handlers["export"](packed.id, UNPAINTED, "awq", 2.0, request(BEN, session="s2"))
    assert "only its owner can change it" in str(refused)
    scheduler.share(packed.id, False, ANNA)
    (unknown,) = handlers["export"](packed.id, UNPAINTED, "awq", 3.0, request(BEN, session="s2"))
    assert "Unknown run" in str(unknown)
    assert "GPTQ" not in str(unknown)


def test_stop_ends_the_export_of_the_page_that_asks_and_of_no_other(
    handlers: Handlers, scheduler: FakeScheduler, packed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(*asked: object, stop: threading.Event, **more: object) -> Iterator[float]:
        while not stop.is_set():
            yield 1.0
        raise Cancelled("Stopped; nothing of the export is left.")

    monkeypatch.setattr(scheduler, "export", endless, raising=False)
    steps = handlers["export"]("", ("", "", f"{packed.id} x"), "gptq", 5.0, request(ANNA))
    assert "as GPTQ, for 1.0 s" in str(next(steps))
    handlers["end"](6.0, request(ANNA, session="s2"))
    assert "as GPTQ, for 1.0 s" in str(next(steps))
    handlers["end"](6.0, request(ANNA))
    (last,) = steps
    assert "Stopped; nothing of the export is left." in str(last)


def test_starts_are_counted(desk: Desk, handlers: Handlers, scheduler: FakeScheduler, packed: Run) -> None:
    scheduler.limits = replace(scheduler.limits, starts=1)
    answers = [list(handlers["export"](packed.id, UNPAINTED, name, 1.0, request(ANNA))) for name in ("awq", "gptq")]
    assert [len(each) for each in answers] == [2, 1]
    assert "in 60 seconds" in str(answers[1])
