"""What all tests share: tiny models made in memory or in a folder, and a context that records what was said."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import time

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
from engine.places import DEMO
from engine.records import EventKind
from engine.runtime.native import library
from engine.wide import Everywhere, multiplies_bfloat16, widen

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


# Whose blocks differ most. `make everything` tests the others too, everywhere; the files in ALWAYS test all.
DISTINCT = ("llama", "gpt2", "falcon", "gemma3", "mixtral")
ALWAYS = ("test_families", "test_every_way", "test_closed_forms")


# What takes long, and has others beside it that see most of what it sees. It comes last, while there is time.
LONG = (
    "test_advice.py::test_advice_is_one_click_from_a_recipe",
    "test_page.py::test_a_blind_vote_reveals_the_models_afterwards",
    "test_page.py::test_a_phone_needs_no_sideways_scrolling",
    "test_page.py::test_a_link_carries_a_recipe_and_is_judged",
    "test_page.py::test_axe_finds_nothing",
    "test_page.py::test_both_models_work_at_once_and_a_token_tells_its_rivals",
    "test_page.py::test_differences_and_files_of_finished_runs",
    "test_page.py::test_start_then_reload_finds_the_run_which_is_cancelled_and_deleted",
    "test_page.py::test_stop_ends_the_waiting_and_both_can_run_again_at_once",
    "test_page.py::test_the_same_text_is_shaded_live",
    "test_page.py::test_three_models_part_and_are_sent_around",
    "test_page.py::test_a_visitor_switches_to_chinese_and_back",
    "test_team.py::test_login_page_and_logout",
    "test_whole_way.py::test_from_a_search_to_a_model_that_transformers_loads[zh-CN-8]",
    "test_cli.py::test_ctrl_c_leaves_a_run_that_resume_finishes",
    "test_container.py::test_",
    "test_demo.py::test_each_kind_of_damage_shows_more_than_the_one_before",
    "test_demo.py::test_gptq_harms_less_than_round_to_nearest[3]",
    "test_demo.py::test_gptq_harms_less_than_round_to_nearest[2]",
    "test_demo.py::test_wanda_harms_less_than_magnitude",
    "test_demo.py::test_awq_and_hqq_harm_less_than_round_to_nearest",
    "test_demo.py::test_mixed_precision_harms_less_than_equal_bits_of_the_same_size",
    "test_awq.py::test_a_resumed_block_keeps_its_folded_norm",
    "test_beyond_blocks.py::test_everybody_reads_a_model_that_is_quantized_throughout",
    "test_distributed.py::test_two_processes_go_on_from_one_and_make_what_one_makes",
    "test_distributed.py::test_two_processes_have_the_losses_of_one_by_every_method",
    "test_download.py::test_from_a_search_to_an_artifact_with_a_token_that_stands_nowhere",
    "test_every_way.py::",
    "test_families.py::test_awq_scales_experts_and_keeps_every_note_on_them",
    "test_families.py::test_gptq_reaches_every_linear_and_the_runtime_reads_it",
    "test_killloop.py::test_the_loop_bites",
    "test_kv_cache.py::test_what_was_measured_is_said",
    "test_low_rank.py::test_every_reader_of_ours_reads_it_and_stock_transformers_its_export",
    "test_memory.py::test_a_packed_model_takes_less_than_the_dense_one",
    "test_methods.py::test_same_seed_same_result_and_shapes_are_kept[quantize/awq]",
    "test_methods.py::test_same_seed_same_result_and_shapes_are_kept[quantize/mixed]",
    "test_methods_of_distillation.py::test_an_interrupted_on_policy_training_ends_with_the_same_weights",
    "test_methods_of_distillation.py::test_feature_training_brings_hidden_states_nearer",
    "test_native.py::test_a_compiler_that_knows_no_tiles_builds_for_vectors",
    "test_own_packed.py::test_every_kind_of_grid_is_read_back",
    "test_pipeline.py::test_long_work_is_probed_on_one_block_first",
    "test_pipeline.py::test_the_same_recipe_gives_the_same_manifest_also_when_interrupted",
    "test_repair.py::test_norms_of_every_family_are_learned",
    "test_repair.py::test_what_is_quantized_heals_on_its_grid",
    "test_routes.py::test_the_owner_sees_it_by_the_same_way[team]",
    "test_routes.py::test_the_owner_sees_it_by_the_same_way[local]",
    "test_scheduler.py::test_a_flood_hurts_only_its_sender",
    "test_scheduler.py::test_cancel_takes_the_whole_family_and_the_files[deaf]",
    "test_scheduler.py::test_cancel_takes_the_whole_family_and_the_files[native]",
)
# Files with much to do, which one process would have left for the end.
FIRST = ("tests/browser/", "tests/ui/test_routes.py", "tests/faults/", "tests/engine/test_killloop.py")
BEGAN = "MAQUETTE_TESTS_BEGAN"  # seconds of the clock, for the processes that share the tests


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test` leaves out, to stay within a quarter of an hour on any machine."""
    parser.addoption("--everything", action="store_true", help="test what is alike in all families on all of them")
    parser.addoption("--minutes", type=float, help="after so many, long tests do not begin any more")


def pytest_configure(config: pytest.Config) -> None:
    """Note when the tests began, once for all processes, unless `make` noted when it began."""
    os.environ.setdefault(BEGAN, str(time.time()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with large files, end with what takes long, and of what is alike in all families take what differs."""
    items.sort(key=lambda item: (is_long(item.nodeid), not item.nodeid.startswith(FIRST)))
    if config.getoption("--everything"):
        return
    left = [item for item in items if item.path.stem not in ALWAYS and _family(item) not in (None, *DISTINCT)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a long test for which no time is left."""
    minutes = item.config.getoption("--minutes")
    if minutes is not None and is_long(item.nodeid) and time.time() - float(os.environ[BEGAN]) > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are over: `make everything` has the time")


def is_long(test: str) -> bool:
    """Whether a test is one of those that take long, by its name."""
    return any(f"/{name}" in test for name in LONG)


def _family(item: pytest.Item) -> str | None:
    """The family of models on which a test is run, where it is one of several."""
    from tests.families import FAMILIES, MIXTURES  # which are made with this file's help

    found = getattr(item, "callspec", None)
    name = None if found is None else found.params.get("family")
    return name if name in FAMILIES or name in MIXTURES else None


class ByFile(LoadFileScheduling):
    """The tests of a file go to one process; so do all of the browser's, which share a server and a first visit.

    Long ones are apart: they come when all others are given out.
    """

    def _split_scope(self, nodeid: str) -> str:
        scope = "browser" if nodeid.startswith("tests/browser/") else str(super()._split_scope(nodeid))
        return f"{scope}, long" if is_long(nodeid) else scope


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
def kernels() -> Iterator[None]:
    """Our own kernels are looked for once in a process: a test may not leave behind that there are none."""
    yield
    if library._load.cache_info().currsize and shutil.which("g++"):
        assert library._load()[0] is not None or not any(kind.here() for kind in library.PROCESSORS)


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    """Networks that others read are compared with ours to the last bit: on every processor they multiply alike."""
    with contextlib.nullcontext() if multiplies_bfloat16("cpu") else Everywhere():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as each of two processes has; and threads that wait for each other are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
