"""What a text means as a model, and what is known of a repo before anything of it is downloaded."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine import headers, intermediate, preflight
from engine.errors import BadModel, HubError, MaquetteError, NeedsToken, TooBig
from engine.hub import KEPT, Hub
from engine.modes import Limits
from engine.places import DEMO
from engine.quotas import Quotas
from engine.records import Model, Recipe, Status
from engine.scheduler import Scheduler
from engine.snapshots import Snapshots
from engine.sources import Bundled, Folder, Repo, classify
from engine.store import Store
from tests import hub as loopback
from tests.conftest import in_memory
from tests.families import FAMILIES

NAME = "org/tiny"
TOKEN = "hf_canary0123456789"
Edit = Callable[[Path], object]


@pytest.fixture
def server() -> Iterator[loopback.Hub]:
    with loopback.Hub() as hub:
        hub.add(NAME, DEMO / "model", tags=("v1",), downloads=12, licence="mit")
        yield hub


@pytest.fixture
def hub(server: loopback.Hub, tmp_path: Path) -> Hub:
    return Hub(tmp_path / "cache", endpoint=server.url, offline=False)


def model(text: str) -> Model:
    return Model.model_validate(text)


# What a text means

MEANT = [
    ("demo", Bundled()),
    ("/models/a", Folder(Path("/models/a"))),
    ("./a@b", Folder(Path("a@b").absolute())),
    ("org/name", Repo("org/name")),
    ("gpt2", Repo("gpt2")),
    ("org/name@v1.0", Repo("org/name", "v1.0")),
    ("org/name@refs/pr/1", Repo("org/name", "refs/pr/1")),
    (" org/name ", Repo("org/name")),
    ("https://huggingface.co/org/name", Repo("org/name")),
    ("https://huggingface.co/org/name/tree/v2", Repo("org/name", "v2")),
    ("https://hf.co/gpt2?library=x", Repo("gpt2")),
]
REFUSED = [
    (" ", "is empty"),
    ("a\0b", "NUL"),
    ("org name", "cannot be the name of a model of the hub"),
    ("org/../name", "has more than one slash"),
    ("..hidden", "cannot be the name"),
    ("org/..", "cannot be the name"),
    ("a/b/c", "has more than one slash: a model of the hub is owner/name"),
    ("file:///etc/passwd", "is no address of a model at huggingface.co"),
    ("http://169.254.169.254/latest", "is no address of a model at huggingface.co"),
    ("javascript:alert(1)", "is no address of a model"),
    ("https://huggingface.co/datasets/org/name", "not the address of a model"),
    ("<img src=x onerror=alert(1)>", "cannot be the name"),
    ("x" * 97, "too long"),
    ("org/-name", "cannot be the name"),
    ("org/na--me", "cannot be the name"),
    ("org/name.git", "cannot be the name"),
    ("org/na\u043de", "cannot be the name"),
    ("demo@main", "bundled model has no revisions"),
    ("org/name@a..b", "cannot be a revision"),
    ("org/name@-x", "cannot be a revision"),
]


@pytest.mark.parametrize(("text", "meant"), MEANT)
def test_a_text_that_means_a_model(text: str, meant: object) -> None:
    assert classify(model(text)) == meant


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_a_text_that_means_none_is_one_helpful_line(text: str, words: str) -> None:
    with pytest.raises(BadModel) as caught:
        classify(model(text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_folder_that_could_be_a_repo_has_to_be_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadModel, match=r"Write \./org/name for the folder, org/name@main for the hub's"):
        classify(model("org/name"))
    assert classify(model("./org/name")) == Folder(tmp_path / "org" / "name")
    assert classify(model("org/name@main")) == Repo("org/name", "main")
    assert classify(model("org/name"), folders=False) == Repo("org/name")  # who may not look learns nothing
    for path in ("/etc", "./org", "~/x", ".."):
        with pytest.raises(BadModel, match="Folders of the server"):
            classify(model(path), folders=False)


# What the hub says


def test_search_and_pinning(hub: Hub, server: loopback.Hub) -> None:
    server.add("org/gated", DEMO / "model", gated=True, tokens=(TOKEN,), downloads=99)
    first, second = hub.search("org")
    assert (first.name, first.gated, second.name, second.downloads) == ("org/gated", True, NAME, 12)
    assert second.size == (DEMO / "model" / "model.safetensors").stat().st_size // 2 * 2
    commit = server.repos[NAME].commit
    for text in (NAME, f"{NAME}@v1", f"{NAME}@{commit}"):
        assert hub.pin(model(text)) == Model(source=NAME, revision=commit)
    server.rename(NAME, "org/new")
    assert Hub(hub.here.folder, endpoint=server.url, offline=False).pin(model(NAME)).source == "org/new"


def test_what_was_asked_is_believed_for_a_minute(
    hub: Hub, server: loopback.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(model=model(NAME))
    preflight.check(recipe, hub)
    asked = len(server.requests)
    preflight.check(recipe, hub)
    preflight.estimate(recipe, hub)
    assert len(server.requests) == asked
    later = time.monotonic() + KEPT + 1
    monkeypatch.setattr("engine.hub.time.monotonic", lambda: later)
    preflight.check(recipe, hub)
    assert len(server.requests) > asked


REFUSALS = [
    ("org/none", "", {}, NeedsToken, "There is no model org/none on the hub, or it is private"),
    (f"{NAME}@v9", "", {}, BadModel, "org/tiny has no revision 'v9'"),
    ("org/gated", "", {}, NeedsToken, "org/gated is gated: accept its conditions at huggingface.co/org/gated"),
    ("org/gated", "hf_of_another", {}, NeedsToken, "this token's account may not read it"),
    ("org/gated", "hf_expired", {}, NeedsToken, "does not accept this token"),
    ("org/private", "", {}, NeedsToken, "or it is private. Check its name, or give a token"),
    (NAME, "two words", {}, BadModel, "The token holds spaces"),
    (NAME, "", {"status": 429, "retry_after": 9}, HubError, "answers 429 for org/tiny: too many requests"),
    (NAME, "", {"status": 503}, HubError, "answers 503 for org/tiny: it is out of order"),
    (NAME, "", {"truncate": 5}, HubError, "broke off"),
]


@pytest.mark.parametrize(("text", "token", "failure", "error", "words"), REFUSALS)
def test_why_the_hub_says_no(
    hub: Hub, server: loopback.Hub, text: str, token: str, failure: dict[str, int], error: type[MaquetteError],
    words: str,
) -> None:  # fmt: skip
    server.add("org/gated", DEMO / "model", gated=True, tokens=(TOKEN,))
    server.add("org/private", DEMO / "model", private=True, tokens=(TOKEN, "hf_of_another"))
    if failure:
        server.fail(NAME, file="api", **failure)  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        preflight.check(Recipe(model=model(text)), hub, token)
    assert words in str(caught.value)
    assert not token or token not in str(caught.value)


def test_no_hub_at_all(tmp_path: Path) -> None:
    hub = Hub(tmp_path, endpoint="http://127.0.0.1:9", offline=False)
    with pytest.raises(HubError, match=r"The hub at 127\.0\.0\.1:9 cannot be reached: Connection refused"):
        hub.search("x")


def test_an_answer_to_one_token_is_none_to_another(hub: Hub, server: loopback.Hub) -> None:
    server.add("org/private", DEMO / "model", private=True, tokens=(TOKEN,))
    recipe = Recipe(model=model("org/private"))
    preflight.check(recipe, hub, TOKEN)
    with pytest.raises(NeedsToken):
        preflight.check(recipe, hub)


# What headers say of a model that is not here


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_headers_of_a_repo_say_what_those_of_a_folder_do(
    hub: Hub, server: loopback.Hub, tmp_path: Path, family: str
) -> None:
    made = in_memory(FAMILIES[family])
    made.network.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    server.add(f"org/{family}", tmp_path / "model")
    there, here = headers.inspect(hub.origin(model(f"org/{family}"))), headers.inspect(tmp_path / "model")
    assert (there.config, there.tensors, there.bytes) == (here.config, here.tensors, here.bytes)
    assert (there.here, here.here) == (False, True)
    whole = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    estimate = preflight.estimate(Recipe(model=model(f"org/{family}")), hub)
    assert whole < estimate.download < whole + 100_000


def config(**changes: object) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        body = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))

    return edit


def index(text: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return edit


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4000])


BROKEN: list[tuple[Edit, str]] = [
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled weights only"),
    (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "holds only an adapter"),
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (config(model_type="unheard_of"), "model type 'unheard_of' is unknown"),
    (config(model_type="t5"), "is not a causal language model"),
    (config(is_encoder_decoder=True), "is not a causal language model"),
    (
        config(model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Own"}),
        "brings code of its own (auto_map in config.json)",
    ),
    (config(num_hidden_layers=10**6), "num_hidden_layers = 1000000; that cannot be right"),
    (config(quantization_config={"quant_method": "gptq"}), "is already quantized"),
    (index('{"weight_map": {"a": "../../etc/passwd"}}'), "the index names '../../etc/passwd'"),
    (index("{"), "is damaged"),
    (cut, "truncated or not a safetensors file"),
]


@pytest.mark.parametrize(("edit", "words"), BROKEN)
def test_a_repo_that_cannot_be_used_is_refused_before_it_is_downloaded(
    hub: Hub, server: loopback.Hub, tmp_path: Path, edit: Edit, words: str
) -> None:
    shutil.copytree(DEMO / "model", tmp_path / "model")
    edit(tmp_path / "model")
    server.add("org/broken", tmp_path / "model")
    recipe = Recipe.model_validate({"model": "org/broken", "steps": [{"quantize/rtn": {"group_size": 32}}]})
    with pytest.raises(BadModel) as caught:
        preflight.check(recipe, hub)
    assert words in str(caught.value)
    assert server.sent < 200_000


def keep(hub: Hub, name: str, used: float) -> Path:
    """A snapshot of a mebibyte that was last used then."""
    repo = Repo(name, "a" * 40)
    hub.here.want(repo, {"config.json": 1 << 20}, restricted=False)
    folder, blob = hub.here.place(repo) / "snapshots" / repo.revision, hub.here.place(repo) / "blobs" / "x"
    blob.parent.mkdir()
    blob.write_bytes(bytes(1 << 20))
    hub.here.link(repo, "config.json", "x")
    for path in (folder, hub.here.place(repo) / "wanted" / f"{repo.revision}.json"):
        os.utime(path, (used, used))
    return folder


def test_downloads_make_room_for_each_other_but_not_one_in_use(hub: Hub, tmp_path: Path) -> None:
    old, warm, waiting, asked, late = (keep(hub, f"org/{name}", age) for age, name in enumerate("abcde", 1))
    hub.here.use(old)
    with Store(tmp_path / "maquette.db") as store:
        store.add_run(Recipe.model_validate({"model": f"org/c@{'a' * 40}"}))
        store.add_run(Recipe.model_validate({"model": "/a/folder"}))
        free = [0]
        limits = Limits(downloads=3_500_000, floor=1)
        quota = Quotas(tmp_path, store, limits, lambda: free[0], hub, lambda: [warm, Path("/elsewhere/x")])
        free[0] = 1
        quota.look([])
        assert [each.exists() for each in (old, warm, waiting, asked, late)] == [True, True, True, False, False]
        free[0] = 0  # the disk is full
        quota.look([], now=time.monotonic() + 2)
        assert [each.exists() for each in (old, warm, waiting)] == [False, True, True]
    assert not hub.here.place(Repo("org/a")).exists()


def test_on_a_full_disk_kept_steps_make_room_too_but_none_in_use(hub: Hub, tmp_path: Path) -> None:
    queued = Recipe.model_validate({"steps": ["prune/magnitude", {"quantize/rtn": {"group_size": 32}}]})
    names = [*sorted(intermediate.keys(queued, hub)), "linked", "late"]
    kept = [tmp_path / "cache" / "steps" / name for name in names]
    for used, folder in enumerate(kept, 2):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(1 << 20))
        os.utime(folder, (used, used))
    os.link(kept[-2] / "weights", tmp_path / "of a running run")
    old, new = keep(hub, "org/old", 1), keep(hub, "org/new", 99)
    with Store(tmp_path / "maquette.db") as store:
        store.add_run(queued)
        gone = lambda: sum(not each.exists() for each in (old, new, *kept))  # noqa: E731
        quota = Quotas(tmp_path, store, Limits(floor=2), gone, hub)
        assert 3 << 20 <= quota.spare(Recipe()) < 4 << 20
        quota.look([])
        assert [each.exists() for each in (old, kept[-1], new)] == [False, False, True]
        quota._limits = Limits(floor=9)
        quota.look([], now=time.monotonic() + 2)
        assert [each.exists() for each in (new, *kept)] == [False, *[True] * 5, False]
        assert quota.spare(Recipe()) == 0


def test_a_disk_that_is_too_small(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshots, "free", lambda self: 1 << 20)
    with pytest.raises(TooBig, match=r"org/tiny needs 0\.00 GiB on the disk"):
        preflight.check(Recipe(model=model(NAME)), hub)
    with pytest.raises(TooBig, match=r"needs 0\.00 GiB"):
        preflight.estimate(Recipe(model=model(NAME)), hub, room=lambda: 1)


def test_what_makes_room_counts_as_free_before_it_does(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [keep(hub, f"org/old-{number}", number) for number in range(8)]  # of a mebibyte; the other holds 4.5
    monkeypatch.setattr(Snapshots, "free", lambda self: 0)
    scheduler = Scheduler(tmp_path, hub=hub, limits=Limits(floor=1))
    monkeypatch.setattr(scheduler._quotas, "_free", lambda: (16 << 20) * (not old[5].exists()))
    with closing(scheduler.store):
        run = scheduler.submit(Recipe(model=model(NAME)))
        assert run.status is Status.QUEUED
        assert [each.exists() for each in old] == [False] * 6 + [True] * 2
        late = keep(hub, "org/late", 99)  # while the run waited
        monkeypatch.setattr(scheduler._quotas, "_free", lambda: (1 << 20) if late.exists() else (16 << 20))
        scheduler._make_room(run, scheduler._waiting[run.id])
    assert not late.exists()


def test_a_gated_snapshot_is_for_those_whom_the_hub_lets(hub: Hub, server: loopback.Hub, tmp_path: Path) -> None:
    server.add("org/gated", DEMO / "model", gated=True, tokens=(TOKEN,))
    pinned = hub.pin(model("org/gated"))
    repo = Repo(pinned.source, pinned.revision)
    sizes = hub.wanted(hub.origin(pinned, TOKEN))
    hub.here.want(repo, sizes, restricted=True)
    place = hub.here.place(repo) / "snapshots" / repo.revision
    place.mkdir(parents=True)
    for name in sizes:
        shutil.copy(DEMO / "model" / name, place / name)
    assert hub.origin(pinned).folder == place  # one's own machine
    strict = Hub(hub.here.folder, endpoint=server.url, offline=False, trusting=False)
    with pytest.raises(NeedsToken):
        strict.origin(pinned)
    assert strict.origin(pinned, TOKEN).folder == place


def test_what_zeros_bring_is_said_of_a_model_that_is_not_here(hub: Hub) -> None:
    pruned = Recipe.model_validate({"model": NAME, "steps": [{"prune/magnitude": {}}]})
    assert any("No smaller and no faster here" in note for note in preflight.estimate(pruned, hub).notes)
