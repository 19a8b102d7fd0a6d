"""Training in several processes: what one process learns, a cancelled run that goes on, no process that is left."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from engine import distributed, pipeline, ranks
from engine.distill import logits, repair
from engine.errors import Cancelled, InputError
from engine.experts import Experts
from engine.methods import Context
from engine.models import LoadedModel
from engine.records import Recipe
from tests.conftest import Recorder

Maker = Callable[..., Path]
STEPS, PRUNED = 70, "model.layers.1.mlp.up_proj.weight"


def recipe(folder: Path) -> Recipe:
    """A batch of 5, which 2 processes cannot share evenly, and zeros that must stay."""
    learn = {"student": "current", "steps": STEPS, "batch": 5, "sequence_length": 32, "teacher_logits": "live"}
    steps = [{"prune/magnitude": {"sparsity": 0.5}}, {"distill/logits": learn}]
    return Recipe.model_validate({"model": str(folder), "steps": steps, "measure": []})


def weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    model.load_all()
    return {name: each.detach().float().cpu() for name, each in model.network.named_parameters()}


def series(said: Recorder, name: str) -> torch.Tensor:
    return torch.tensor([data["value"] for kind, data in said.said if kind == "sample" and data["series"] == name])


def apply(recipe: Recipe, folder: Path, said: Recorder, device: str = "cpu") -> LoadedModel:
    folder.mkdir(parents=True, exist_ok=True)
    return pipeline.apply_steps(recipe, folder, device, said, lambda: None)


def is_as_one_process_made_it(wanted: Recipe, several: LoadedModel, said: Recorder, folder: Path, device: str) -> None:
    alone = Recorder()
    one, found = weights(apply(wanted, folder, alone, device)), weights(several)
    start = weights(apply(wanted.model_copy(update={"steps": wanted.steps[:1]}), folder / "start", Recorder(), device))
    away = sum(float((one[name] - start[name]).square().sum()) for name in one)
    apart = sum(float((one[name] - found[name]).square().sum()) for name in one)
    assert apart < 0.05**2 * away, (apart, away)
    assert bool((found[PRUNED][start[PRUNED] == 0] == 0).all())
    assert several.pruned
    losses = series(said, "loss")
    torch.testing.assert_close(losses, series(alone, "loss")[-len(losses) :], rtol=1e-3, atol=0)
    torch.testing.assert_close(
        series(said, "kl_heldout")[-1], series(alone, "kl_heldout")[-1], rtol=2e-3, atol=0
    )  # fmt: skip


def test_two_processes_resume_after_a_cancel_and_make_what_one_makes(
    tiny_folder: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, said, folder = recipe(tiny_folder()), Recorder(), tmp_path / "several"
    folder.mkdir()
    monkeypatch.setenv(ranks.VARIABLE, "2")

    def cancel_near_the_end() -> None:
        if len(series(said, "loss")) == 6:
            raise Cancelled("Cancelled.")

    with pytest.raises(Cancelled):
        pipeline.apply_steps(wanted, folder, "cpu", said, cancel_near_the_end)
    assert psutil.Process().children(recursive=True) == []
    assert "training in 2 processes" in said.logs()
    again = Recorder()
    several = apply(wanted, folder, again)
    assert "resumed at step 50 of 70" in again.logs()
    monkeypatch.delenv(ranks.VARIABLE)
    is_as_one_process_made_it(wanted, several, again, tmp_path / "alone", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_make_what_one_makes(
    tiny_folder: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    wanted, said = recipe(tiny_folder()), Recorder()
    monkeypatch.setenv(ranks.VARIABLE, "2")
    several = apply(wanted, tmp_path / "several", said, "cuda")
    monkeypatch.setenv(ranks.VARIABLE, "1")
    is_as_one_process_made_it(wanted, several, said, tmp_path / "alone", "cuda")


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
    ],
)
def test_how_many_processes_train(
    asked: str, params: logits.Params, expected: int, tiny: LoadedModel, context: Context,
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
