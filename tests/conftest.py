"""What all tests share: tiny models made in memory or in a folder, and a context that records what was said."""

from __future__ import annotations

import contextlib
import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MAQUETTE_NICE", "0")  # tests wait for workers; beside other tests they would starve

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from xdist.scheduler import LoadFileScheduling

from engine.checkpoint import attention
from engine.experts import separate
from engine.methods import Context
from engine.models import LoadedModel, load_tokenizer
from engine.preflight import DEMO
from engine.records import EventKind
from engine.wide import Everywhere, multiplies_bfloat16, widen

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


# Whose blocks differ most. `make families` tests the others too, everywhere; the files in ALWAYS test all.
DISTINCT = ("llama", "gpt2", "falcon", "gemma3", "mixtral")
ALWAYS = ("test_families", "test_every_way")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all-families`: in every test."""
    parser.addoption("--all-families", action="store_true", help="test what is alike in all families on all of them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep `make test` within a quarter of an hour: what is alike in all families is tested on those that differ."""
    if config.getoption("--all-families"):
        return
    left = [item for item in items if item.path.stem not in ALWAYS and _family(item) not in (None, *DISTINCT)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


def _family(item: pytest.Item) -> str | None:
    """The family of models on which a test is run, where it is one of several."""
    from tests.families import FAMILIES, MIXTURES  # which are made with this file's help

    found = getattr(item, "callspec", None)
    name = None if found is None else found.params.get("family")
    return name if name in FAMILIES or name in MIXTURES else None


class ByFile(LoadFileScheduling):
    """The tests of a file go to one process; so do all of the browser's, which share a server and a first visit."""

    def _split_scope(self, nodeid: str) -> str:
        return "browser" if nodeid.startswith("tests/browser/") else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    """How pytest-xdist shares the tests out; its marks for groups do nothing beside pytest 9.2."""
    return ByFile(config, log)


class Recorder:
    """Stands where a run's event stream stands, and keeps what was said."""

    def __init__(self) -> None:
        self.said: list[tuple[EventKind, dict[str, JsonValue]]] = []

    def __call__(self, kind: EventKind, data: dict[str, JsonValue]) -> None:
        self.said.append((kind, data))

    def logs(self) -> list[str]:
        return [str(data["text"]) for kind, data in self.said if kind == "log"]


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    """Networks that others read are compared with ours to the last bit: on every processor they multiply alike."""
    with contextlib.nullcontext() if multiplies_bfloat16("cpu") else Everywhere():
        yield


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def context(tmp_path: Path, recorder: Recorder) -> Context:
    return Context("cpu", 0, tmp_path / "blocks", tmp_path / "cache", DEMO / "text.txt", recorder, lambda: None)


def tiny_config(**changes: object) -> LlamaConfig:
    """A Llama of three blocks over the demo's vocabulary."""
    values: dict[str, object] = {
        "vocab_size": 1280, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 256,
    }  # fmt: skip
    return LlamaConfig(**(values | changes))


def in_memory(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> LoadedModel:
    """A model made at random, with the demo's tokenizer."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config)  # building a model writes into its config
    network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention(config)).eval()
    separate(network)
    widen(network)
    return LoadedModel(network, load_tokenizer(DEMO / "model"), DEMO / "model")


@pytest.fixture
def tiny() -> LoadedModel:
    return in_memory(tiny_config())


def saved(config: PretrainedConfig, folder: Path) -> Path:
    """A folder with a model made at random and the demo's tokenizer."""
    model = in_memory(config)
    for each in (model.network, model.tokenizer):
        each.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes folders with a tiny model: `tiny_folder()`, `tiny_folder(num_hidden_layers=2)`."""

    def make(**changes: object) -> Path:
        return saved(tiny_config(**changes), tmp_path / f"model-{len(list(tmp_path.iterdir()))}")

    return make


@pytest.fixture
def demo() -> LoadedModel:
    """The bundled demo model."""
    from engine.models import load

    return load(DEMO / "model")
