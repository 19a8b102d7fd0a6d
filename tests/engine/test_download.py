"""The true download path against a hub on loopback: resumed, retried, watched, refused; what a token never touches."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from engine import pipeline, preflight
from engine.download import Patience
from engine.errors import BadModel, Cancelled, HubError, MaquetteError, NeedsToken, TooBig
from engine.fetch import fetch
from engine.hub import Hub
from engine.places import DEMO
from engine.records import Model, Recipe, Run, Status
from engine.runners.inline import InlineRunner
from engine.scheduler import Scheduler
from tests import hub as loopback
from tests.conftest import Recorder

WEIGHTS = "model.safetensors"
NAME = "org/tiny"
SIZE = (DEMO / "model" / WEIGHTS).stat().st_size
QUICK = Patience(window=0.6, floor=5000.0, tries=2, pause=0.05, longest=2.0)
TOKEN = "hf_canary0123456789"


@pytest.fixture
def server() -> Iterator[loopback.Hub]:
    with loopback.Hub() as hub:
        hub.add(NAME, DEMO / "model")
        yield hub


@pytest.fixture
def hub(server: loopback.Hub, tmp_path: Path) -> Hub:
    return Hub(tmp_path / "cache", endpoint=server.url, offline=False)


def get(hub: Hub, said: Recorder | None = None, token: str = "") -> Path:
    return fetch(hub.pin(Model(source=NAME), token), hub, token, said or Recorder(), lambda: None, QUICK)


def same(folder: Path) -> bool:
    return (folder / WEIGHTS).read_bytes() == (DEMO / "model" / WEIGHTS).read_bytes()


def ranges(server: loopback.Hub) -> list[str]:
    return [each.headers.get("range", "") for each in server.asked("GET", WEIGHTS)]


def partials(hub: Hub) -> list[Path]:
    return list(hub.here.folder.rglob("*.incomplete"))


def test_a_download_tells_its_progress_and_other_tools_read_it(hub: Hub, server: loopback.Hub) -> None:
    said = Recorder()
    folder = get(hub, said)
    assert same(folder)
    assert {file.name for file in folder.iterdir()} == {file.name for file in (DEMO / "model").iterdir()}
    assert said.said[0] == ("phase", {"name": "downloading"})
    progress = [data for kind, data in said.said if kind == "progress"]
    total = sum(file.stat().st_size for file in (DEMO / "model").iterdir())
    assert (progress[-1]["done"], progress[-1]["total"], progress[-1]["unit"]) == (total, total, "B")
    assert {"series", "value", "unit"} == set(next(data for kind, data in said.said if kind == "sample"))
    from huggingface_hub import snapshot_download

    found = snapshot_download(NAME, revision=folder.name, cache_dir=hub.here.folder, local_files_only=True)
    assert Path(found).resolve() == folder.resolve()
    assert hub.here.recents() == [NAME]


def test_offline_with_a_warm_cache(hub: Hub, server: loopback.Hub) -> None:
    asked = Model(source=NAME)
    folder = get(hub)
    hub.remember(asked, hub.pin(asked))
    before = len(server.requests)
    offline = Hub(hub.here.folder, endpoint=server.url, offline=True)
    assert get(offline) == folder
    assert offline.origin(asked).folder == folder
    with pytest.raises(HubError, match=r"org/other is not on this machine.*offline"):
        offline.origin(Model(source="org/other"))
    assert len(server.requests) == before


def test_a_connection_that_breaks_off_is_gone_on_with(hub: Hub, server: loopback.Hub) -> None:
    server.fail(NAME, file=WEIGHTS, method="GET", truncate=3_000_000, times=1)
    said = Recorder()
    assert same(get(hub, said))
    assert ranges(server) == ["", "bytes=3000000-"]
    assert any("broke off at 3,000,000" in text for text in said.logs())


def test_a_killed_download_leaves_what_it_has_for_the_next(hub: Hub, server: loopback.Hub) -> None:
    server.fail(NAME, file=WEIGHTS, method="GET", rate=4_000_000)
    killed: list[int] = []

    def kill_when_under_way() -> None:
        files = partials(hub)
        if not killed and files and files[0].stat().st_size > 500_000:
            killed.extend(each.pid for each in psutil.Process().children() if "engine.download" in each.cmdline())
            psutil.Process(killed[0]).kill()

    with pytest.raises(HubError, match="ended without a word"):
        fetch(hub.pin(Model(source=NAME)), hub, "", Recorder(), kill_when_under_way, QUICK)
    have = partials(hub)[0].stat().st_size
    assert 500_000 < have < SIZE
    server.mend()
    assert same(get(hub))
    assert ranges(server)[-1] == f"bytes={have}-"
    assert partials(hub) == []


@pytest.mark.parametrize(
    ("file", "failure"),
    [(WEIGHTS, {"status": 503}), (WEIGHTS, {"status": 429, "retry_after": 0.1}), ("api", {"status": 500})],
)
def test_a_busy_hub_is_asked_again(hub: Hub, server: loopback.Hub, file: str, failure: dict[str, float]) -> None:
    pinned, said = hub.pin(Model(source=NAME)), Recorder()
    server.fail(NAME, file=file, times=1, **failure)  # type: ignore[arg-type]
    assert same(fetch(pinned, hub, "", said, lambda: None, QUICK))
    assert any(f"answers {failure['status']}" in text and "Going on in" in text for text in said.logs())


@pytest.mark.parametrize(
    ("failure", "error", "words"),
    [
        ({"status": 500}, HubError, "answers 500 for org/tiny"),
        ({"status": 429, "retry_after": 3600}, HubError, "too many requests"),
        ({"status": 403}, NeedsToken, "org/tiny is gated: accept its conditions"),
        ({"status": 404}, BadModel, "has no file model.safetensors"),
        ({"stall": 200_000}, HubError, r"The hub sent [\d,]+ bytes in 1 s"),
        ({"rate": 10}, HubError, r"The hub sent [\d,]+ bytes in 1 s"),
    ],
)
def test_a_hub_that_does_not_deliver(
    hub: Hub, server: loopback.Hub, failure: dict[str, int], error: type[MaquetteError], words: str
) -> None:
    server.fail(NAME, file=WEIGHTS, method="GET", **failure)  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        get(hub)
    assert hub.here.recents() == []
    assert not [each for each in psutil.Process().children() if "engine.download" in each.cmdline()]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"truncate": 3_000_000}, "broke off at 3,000,000"),
        ({"stall": 3_000_000, "rate": 6_000_000}, r"The hub sent [\d,]+ bytes in 1 s"),
    ],
)
def test_a_mirror_that_begins_again_and_gets_no_further_is_given_up(
    hub: Hub, server: loopback.Hub, how: dict[str, int], words: str
) -> None:
    pinned = hub.pin(Model(source=NAME))
    server.ranges = False
    server.fail(NAME, file=WEIGHTS, method="GET", times=6, **how)  # type: ignore[arg-type]
    with pytest.raises(HubError, match=words):
        fetch(pinned, hub, "", Recorder(), lambda: None, QUICK)
    assert len(ranges(server)) < 6


def test_content_that_is_not_what_its_name_says_is_thrown_away(hub: Hub, server: loopback.Hub) -> None:
    path = DEMO / "model" / WEIGHTS
    server.repos[NAME].hashes[str(path), path.stat().st_mtime_ns] = "0" * 64
    with pytest.raises(HubError, match=r"model\.safetensors arrived damaged"):
        get(hub)
    assert partials(hub) == []


def test_a_token_does_not_follow_to_another_host(hub: Hub, server: loopback.Hub) -> None:
    server.add(NAME, DEMO / "model", gated=True, tokens=(TOKEN,))
    server.fail(NAME, file=WEIGHTS, redirect=True)
    assert same(get(hub, token=TOKEN))
    assert {each.token for each in server.asked("HEAD", WEIGHTS)} == {TOKEN}
    assert {each.method for each in server.elsewhere} == {"GET"}
    assert {each.token for each in server.elsewhere} == {""}


def test_cancelling_ends_the_process_and_gives_the_disk_back(hub: Hub, server: loopback.Hub) -> None:
    server.fail(NAME, file=WEIGHTS, method="GET", rate=2_000_000)

    def cancel() -> None:
        if partials(hub):
            raise Cancelled("Cancelled.")

    pinned = hub.pin(Model(source=NAME))
    with pytest.raises(Cancelled):
        fetch(pinned, hub, "", Recorder(), cancel, QUICK)
    assert not [each for each in psutil.Process().children() if "engine.download" in each.cmdline()]
    from engine.sources import Repo

    hub.here.discard(Repo(pinned.source, pinned.revision))
    assert not list(hub.here.folder.glob("models--*"))


def test_models_that_were_kept_long_enough_go_but_for_those_that_runs_wait_for(hub: Hub) -> None:
    folder = get(hub)
    came = folder.stat().st_mtime
    assert hub.here.evict(came - 1, ()) == []
    assert hub.here.evict(came + 1, {NAME}) == []
    assert same(folder)
    assert hub.here.evict(came + 1, {"other/name"}) == [NAME]
    assert not list(hub.here.folder.glob("models--*"))


# Through the scheduler, with real workers


def wait(scheduler: Scheduler, run: Run, seconds: float = 120) -> Run:
    until = time.monotonic() + seconds
    while not (now := scheduler.store.run(run.id)).status.final:
        assert time.monotonic() < until, scheduler.store.events(run.id)[-3:]
        time.sleep(0.1)
    return now


def below(folder: Path, needle: str) -> list[str]:
    """The files that hold a text."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and needle.encode() in path.read_bytes():
            found.append(str(path))
    return found


def test_from_a_search_to_an_artifact_with_a_token_that_stands_nowhere(
    server: loopback.Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.add(NAME, DEMO / "model", gated=True, tokens=(TOKEN,), tags=("v1",))
    server.fail(NAME, file=WEIGHTS, redirect=True)
    home = tmp_path / "home"
    hub = Hub(home / "cache" / "hub", endpoint=server.url, offline=False)
    (found,) = hub.search("tiny")
    assert found.gated
    recipe = Recipe.model_validate(
        {"model": f"{found.name}@v1", "steps": [{"quantize/rtn": {"bits": 8}}], "measure": ["size"]}
    )
    with Scheduler(home, hub=hub) as scheduler:
        with pytest.raises(NeedsToken, match="is gated"):
            scheduler.submit(recipe)
        run = scheduler.submit(recipe, token=TOKEN)
        assert run.recipe.model.revision == server.repos[NAME].commit  # pinned
        ended = wait(scheduler, run)
        assert (ended.status, ended.reason) == (Status.SUCCEEDED, "")
        assert ended.artifact is not None
        manifest = json.loads((Path(ended.artifact) / "MANIFEST.json").read_text())
        assert manifest["recipe"]["model"]["revision"] == run.recipe.model.revision
        phases = [event.data["name"] for event in scheduler.store.events(run.id, kinds=("phase",))]
        assert phases[:3] == ["downloading", "checking", "loading"]
        assert scheduler._waiting == {}
        assert list(scheduler.stream([f"{NAME}@v1"], "Once", max_tokens=1))[-1][1] == "done"  # the snapshot serves too
    assert below(home, TOKEN) == []
    assert below(home, TOKEN[3:]) == []
    assert TOKEN not in caplog.text
    assert server.elsewhere
    assert {each.token for each in server.elsewhere} == {""}
    assert TOKEN in {each.token for each in server.asked("HEAD", WEIGHTS)}


def taught(teachers: str, **more: object) -> Recipe:
    params = {"steps": 1, "batch": 2, "sequence_length": 32, "teachers": teachers, **more}
    return Recipe.model_validate({"model": NAME, "steps": [{"distill/logits": params}], "measure": []})


def test_teachers_and_students_of_the_hub_are_pinned_and_downloaded_as_the_model_is(
    server: loopback.Hub, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    server.add("org/teacher", tiny_folder(), tags=("v1",))
    server.add("org/pupil", tiny_folder(num_hidden_layers=2), private=True, tokens=(TOKEN,))
    home = tmp_path / "home"
    hub = Hub(home / "cache" / "hub", endpoint=server.url, offline=False)
    recipe = taught("demo org/teacher@v1", student="folder", folder="org/pupil")
    with Scheduler(home, hub=hub, runner=InlineRunner(partial(pipeline.run, alone=True))) as scheduler:
        with pytest.raises(NeedsToken, match="org/pupil on the hub, or it is private"):
            scheduler.submit(recipe)
        run = scheduler.submit(recipe, token=TOKEN)
        commits = {name: each.commit for name, each in server.repos.items()}
        assert run.recipe.steps[0].params["teachers"] == f"demo org/teacher@{commits['org/teacher']}"
        assert run.recipe.steps[0].params["folder"] == f"org/pupil@{commits['org/pupil']}"
        assert partials(hub) == []  # nothing but headers before the run
        ended = wait(scheduler, run)
        assert (ended.status, ended.reason) == (Status.SUCCEEDED, "")
        phases = [event.data["name"] for event in scheduler.store.events(run.id, kinds=("phase",))]
        assert phases[:4] == ["downloading"] * 3 + ["checking"]
        assert sorted(hub.here.recents()) == ["org/pupil", "org/teacher", NAME]
        manifest = json.loads((Path(str(ended.artifact)) / "MANIFEST.json").read_text())
        assert manifest["recipe"]["steps"][0]["params"] == run.recipe.steps[0].params
        blocks = json.loads((Path(str(ended.artifact)) / "config.json").read_text())["num_hidden_layers"]
        assert blocks == 2
    assert below(home, TOKEN) == []
    offline = Hub(hub.here.folder, endpoint=server.url, offline=True)  # all of it is here now
    asked = len(server.requests)
    with Scheduler(home, hub=offline, runner=InlineRunner(lambda recipe, folder, emit, check: None)) as scheduler:
        again = scheduler.submit(recipe)
        assert again.recipe == run.recipe
        assert wait(scheduler, again).status is Status.SUCCEEDED
    assert len(server.requests) == asked


def test_teachers_of_the_hub_are_refused_before_anything_is_downloaded(
    server: loopback.Hub, hub: Hub, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    other, adapter, quantized = tiny_folder(), tmp_path / "adapter", tiny_folder()
    body = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(body.replace('"the"', '"teh"').replace('"Ġthe"', '"Ġteh"'))
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    for name, folder in {"other": other, "adapter": adapter, "quantized": quantized, "good": tiny_folder()}.items():
        server.add(f"org/{name}", folder)
    for recipe, words in (
        (taught("org/other"), "org/other has another tokenizer"),
        (taught("org/adapter"), "org/adapter holds only an adapter"),
        (taught("", student="folder", folder="org/quantized"), "is quantized; its codes cannot be trained"),
        (taught("org/none"), "There is no model org/none on the hub"),
        (taught("org/good@v9"), "org/good has no revision 'v9'"),
        (taught("", student="folder", folder="x" * 97), "too long"),
    ):
        with pytest.raises(MaquetteError, match=words):
            preflight.check(recipe, hub)
    both, alone = preflight.check(taught("org/good"), hub), preflight.check(taught(""), hub)
    assert both.download - alone.download > (server.repos["org/good"].folder / WEIGHTS).stat().st_size
    assert {each.headers.get("range") for each in server.asked("GET", WEIGHTS)} == {"bytes=0-65535"}
    few = Hub(hub.here.folder, endpoint=server.url, offline=False)
    few.here.free = lambda: both.download - 1
    with pytest.raises(TooBig, match=r"org/tiny, org/good needs .* on the disk"):
        preflight.check(taught("org/good"), few)


def test_a_run_whose_token_is_forgotten_fails_so_that_it_can_be_resumed(server: loopback.Hub, tmp_path: Path) -> None:
    server.add(NAME, DEMO / "model", private=True, tokens=(TOKEN,))
    home = tmp_path / "home"
    hub = Hub(home / "cache" / "hub", endpoint=server.url, offline=False)
    recipe = Recipe.model_validate({"model": NAME, "measure": []})
    waiting = Scheduler(home, hub=hub)  # never started: the server stops before the run's turn
    run = waiting.submit(recipe, token=TOKEN)
    waiting.store.close()
    runner = InlineRunner(lambda recipe, folder, emit, check: None)  # the download is real, the work behind it is not
    with Scheduler(home, hub=hub, runner=runner) as scheduler:
        ended = wait(scheduler, run)
        assert ended.status is Status.FAILED
        assert "Resume the run with it." in ended.reason
        while scheduler.status()["running"]:  # its process has yet to exit
            time.sleep(0.05)
        with pytest.raises(NeedsToken, match="or it is private"):
            scheduler.resume(run.id)
        scheduler.resume(run.id, token=TOKEN)
        assert wait(scheduler, run).status is Status.SUCCEEDED
        assert hub.folder_of(run.recipe.model).is_dir()
    assert below(home, TOKEN) == []


def test_a_cancelled_run_gives_back_what_it_had_downloaded(server: loopback.Hub, tmp_path: Path) -> None:
    server.fail(NAME, file=WEIGHTS, method="GET", rate=400_000)
    home = tmp_path / "home"
    hub = Hub(home / "cache" / "hub", endpoint=server.url, offline=False)
    with Scheduler(home, hub=hub) as scheduler:
        run = scheduler.submit(Recipe.model_validate({"model": NAME, "measure": []}))
        until = time.monotonic() + 60
        while not partials(hub):
            assert time.monotonic() < until
            time.sleep(0.05)
        began = time.monotonic()
        scheduler.cancel(run.id)
        assert wait(scheduler, run).status is Status.CANCELLED
        assert time.monotonic() - began < 5
    assert not list(hub.here.folder.glob("models--*"))
    assert not (home / "runs" / run.id).exists()


@pytest.mark.parametrize("problem", ["has the shape (300, 256), the config says (384, 256)", "do not fit the config"])
def test_weights_that_do_not_fit_their_config_are_not_downloaded(
    server: loopback.Hub, tmp_path: Path, problem: str
) -> None:
    folder = shutil.copytree(DEMO / "model", tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:300].contiguous()
    if "shape" not in problem:
        del tensors[name]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    server.add("org/odd", folder)
    hub = Hub(tmp_path / "home" / "cache" / "hub", endpoint=server.url, offline=False)
    runner = InlineRunner(lambda recipe, folder, emit, check: None)
    with Scheduler(tmp_path / "home", hub=hub, runner=runner) as scheduler:
        ended = wait(scheduler, scheduler.submit(Recipe.model_validate({"model": "org/odd", "measure": []})))
    assert ended.status is Status.REFUSED
    assert problem in ended.reason
    assert {each.headers["range"] for each in server.asked("GET", WEIGHTS)} == {"bytes=0-65535"}
    assert not partials(hub)
