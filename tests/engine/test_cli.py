"""The command line: exit codes, one line for what is wrong, and the JSON object on the last line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue

from engine import attempts, cli, doctor, export, pipeline, places, preflight
from engine.errors import Diverged, RunError
from engine.methods import Emit
from engine.presets import PRESETS
from engine.recipes import load_recipe
from engine.records import Event, EventKind, Measurement, Model, Recipe
from engine.runners.inline import InlineRunner
from engine.scheduler import Scheduler
from engine.store import Store
from tests import small_model

ROOT = Path(__file__).parent.parent.parent


def fake_pipeline(recipe: Recipe, folder: Path, emit: Emit, check: Callable[[], None]) -> None:
    emit("log", {"text": folder.name})
    if recipe.seed == 13:
        raise RunError("It did not fit.")
    if recipe.seed in (14, 15) and "learning_rate_factors" not in recipe.steps[0].params:
        emit("diverged", {"number": 0, "step": 121, "kept": 100 if recipe.seed == 14 else 0, "why": "the loss is nan"})
        raise Diverged("Training diverged at step 121.")
    (folder / "artifact").mkdir()
    emit("phase", {"name": "saving"})
    emit("artifact", {"path": "artifact"})
    emit("measurement", {"name": "kl", "value": recipe.seed + 0.5, "error": 0.1, "unit": "nat"})
    emit("measurement", {"name": "size.bytes", "value": 100.0, "unit": "B"})


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs one command on a data folder of its own; returns exit code, stdout lines and stderr lines."""
    monkeypatch.setattr(preflight, "check", lambda *asked: None)
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    monkeypatch.setenv("MAQUETTE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        code = cli.main(arguments, lambda home: Scheduler(home, runner=InlineRunner(fake_pipeline)))
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return run


def recipe(text: str) -> str:
    Path("recipe.yaml").write_text(text)
    return "recipe.yaml"


def test_run(call, tmp_path: Path) -> None:
    code, out, err = call("run", recipe("model: demo\nseed: 1"), "--json")
    result = json.loads(out[-1])
    assert code == 0
    assert set(result) == {"id", "status", "reason", "artifact", "measurements"}
    assert (result["status"], result["reason"]) == ("succeeded", "")
    assert Path(result["artifact"]).is_dir()
    assert result["measurements"][0] == {"name": "kl", "value": 1.5, "error": 0.1, "unit": "nat"}
    assert "saving" in err
    code, out, _ = call("runs", "--json")
    assert [run["id"] for run in json.loads(out[-1])["runs"]] == [result["id"]]
    assert (tmp_path / "home" / "maquette.db").exists()


def test_run_in_words(call) -> None:
    code, out, _ = call("run", recipe("model: demo\nseed: 1"))
    assert code == 0
    assert "succeeded" in out[0]
    assert [line.split("  ")[-1].strip() for line in out[1:]] == [
        "1.50 nat ± 0.196 nat",
        "100 B",
        "± is a 95 % interval.",
    ]


def test_export(call, tmp_path: Path) -> None:
    from engine import artifacts
    from engine.models import LoadedModel, load
    from engine.packing import QuantizedWeight

    model: LoadedModel = load(places.DEMO / "model")
    name = "model.layers.0.mlp.up_proj"
    weight = model.network.get_submodule(name).weight.data
    codes = torch.full(weight.shape, 5, dtype=torch.uint8)
    scale, zero = torch.ones(len(weight), 2).bfloat16(), torch.full((len(weight), 2), 8, dtype=torch.uint8)
    model.quantized[name] = QuantizedWeight(codes, scale, zero, 4, True)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    code, out, _ = call("export", "artifact", "--format", "gptq", "--to", "out", "--json")
    assert code == 0
    assert json.loads(out[-1])["folder"] == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    code, _, err = call("export", "artifact", "--format", "gptq", "--to", "out")
    assert (code, len(err)) == (2, 1)
    code, out, _ = call("export", "artifact", "--format", "gguf", "--to", "llama")
    assert code == 0
    assert out[-1] == "Tensors of 4 bits: 1, exact in Q4_0, which takes 4.5 bits a weight."
    code, out, _ = call("export", "artifact", "--format", "gguf", "--to", "again", "--json")
    assert json.loads(out[-1])["notes"] == ["Tensors of 4 bits: 1, exact in Q4_0, which takes 4.5 bits a weight."]
    code, _, err = call("export", "artifact", "--format", "gtpq", "--to", "other")
    assert (code, len(err)) == (2, 1)
    assert "Did you mean gptq" in err[0]


def test_a_run_stands_for_the_model_that_it_made(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = json.loads(call("run", recipe("model: demo"), "--json")[1][-1])
    failed = json.loads(call("run", recipe("model: demo\nseed: 13"), "--json")[1][-1])["id"]
    exported: list[Path] = []
    monkeypatch.setattr(
        export, "exporter", lambda name: lambda source, target: (exported.append(source), target.mkdir())
    )
    assert call("export", made["id"], "--format", "gptq", "--to", "out")[0] == 0
    assert exported == [Path(made["artifact"]).resolve()]
    assert load_recipe("\n".join(call("preset", "half", "--model", made["id"])[1])).model.source == made["artifact"]
    call("run", "recipe.yaml", "--model", made["id"])
    assert Store(tmp_path / "home" / "maquette.db", read_only=True).runs()[0].recipe.model.source == made["artifact"]
    for command in (["export", failed, "--format", "gptq", "--to", "other"], ["measure", failed],
                    ["advise", failed, "--goal", "cost"]):  # fmt: skip
        code, _, err = call(*command)
        assert (code, len(err)) == (2, 1)
        assert f"Run {failed} has no model: it is failed." in err[0]
    code, _, err = call("export", "0a1b2c3d", "--format", "gptq", "--to", "other")
    assert (code, len(err)) == (2, 1)
    assert "no model folder '0a1b2c3d'" in err[0]


def test_run_elsewhere(call, tmp_path: Path) -> None:
    code, _, _ = call("run", recipe("model: demo"), "--home", str(tmp_path / "other"))
    assert code == 0
    assert Store(tmp_path / "other" / "maquette.db", read_only=True).runs()
    assert not (tmp_path / "home").exists()


def test_other_measures(call) -> None:
    call("run", recipe("model: demo"), "--measure", "size,kl")
    assert Store(Path("home/maquette.db").absolute(), read_only=True).runs()[0].recipe.measure == ("size", "divergence")


def test_a_run_that_fails(call) -> None:
    code, out, err = call("run", recipe("model: demo\nseed: 13"), "--json")
    assert code == 1
    assert json.loads(out[-1])["status"] == "failed"
    assert json.loads(out[-1])["reason"] == "It did not fit."
    assert err[-1] == "It did not fit."


def test_a_resumed_run_tells_only_what_is_new(call) -> None:
    code, out, first = call("run", recipe("model: demo\nseed: 13"), "--json")
    assert "  attempt-1" in first
    code, _, again = call("run", "--resume", json.loads(out[-1])["id"])
    assert code == 1
    assert "  attempt-2" in again
    assert "  attempt-1" not in again


@pytest.mark.parametrize(("factor", "held"), [("0.1", "0.1 after 100"), ("0", "0 after 100")])
def test_a_run_that_diverged_goes_on_from_its_checkpoint(call, tmp_path: Path, factor: str, held: str) -> None:
    asked = recipe("steps: [{distill/logits: {student: current}}]\nseed: 14")
    code, out, err = call("run", asked, "--json")
    run = json.loads(out[-1])["id"]
    assert code == 1
    assert err[-1].endswith(f"python -m engine run --resume {run} --learning-rate-factor 0.1")
    code, _, err = call("run", "--resume", run, "--learning-rate-factor", "1")
    assert (code, len(err)) == (2, 1)
    assert "to below 1" in err[0]
    code, out, err = call("run", "--resume", run, "--learning-rate-factor", factor)
    assert code == 0
    assert "succeeded" in out[0]
    known = (
        "Training diverged at step 121 in attempt 1: the loss is nan. Its last good checkpoint was that of step 100."
    )
    assert f"  {known}" in err
    code, _, err = call("run", "--resume", run, "--learning-rate-factor", factor)
    assert (code, len(err)) == (2, 1)
    assert "only an interrupted or failed run" in err[0]
    (tmp_path / "home" / "maquette.db").unlink()  # what the run became stands in its files, too
    with Store(tmp_path / "home" / "maquette.db") as store:
        assert store.run(run).recipe.steps[0].params == {"student": "current", "learning_rate_factors": held}
        assert [each.kept for each in store.divergences(run)] == [100]


def test_a_run_that_diverged_before_its_first_checkpoint_has_nothing_to_go_on_from(call) -> None:
    _, out, err = call("run", recipe("steps: [distill/logits]\nseed: 15"), "--json")
    assert err[-1] == "Training diverged at step 121."
    code, _, err = call("run", "--resume", json.loads(out[-1])["id"], "--learning-rate-factor", "0.1")
    assert (code, len(err)) == (2, 1)
    assert "has no checkpoint to go on from" in err[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modle: demo", "Did you mean model"),
        ("steps: [{quantize/gptq: {bitz: 4}}]", "Did you mean bits"),
        ("steps: [quantise/gptq]", "Did you mean quantize/gptq"),
        ("measure: [sise]", "Did you mean size"),
        ("model: [", "YAML"),
    ],
)
def test_a_recipe_that_cannot_be_understood(call, text: str, says: str) -> None:
    code, out, err = call("run", recipe(text), "--json")
    assert code == 2
    assert len(err) == 1
    assert says in err[0]
    refused = {"id": None, "status": "refused", "reason": err[0], "artifact": None, "measurements": []}
    assert json.loads(out[-1]) == refused
    assert not Path("home").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "recipe file or --resume"),
        (["run", "missing.yaml"], "no recipe file 'missing.yaml'"),
        (["run", "."], "cannot be read"),
        (["run", "binary.yaml"], "not text"),
        (["run", "a.yaml", "--resume", "b"], "either"),
        (["run", "--resume", "b", "--model", "demo"], "resumed as it was begun"),
        (["run", "--resume", "b", "--measure", "size"], "resumed as it was begun"),
        (["run", "--resume", "nope"], "Unknown run 'nope'"),
        (["run", "--resume", "nope", "--learning-rate-factor", "slow"], "invalid float value"),
        (["run", "good.yaml", "--learning-rate-factor", "0.1"], "goes with --resume"),
        (["run", "good.yaml", "--measure", "sise"], "Did you mean size"),
        (["measure", "/no/such/folder"], "/no/such/folder"),
        (["measure", "."], "config.json"),
        (["nonsense"], "invalid choice"),
        ([], "required"),
        (["run", "good.yaml", "--jsn"], "--jsn"),
    ],
)
def test_one_line_and_exit_code_2(call, arguments: list[str], says: str) -> None:
    Path("good.yaml").write_text("model: demo")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    code, _, err = call(*arguments)
    assert code == 2
    assert len(err) == 1
    assert says in err[0]


def test_a_folder_that_is_in_use(call, tmp_path: Path) -> None:
    with Store(tmp_path / "home" / "maquette.db"):
        code, out, err = call("run", recipe("model: demo"), "--json")
    assert code == 1
    assert "--home" in err[0]
    assert json.loads(out[-1])["status"] == "failed"


@pytest.mark.parametrize(("ended", "shown"), [("", "interrupted"), ("succeeded", "succeeded")])
def test_a_run_whose_processes_were_all_killed_is_not_running(call, tmp_path: Path, ended: str, shown: str) -> None:
    home = tmp_path / "home"
    with Store(home / "maquette.db") as store, subprocess.Popen(["true"]) as process:
        run = store.begin_attempt(store.add_run(Recipe()).id)
        attempts.prepare(home, run.id, run.attempt, {})
        folder = attempts.attempt_folder(home, run.id, run.attempt)
        (folder / "lock").write_text(f"{os.getpid()}\n")
        assert json.loads(call("runs", "--json")[1][-1])["runs"][0]["status"] == "running"
        process.wait()
        (folder / "lock").write_text(f"{process.pid}\n")
        if ended:  # a worker's own word that nobody carried on
            writer = attempts.EventWriter(folder, run.id, run.attempt)
            writer.emit("finished", {"status": ended, "reason": ""})
            writer.close()
    assert json.loads(call("runs", "--json")[1][-1])["runs"][0]["status"] == shown
    assert shown in call("runs")[1][0]


def test_compare(call) -> None:
    ids = [json.loads(call("run", recipe(f"seed: {n}"), "--json")[1][-1])["id"] for n in (1, 2)]
    code, out, _ = call("compare", *ids, "--json")
    body = json.loads(out[-1])
    assert code == 0
    assert [run["id"] for run in body["runs"]] == ids
    assert body["measurements"][0] == {
        "name": "kl", "unit": "nat", "values": [1.5, 2.5], "errors": [0.1, 0.1], "difference": 1.0,
        "ratio": pytest.approx(5 / 3),
    }  # fmt: skip
    code, out, _ = call("compare", *ids)
    assert re.split(r"  +", out[1]) == ["kl", "1.50 nat ± 0.196 nat", "2.50 nat ± 0.196 nat", "+1.00 nat"]
    assert out[-1] == "± is a 95 % interval."
    assert call("compare", ids[0], "nope")[0] == 2


def test_compare_shows_what_one_run_alone_has_in_units_that_people_read(call, tmp_path: Path) -> None:
    def taken(name: str, value: float, unit: str, error: float | None = None) -> tuple[EventKind, dict[str, JsonValue]]:
        return "measurement", Measurement(name=name, value=value, unit=unit, error=error).model_dump(mode="json")

    known = (
        [taken("size.bytes", 4_592_345, "B"), taken("latency.tpot", 0.000164, "s", 1e-6), taken("memory.peak", 1, "B")],
        [taken("size.bytes", 1_720_000, "B"), taken("throughput.b8", 12728.4, "1/s"), taken("accuracy", 0.961, "1")],
    )
    with Store(tmp_path / "home" / "maquette.db") as store:
        ids = [store.begin_attempt(store.add_run(Recipe(), "").id).id for _ in known]
        for run_id, found in zip(ids, known, strict=True):
            store.append(
                Event(run=run_id, attempt=1, number=number, time=1.0, kind=kind, data=data)
                for number, (kind, data) in enumerate(found, 1)
            )
    rows = [re.split(r"  +", line) for line in call("compare", *ids)[1][1:-1]]
    assert rows == [
        ["size.bytes", "4.38 MiB", "1.64 MiB", "-2.74 MiB"],
        ["latency.tpot", "164 µs ± 1.96 µs", "–", "–"],
        ["memory.peak", "1 B", "–", "–"],
        ["throughput.b8", "–", "12728 tokens/s", "–"],
        ["accuracy", "–", "96.1 %", "–"],
    ]
    body = json.loads(call("compare", *ids, "--json")[1][-1])["measurements"]
    assert body[1] == {
        "name": "latency.tpot", "unit": "s", "values": [0.000164, None], "errors": [1e-6, None], "difference": None,
        "ratio": None,
    }  # fmt: skip


def test_no_runs_yet(call) -> None:
    assert call("runs") == (0, [], [])
    assert json.loads(call("runs", "--json")[1][-1]) == {"runs": []}
    assert call("compare", "a", "b")[0] == 1


def test_a_preset_is_a_recipe_that_runs(call) -> None:
    code, out, _ = call("preset", "tenth", "--model", "some/model")
    assert code == 0
    assert load_recipe("\n".join(out)) == Recipe(model=Model(source="some/model"), steps=PRESETS["tenth"])
    assert [line.split()[0] for line in call("preset")[1]] == list(PRESETS)
    assert json.loads(call("preset", "half", "--json")[1][-1])["presets"].keys() == {"half"}
    code, _, said = call("preset", "hafl")
    assert (code, "Did you mean half" in said[0]) == (2, True)


def test_methods(call) -> None:
    code, out, _ = call("methods", "--json")
    found = {method["name"]: method for method in json.loads(out[-1])["methods"]}
    assert code == 0
    assert found["quantize/gptq"]["settings"]["bits"]["default"] == 4
    assert call("methods")[1][0].startswith("quantize/awq: ")


def test_measure(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model.write(tmp_path)
    asked: list[tuple[str, ...]] = []

    def measure(folder: Path, measures: tuple[str, ...], baseline: Path, emit: Emit, check: object, on: str) -> None:
        asked.append(measures)
        emit("phase", {"name": "measuring"})
        emit("measurement", {"name": "kl", "value": 1.0, "unit": "nat"})

    monkeypatch.setattr(pipeline, "measure_folder", measure)
    code, out, _ = call(
        "measure", str(tmp_path / "model"), "--measure", "memory.peak,kl", "--baseline", "demo", "--json"
    )
    assert code == 0
    assert asked == [("memory", "divergence")]
    assert json.loads(out[-1])["measurements"] == [{"name": "kl", "value": 1.0, "error": None, "unit": "nat"}]


def test_a_divergence_wants_the_original(call, tmp_path: Path) -> None:
    small_model.write(tmp_path / "model")
    code, out, said = call("measure", str(tmp_path / "model"), "--measure", "size,kl")
    assert (code, out) == (2, [])
    assert said[-1] == "Divergence is that of two models: name the original with --baseline."


def test_doctor(call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call("doctor", "--json")
    body = json.loads(out[-1])
    assert {"python", "torch", "sqlite", "gpu", "memory", "data folder"} <= set(body)
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    code, out, _ = call("doctor")
    assert code == 1
    assert any(line.startswith("!!  no-such-package") for line in out)


def test_ctrl_c_leaves_a_run_that_resume_finishes(tmp_path: Path) -> None:
    """The real thing, with real processes."""
    subprocess.run([sys.executable, ROOT / "tests" / "small_model.py", tmp_path], check=True, capture_output=True)
    (tmp_path / "text.txt").write_text(small_model.TEXT * 30)  # seconds of work for GPTQ
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path / 'model'}\ncalibration: {tmp_path / 'text.txt'}\nmeasure: [size]\n"
        "steps:\n- prune/magnitude: {}\n- quantize/gptq: {group_size: 32, samples: 64, sequence_length: 256}\n"
    )
    command = [sys.executable, "-m", "engine", "run", "--home", str(tmp_path / "home"), "--json"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Shells start what they put in the background deaf to SIGINT, and that is inherited.
    listening = options | {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen([*command, str(tmp_path / "recipe.yaml")], **listening) as first:  # type: ignore[call-overload]
        for line in first.stderr:
            if "GPTQ" in line:  # the step before is done, this one has just begun
                break
        os.kill(first.pid, signal.SIGINT)
        out, err = first.communicate(timeout=60)
    result = json.loads(out.splitlines()[-1])
    assert (first.returncode, result["status"]) == (130, "interrupted")
    assert f"--resume {result['id']} --home {tmp_path / 'home'}" in err
    assert "Traceback" not in err
    again = subprocess.run([*command, "--resume", result["id"]], **options, check=False, timeout=200)  # type: ignore[call-overload]
    finished = json.loads(again.stdout.splitlines()[-1])
    assert (again.returncode, finished["status"], finished["id"]) == (0, "succeeded", result["id"])
    assert "reused" in again.stderr
    assert finished["measurements"][0]["name"] == "size.bytes"
