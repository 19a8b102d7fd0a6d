"""The true download path against a hub on loopback: resumed, retried, watched, refused; and what a token never touches."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.download import Patience
from engine.fetch import fetch
from engine.hub import Hub
from engine.preflight import DEMO
from engine.records import Model
from tests import hub as loopback
from tests.conftest import Recorder

WEIGHTS = "model.safetensors"
NAME = "org/tiny"
QUICK = Patience(window=1.0, floor=2000.0, tries=3, pause=0.05, longest=2.0)
TOKEN = "hf_canary0123456789"


@pytest.fixture
def server() -> Iterator[loopback.Hub]:
    with loopback.Hub() as hub:
        hub.add(NAME, DEMO / "model")
        yield hub


@pytest.fixture
def hub(server: loopback.Hub, tmp_path: Path) -> Hub:
    return Hub(tmp_path / "cache", endpoint=server.url, offline=False)


def get(hub: Hub, said: Recorder | None = None, token: str = "", patience: Patience = QUICK) -> Path:
    return fetch(hub.pin(Model(source=NAME), token), hub, token, said or Recorder(), lambda: None, patience)


def same(folder: Path) -> bool:
    return (folder / WEIGHTS).read_bytes() == (DEMO / "model" / WEIGHTS).read_bytes()


def test_a_download_tells_its_progress_and_other_tools_read_it(hub: Hub, server: loopback.Hub) -> None:
    said = Recorder()
    folder = get(hub, said)
    assert same(folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        file.name for file in (DEMO / "model").iterdir() if file.is_file()
    )
    progress = [data for kind, data in said.said if kind == "progress"]
    total = sum(file.stat().st_size for file in (DEMO / "model").iterdir())
    assert progress[-1] == {
        "done": total,
        "total": total,
        "unit": "B",
        **({"eta": 0.0} if "eta" in progress[-1] else {}),
    }
    assert ("phase", {"name": "downloading"}) in said.said
    from huggingface_hub import snapshot_download

    found = snapshot_download(NAME, revision=folder.name, cache_dir=hub.here.folder, local_files_only=True)
    assert Path(found) == folder
    before = len(server.requests)
    assert get(Hub(hub.here.folder, endpoint=server.url, offline=True)) == folder  # warm, and main is remembered
    assert len(server.requests) == before
