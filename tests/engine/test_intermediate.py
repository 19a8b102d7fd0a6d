"""Models kept between steps: another last step repeats no first, and nothing else is ever reused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import intermediate, methods, pipeline
from engine.files import make_room
from engine.hub import Hub
from engine.models import LoadedModel
from engine.records import Recipe
from tests.conftest import Recorder

Apply = Callable[..., tuple[LoadedModel, list[str]]]
WANDA = {"prune/wanda": {"samples": 2, "sequence_length": 16}}


@pytest.fixture
def applied(tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apply:
    """Applies steps to one tiny model in attempts of one home; gives the model and what was logged."""
    source, home, attempts = tiny_folder(), tmp_path / "home", iter(range(100))

    def apply(*steps: object, fresh: bool = False, **rest: object) -> tuple[LoadedModel, list[str]]:
        number, recorder = next(attempts), Recorder()
        folder = (tmp_path / f"home-{number}" if fresh else home) / "runs" / f"run-{number}" / "attempt-1"
        recipe = Recipe.model_validate({"model": str(source), "steps": list(steps), **rest})
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)  # where its worker stands
        model = pipeline.apply_steps(recipe, folder, "cpu", recorder, lambda: None)
        return model, [line for line in recorder.logs() if "reused" in line]

    return apply


def rtn(bits: int) -> object:
    return {"quantize/rtn": {"bits": bits, "group_size": 32}}


def same_weights(a: LoadedModel, b: LoadedModel) -> None:
    a.load_all()
    b.load_all()
    for name, value in a.network.state_dict().items():
        torch.testing.assert_close(value, b.network.state_dict()[name], rtol=0, atol=0)


def test_another_last_step_repeats_no_first_and_gives_what_a_fresh_run_gives(applied: Apply) -> None:
    _, first = applied(WANDA, rtn(4))
    assert not first
    model, second = applied(WANDA, rtn(3))
    assert second == ["reused what an earlier run has done: Wanda"]
    fresh, third = applied(WANDA, rtn(3), fresh=True)
    assert not third
    assert model.pruned == fresh.pruned != set()
    assert model.source == fresh.source
    assert model.quantized.keys() == fresh.quantized.keys()
    same_weights(model, fresh)


def test_a_distilled_student_is_found_again(applied: Apply) -> None:
    learn = {"distill/logits": {"student": "blocks", "steps": 2, "batch": 2, "sequence_length": 16}}
    model, first = applied(learn, rtn(4))
    again, second = applied(learn, rtn(4))
    assert [line for line in first if "an earlier run" in line] == []
    assert second == ["reused what an earlier run has done: Logit distillation"]
    same_weights(model, again)


def test_what_a_run_that_waits_would_begin_with_is_known_beforehand(applied: Apply, tmp_path: Path) -> None:
    applied(WANDA, rtn(4))
    cache = tmp_path / "home" / "cache"
    assert intermediate.unused(cache) == []  # the run has links of its own
    shutil.rmtree(tmp_path / "home" / "runs")
    (kept,) = intermediate.unused(cache)
    source = next(path for path in tmp_path.iterdir() if path.name.startswith("model-"))
    waits = Recipe.model_validate({"model": str(source), "steps": [WANDA, rtn(3)]})
    assert kept.folder.name in intermediate.keys(waits, Hub(tmp_path / "hub", offline=True))
    applied(WANDA, rtn(3))
    assert intermediate.unused(cache) == []


def test_the_longest_beginning_is_reused(applied: Apply) -> None:
    applied(WANDA, "prune/magnitude", rtn(4))
    _, said = applied(WANDA, "prune/magnitude", rtn(8))
    assert said == ["reused what an earlier run has done: Wanda, Magnitude pruning"]
    for steps in ((WANDA, rtn(8)), (WANDA,)):
        assert applied(*steps)[1] == ["reused what an earlier run has done: Wanda"]


@pytest.mark.parametrize("rest", [{"seed": 1}, {"model": None, "dtype": "float32"}])
def test_what_enters_the_model_differently_is_made_anew(
    applied: Apply, rest: dict[str, object], tmp_path: Path
) -> None:
    applied(WANDA, rtn(4))
    if "model" in rest:
        source = next(path for path in tmp_path.iterdir() if path.name.startswith("model-"))
        rest = {"model": {"source": str(source), "dtype": "float32"}}
    _, said = applied(WANDA, rtn(4), **rest)
    assert not said


def test_another_setting_or_another_file_of_the_model_is_another_beginning(applied: Apply, tmp_path: Path) -> None:
    applied(WANDA, rtn(4))
    assert not applied({"prune/wanda": {"samples": 2, "sequence_length": 16, "sparsity": 0.4}}, rtn(4))[1]
    source = next(path for path in tmp_path.iterdir() if path.name.startswith("model-"))
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    assert not applied(WANDA, rtn(4))[1]


def test_a_damaged_model_is_made_again(applied: Apply, tmp_path: Path) -> None:
    expected, _ = applied(WANDA, rtn(4))
    (kept,) = (tmp_path / "home" / "cache" / "steps").iterdir()
    (kept / "model-00001-of-00005.safetensors").write_bytes(b"damaged")
    model, said = applied(WANDA, rtn(4))
    assert not said
    same_weights(model, expected)
    assert applied(WANDA, rtn(3))[1]


def test_the_one_used_longest_ago_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        folder = tmp_path / f"key-{number}"
        folder.mkdir()
        (folder / "file").write_bytes(b"0" * 1000)
        os.utime(folder, (number, number))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 12_000}))
    assert make_room(tmp_path, "*", 1000, intermediate.SHARE)  # a fifth of 15,000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key-1", "key-2"]
    assert not make_room(tmp_path, "*", 4000, intermediate.SHARE)


def test_a_file_with_spaces_in_its_name_enters_the_key(tmp_path: Path) -> None:
    text = tmp_path / "my own text.txt"
    text.write_text("one")
    params = methods.get("distill/logits").check({"text": str(text)})
    before = intermediate._read_by(params)
    text.write_text("two")
    assert before != intermediate._read_by(params) != []
    (tmp_path / "my teacher").mkdir()
    params = methods.get("distill/logits").check({"teachers": f"/no/where '{tmp_path / 'my teacher'}'"})
    assert intermediate._read_by(params) == [[]]  # a folder without files


@pytest.mark.parametrize("ignore", ["x" * 300, "~nobody-of-that-name", "a/" * 900 + "b"])
def test_settings_that_cannot_be_paths_are_words(ignore: str) -> None:
    assert intermediate._read_by(methods.get("prune/wanda").check({"ignore": ignore})) == []
