"""Exports for the page: what is offered, the process that makes one, its limits, and what is left of it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from transformers import AutoModelForCausalLM, PretrainedConfig

from engine import artifacts, export, exporting, methods
from engine.attempts import EXPORTS, attempt_folder, prepare
from engine.errors import BadModel, Cancelled, InputError, RunError, TooBig, TooMany, UnknownName
from engine.exporting import Exports, made, offered
from engine.methods import Context
from engine.modes import GIB, Limits
from engine.quotas import Quotas
from engine.records import Recipe, Run, Status
from engine.runners.local import LocalRunner
from engine.scheduler import Scheduler
from engine.store import Store
from tests.conftest import in_memory, tiny_config
from tests.families import FAMILIES

FOUR: dict[str, JsonValue] = {"bits": 4, "group_size": 32}
FEW: dict[str, JsonValue] = {"samples": 2, "sequence_length": 16}
ZEROS: dict[str, JsonValue] = {"sparsity": 0.7, "storage": "bitmask"}
UNTIED, GPT2 = tiny_config(tie_word_embeddings=False), FAMILIES["gpt2"]


def artifact(config: PretrainedConfig, steps: list[tuple[str, dict[str, JsonValue]]], at: Context) -> Path:
    """The artifact of a small model after some steps."""
    model = in_memory(config)
    for number, (name, params) in enumerate(steps):
        method = methods.get(name)
        with torch.no_grad():
            place = dataclasses.replace(at, folder=at.folder / str(number))
            model = method.apply(model, method.check(params), place)
    artifacts.write(model, Recipe(), at.folder.parent / "artifact")
    return at.folder.parent / "artifact"


@pytest.mark.parametrize(
    ("config", "steps", "found"),
    [
        (UNTIED, [("quantize/rtn", FOUR)], ["awq", "gptq", "gptq_v2", "gguf"]),
        (UNTIED, [("quantize/rtn", FOUR | {"bits": 3})], ["gptq", "gptq_v2", "gguf"]),
        (UNTIED, [("quantize/rtn", FOUR | {"bits": 5})], ["gguf"]),
        (UNTIED, [("quantize/rtn", FOUR | {"head": True})], ["gguf"]),
        (UNTIED, [("quantize/smoothquant", FEW)], []),
        (UNTIED, [], ["gguf"]),
        (FAMILIES["opt"], [], []),
        (UNTIED, [("prune/magnitude", ZEROS)], ["gguf", "dense"]),
        (UNTIED, [("prune/magnitude", ZEROS), ("quantize/rtn", FOUR | {"targets": "*.mlp.*"})],
         ["awq", "gptq", "gptq_v2", "gguf", "dense"]),
        (UNTIED, [("prune/low_rank", {**FEW, "multiple": 8}), ("quantize/rtn", FOUR | {"group_size": 8})],
         ["gguf", "dense"]),
        (GPT2, [("quantize/rtn", FOUR)], ["gguf", "dense"]),
        (GPT2, [("quantize/smoothquant", FEW)], []),
    ],
    ids=lambda value: "" if isinstance(value, PretrainedConfig) else str(value),
)  # fmt: skip
def test_what_is_offered_is_what_can_be_exported(
    config: PretrainedConfig, steps: list[tuple[str, dict[str, JsonValue]]], found: list[str], context: Context
) -> None:
    folder = artifact(config, steps, context)
    assert offered(folder) == found
    for name in export.formats():
        if name in found:
            export.exporter(name)(folder, folder.with_name(name))
        else:
            with pytest.raises(InputError):
                export.exporter(name)(folder, folder.with_name(name))


def test_nothing_is_offered_of_what_cannot_be_read(tmp_path: Path) -> None:
    assert offered(tmp_path / "gone") == []
    (tmp_path / "config.json").write_text("{")
    assert offered(tmp_path) == []


def run_of(home: Path, owner: str = "ada") -> Run:
    """A run that has an artifact, by its look."""
    run = Run(id="0a1b2c3d", recipe=Recipe(), owner=owner, status=Status.SUCCEEDED, attempt=1, created=1.0)
    folder = attempt_folder(home, run.id, 1) / "artifact"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(1000))
    return run.model_copy(update={"artifact": str(folder)})


def anything(size: int) -> None:
    """Room for so many bytes, always."""


def test_an_export_is_kept_beside_its_artifact_and_made_once(context: Context, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    folder = Path(str(run.artifact))
    shutil.rmtree(folder)
    artifact(GPT2, [("quantize/rtn", FOUR)], dataclasses.replace(context, folder=tmp_path / "made" / "blocks"))
    (tmp_path / "made" / "artifact").rename(folder)
    sizes: list[int] = []
    exports = Exports(tmp_path / "scratch")
    assert list(exports.write(run, "dense", sizes.append))[:1] == [0.0]
    assert made(folder) == ["dense"]
    place = exporting.place(folder, "dense")
    artifacts.verify(place)
    assert sizes[0] >= sum(file.stat().st_size for file in place.iterdir() if file.suffix == ".safetensors")
    AutoModelForCausalLM.from_pretrained(place)
    assert [*(tmp_path / "scratch").iterdir()] == []
    assert list(exports.write(run, "dense", sizes.append)) == []
    assert len(sizes) == 1


def test_what_is_no_format_or_has_no_model_is_refused_before_any_process(tmp_path: Path) -> None:
    run, exports = run_of(tmp_path), Exports(tmp_path / "scratch")
    with pytest.raises(UnknownName, match="Did you mean gptq"):
        next(exports.write(run, "gptk", anything))
    with pytest.raises(UnknownName):
        next(exports.write(run, "../../artifact", anything))
    for change in ({"artifact": None}, {"status": Status.FAILED}):  # an artifact that nobody has checked
        with pytest.raises(BadModel, match="its files were deleted, or it did not finish"):
            next(exports.write(run.model_copy(update=change), "gptq", anything))
    assert not (tmp_path / "scratch").exists()


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a line of Python in the worker's place; `asked` is what it was asked, `say` its last word."""
    before = """
import json, os, sys, time
asked = json.load(open(sys.argv[1]))
def say(status, reason=""): print(json.dumps({"kind": "finished", "data": {"status": status, "reason": reason}}))
"""
    return lambda line: monkeypatch.setattr(exporting, "COMMAND", (sys.executable, "-c", before + line))


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("say('refused', 'It has 5 bits.')", InputError, "It has 5 bits."),
        ("say('failed', 'The disk is full.')", RunError, "The disk is full."),
        ("os.kill(os.getpid(), 9)", RunError, "without a word"),
        ("print('nonsense')", RunError, "without a word"),
    ],
)
def test_how_it_fails_is_one_line_and_leaves_nothing(
    line: str, kind: type[Exception], words: str, child: Callable[[str], None], tmp_path: Path
) -> None:
    child(line)
    run, exports = run_of(tmp_path), Exports(tmp_path / "scratch")
    with pytest.raises(kind, match=words):
        list(exports.write(run, "gptq", anything))
    assert made(Path(str(run.artifact))) == [*(tmp_path / "scratch").iterdir()] == []


def test_an_owner_has_one_at_a_time_and_can_stop_it(child: Callable[[str], None], tmp_path: Path) -> None:
    child("time.sleep(60)")
    run, exports, stop = run_of(tmp_path), Exports(tmp_path / "scratch"), threading.Event()
    working = exports.write(run, "gptq", anything, stop)
    next(working)
    for name in ("gptq", "awq"):
        with pytest.raises(TooMany, match="being made already"):
            next(exports.write(run, name, anything))
    other = exports.write(run.model_copy(update={"owner": "ben"}), "awq", anything)
    next(other)
    other.close()  # as a page that is left does
    stop.set()
    with pytest.raises(Cancelled):
        list(working)
    assert [*(tmp_path / "scratch").iterdir()] == []
    child("say('refused', 'Begun anew.')")
    with pytest.raises(InputError, match="Begun anew"):
        list(exports.write(run, "gptq", anything))


def test_one_that_takes_too_long_and_those_of_a_server_that_stops_end(
    child: Callable[[str], None], tmp_path: Path
) -> None:
    child("time.sleep(60)")
    run = run_of(tmp_path)
    with pytest.raises(RunError, match=r"longer than the 0\.005 minutes"):
        list(Exports(tmp_path / "scratch", 0.3).write(run, "gptq", anything))
    exports = Exports(tmp_path / "scratch")
    working = exports.write(run, "gptq", anything)
    next(working)
    exports.close()
    with pytest.raises(RunError, match="without a word"):
        list(working)


@pytest.mark.parametrize("line", ["os.mkdir(asked['folder']); say('succeeded')", "say('failed', 'no such file')"])
def test_a_run_that_is_deleted_meanwhile_comes_back_in_no_form(
    line: str, child: Callable[[str], None], tmp_path: Path
) -> None:
    child(line)
    run = run_of(tmp_path)
    working = Exports(tmp_path / "scratch").write(run, "gptq", anything)
    next(working)
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(RunError, match="deleted while they were exported"):
        list(working)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("limits", "free", "words"),
    [
        (Limits(disk=8 << 20), GIB, r"hold 4.0 MiB of the 8.0 MiB .* the export needs up to 5.0 MiB"),
        (Limits(floor=GIB), GIB, r"1.00 GiB left; the export needs up to 5.0 MiB, and 1.00 GiB stay free"),
    ],
)
def test_too_much_disk_is_refused(limits: Limits, free: int, words: str, tmp_path: Path) -> None:
    with Store(tmp_path / "maquette.db") as store:
        run = store.add_run(Recipe(), "ada")
        folder = attempt_folder(tmp_path, run.id, 1) / EXPORTS / "awq"  # counts as the run's own
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(4 << 20))
        with pytest.raises(TooBig, match=words):
            Quotas(tmp_path, store, limits, lambda: free).check_export(run, 5 << 20)
        Quotas(tmp_path, store, limits, lambda: 2 * GIB).check_export(run, 1 << 20)
        Quotas(tmp_path, store, Limits(), lambda: 0).check_export(run, 5 << 20)


def test_the_scheduler_holds_it_to_the_limits_and_to_its_owner(
    child: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child("time.sleep(60)")
    monkeypatch.setattr(exporting, "room", lambda artifact, name: 1000)
    scheduler = Scheduler(tmp_path, runner=LocalRunner(), limits=Limits(seconds=0.3, disk=1 << 20))
    try:
        store = scheduler.store
        run = store.begin_attempt(store.add_run(Recipe(), "ada").id)
        folder = attempt_folder(tmp_path, run.id, 1) / "artifact"
        folder.mkdir(parents=True)
        store.say(run, "artifact", {"path": "artifact"})
        store.say(run, "finished", {"status": "succeeded", "reason": ""})
        with pytest.raises(UnknownName):
            scheduler.export(run.id, "gptq", "ben")
        with pytest.raises(RunError, match="longer than"):
            list(scheduler.export(run.id, "gptq", "ada"))
        (folder / "weights").write_bytes(bytes(1 << 20))
        with pytest.raises(TooBig, match="the export needs"):
            list(scheduler.export(run.id, "gptq", "ada"))
        scheduler.delete(run.id, "ada")
        assert not folder.exists()
    finally:
        scheduler.stop()


def test_the_next_attempt_begins_without_exports_of_the_last(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    exporting.place(Path(str(run.artifact)), "gptq").mkdir(parents=True)
    prepare(tmp_path, run.id, 2, {})
    assert [file.name for file in attempt_folder(tmp_path, run.id, 1).iterdir()] == []
