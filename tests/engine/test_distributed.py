"""Training in several processes: what one process learns, a cancelled run that goes on, no process that is left."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from pydantic import JsonValue
from safetensors.torch import load_file, save_file

from engine import distributed, pipeline, ranks
from engine.distill import features, logits, on_policy, repair, sequence
from engine.errors import Cancelled, InputError
from engine.experts import Experts
from engine.methods import Context, Params
from engine.models import LoadedModel
from engine.prune import gradual
from engine.quantize._grid import GridParams, round_to_nearest
from engine.records import EventKind, Recipe
from tests.conftest import Recorder
from tests.engine.learner import learn

Maker = Callable[..., Path]
STEPS, PRUNED = 60, "mlp.up_proj.weight"
SAVED = Path("blocks", "step-1", "assistant-1", "training.safetensors")


def recipe(folder: Path) -> Recipe:
    """An assistant, then a student, zeros that must stay, and a batch of 5, which 2 processes cannot share evenly.

    Nor can they compute it two rows at a time, one of them having a part more.
    """
    learn = {"keep_every": 3, "assistants": 1, "steps": STEPS, "batch": 5, "sequence_length": 32}
    learn |= {"micro_batch": 2, "gradient_checkpointing": True}
    steps = [{"prune/magnitude": {"sparsity": 0.5}}, {"distill/logits": {**learn, "teacher_logits": "live"}}]
    return Recipe.model_validate({"model": str(folder), "steps": steps, "measure": []})


def weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    model.load_all()
    return {name: each.detach().float().cpu() for name, each in model.network.named_parameters()}


def series(said: Recorder, name: str) -> torch.Tensor:
    return torch.tensor([data["value"] for kind, data in said.said if kind == "sample" and data["series"] == name])


def apply(recipe: Recipe, folder: Path, said: Recorder, device: str = "cpu") -> LoadedModel:
    folder.mkdir(parents=True, exist_ok=True)
    return pipeline.apply_steps(recipe, folder, device, said, lambda: None)


class Copying(Recorder):
    """Copies the assistant's checkpoint of step 50 at step 60, as if the run had ended there."""

    def __init__(self, folder: Path, to: Path) -> None:
        super().__init__()
        self._folder, self._to = folder, to

    def __call__(self, kind: EventKind, data: dict[str, JsonValue]) -> None:
        super().__call__(kind, data)
        if kind == "sample" and len(series(self, "loss")) == 6 and not (self._to / SAVED).exists():
            (self._to / SAVED).parent.mkdir(parents=True)
            shutil.copy(self._folder / SAVED, self._to / SAVED)


def two_make_what_one_makes(folder: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, one, two = recipe(folder), tmp_path / "one", tmp_path / "two"
    alone, said = Copying(one, two), Recorder()
    monkeypatch.setenv(ranks.VARIABLE, "1")
    expected = weights(apply(wanted, one, alone, device))
    start = weights(apply(wanted.model_copy(update={"steps": wanted.steps[:1]}), one, Recorder(), device))
    monkeypatch.setenv(ranks.VARIABLE, "2")
    model = apply(wanted, two, said, device)
    found = weights(model)
    assert {"training in 2 processes", f"resumed at step 50 of {STEPS}"} <= set(said.logs())
    assert f"model.layers.0.{PRUNED}".removesuffix(".weight") in model.pruned
    zero = start[f"model.layers.2.{PRUNED}"] == 0
    assert bool((found[f"model.layers.0.{PRUNED}"][zero] == 0).all())
    for name, value in expected.items():
        learned = (value - start[name.replace("layers.0.", "layers.2.")]).norm()
        assert (found[name] - value).norm() < 0.1 * learned, name
    for name, last in (("loss", 1 + 6), ("kl_heldout", 1 + 7)):
        torch.testing.assert_close(series(said, name)[-last:], series(alone, name)[-last:], rtol=2e-3, atol=0)


def test_two_processes_go_on_from_one_and_make_what_one_makes(
    tiny_folder: Maker, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_make_what_one_makes(tiny_folder(), tmp_path, "cpu", monkeypatch)


def test_two_processes_have_the_losses_of_one_by_every_method(
    tiny_folder: Maker, tmp_path: Path, one_thread: None
) -> None:
    """Projections beside the network, attention maps, what student and teacher write, assistants of a checkpoint.

    Sequences end early, so that rows have different numbers of tokens. Two share 5 rows, and compute 2 at a time.
    """
    model, small = tiny_folder(), tiny_folder(num_hidden_layers=1, intermediate_size=32)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][0] *= 20  # the end is likely, or hardly possible
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    rows = {"steps": 3, "batch": 5, "sequence_length": 16}
    steps: dict[str, dict[str, object]] = {
        "distill/features": {"student": "size", "hidden_size": 32, "attention_weight": 0.5, "label_weight": 0.5},
        "distill/on_policy": {"student": "blocks", "student_share": 0.7, "prompt_tokens": 6, "label_weight": 0.3},
        "distill/sequence": {"keep_every": 2, "prompt_tokens": 6, "sampling_temperature": 1.0, "sequences": 40},
        "distill/logits": {"student": "folder", "folder": str(small), "assistants": 1},
    }
    steps = {name: {**rows, **params} for name, params in steps.items()}
    one, two = tmp_path / "one", tmp_path / "two"
    expected = learn(model, steps, one)
    two.mkdir()
    asked = {name: {**params, "micro_batch": 2} for name, params in steps.items()}
    (two / "asked.json").write_text(json.dumps({"model": str(model), "steps": asked}))
    command = [sys.executable, "-m", "tests.engine.learner", str(two)]
    common = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(2)]
    try:
        assert [process.wait(240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = json.loads((two / "losses.json").read_text())
    for name, series in expected.items():
        for kind, values in series.items():
            assert len(values) >= 3, (name, kind)
            assert found[name][kind] == pytest.approx(values, rel=1e-4), (name, kind)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_make_what_one_makes(tiny_folder: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_make_what_one_makes(tiny_folder(), tmp_path, "cuda", monkeypatch)


def test_a_cancelled_run_leaves_no_process(
    tiny_folder: Maker, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ranks.VARIABLE, "2")
    groups: list[int] = []
    before = set(psutil.Process().children(recursive=True))  # of other tests

    def cancel() -> None:
        if processes := set(psutil.Process().children(recursive=True)) - before:
            groups.extend(os.getpgid(process.pid) for process in processes)
            raise Cancelled("Cancelled.")

    with pytest.raises(Cancelled):
        pipeline.apply_steps(recipe(tiny_folder()), tmp_path, "cpu", recorder, cancel)
    assert groups == [os.getpgid(0)] * 2  # where whatever ends the run finds them
    assert set(psutil.Process().children(recursive=True)) <= before


def test_a_process_ends_with_the_run_that_started_it(tmp_path: Path) -> None:
    request = {"kind": "train", "place": f"file://{tmp_path}/meeting", "device": "cpu", "folder": str(tmp_path)}
    (tmp_path / "train.json").write_text(json.dumps({**request, "method": "distill/logits", "params": {}}))
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.worker", str(tmp_path / "train.json")], stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 1


@pytest.mark.parametrize(("batch", "count"), [(4, 2), (5, 2), (7, 3), (2, 3)])
def test_shares_of_a_batch_add_up_to_it(batch: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(batch, 1)
    monkeypatch.setattr(distributed, "count", lambda: count)
    total, seen = 0.0, []
    for number in range(count):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        mine, weight = distributed.share(rows)
        total += weight * mine.mean().item() / count
        seen += mine.flatten().tolist() if weight else []
    assert total == pytest.approx(rows.mean().item())
    assert sorted(seen) == sorted(rows.flatten().tolist())


@pytest.mark.parametrize(
    ("asked", "params", "expected"),
    [
        ("", logits.Params(), 1),
        ("3", logits.Params(), 3),
        ("3", logits.Params(batch=2), 2),
        ("3", repair.Params(), 3),
        ("3", repair.Params(scope="lora"), 1),
        ("3", features.Params(), 3),
        ("3", on_policy.Params(batch=2), 2),
        ("3", sequence.Params(), 3),
        ("3", gradual.Params(), 1),
    ],
)
def test_how_many_processes_train(
    asked: str, params: Params, expected: int, tiny: LoadedModel, context: Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(ranks.VARIABLE, asked)
    assert ranks.wanted(params, tiny, context) == expected


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5", "99999", "²"])
def test_a_bad_number_of_processes_is_refused(
    asked: str, tiny: LoadedModel, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ranks.VARIABLE, asked)
    with pytest.raises(InputError, match=r"MAQUETTE_PROCESSES is .* Use a number from 1 to 1024"):
        ranks.wanted(logits.Params(), tiny, context)


def test_mixtures_train_in_one_process(
    tiny: LoadedModel, context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ranks.VARIABLE, "2")
    tiny.network.add_module("experts", Experts([]))
    assert ranks.wanted(logits.Params(), tiny, context) == 1
    assert recorder.logs() == ["mixtures of experts train in one process"]


def test_weights_on_a_grid_train_in_one_process(
    tiny: LoadedModel, context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ranks.VARIABLE, "2")
    tiny.quantized["a.linear"] = round_to_nearest(torch.ones(2, 64), GridParams(), "a.linear", torch.float32)
    assert ranks.wanted(repair.Params(), tiny, context) == 1
    assert recorder.logs() == ["weights on a grid train in one process"]
