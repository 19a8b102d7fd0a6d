"""The pipeline for real: from a recipe to a verified artifact and its measurements, in processes of their own."""

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import artifacts, fit, headers, methods, models, pipeline, probe, verify
from engine.errors import BadArtifact, BadParams, Cancelled, InputError, RunError, TooBig
from engine.fit import Estimate, Need
from engine.quantize import rtn
from engine.records import USUAL_MEASURES, Recipe
from tests.conftest import Recorder

Maker = Callable[..., Path]


def recipe(folder: Path, *steps: object, measure: tuple[str, ...] = ("size",)) -> Recipe:
    return Recipe.model_validate({"model": str(folder), "steps": list(steps), "measure": list(measure)})


def test_a_chain_from_recipe_to_measurements(tiny_folder: Maker, tmp_path: Path, recorder: Recorder) -> None:
    chain = (
        {"prune/wanda": {"samples": 4, "sequence_length": 32, "pattern": "2:4"}},
        {"distill/logits": {"student": "current", "steps": 4, "batch": 2, "sequence_length": 32}},
        {"quantize/gptq": {"bits": 4, "group_size": 32, "samples": 4, "sequence_length": 32}},
    )
    folder = tmp_path / "attempt"
    folder.mkdir()
    artifact = pipeline.run(recipe(tiny_folder(), *chain, measure=USUAL_MEASURES), folder, recorder, lambda: None)
    artifacts.verify(artifact)
    found = {str(data["name"]): data for kind, data in recorder.said if kind == "measurement"}
    expected = {
        "size.bytes", "size.bits_per_weight", "memory.loaded", "memory.peak", "latency.ttft", "latency.tpot",
        "throughput.b1", "throughput.b4", "throughput.b8", "throughput.b16", "perplexity", "bits_per_byte",
        "accuracy", "accuracy.facts", "accuracy.reading", "accuracy.sums", "accuracy.grammar", "kl", "top1_agreement",
        "flips",
    }  # fmt: skip
    assert expected <= set(found)
    assert sum(kind == "output" for kind, _ in recorder.said) >= 3
    (estimate,) = [data for kind, data in recorder.said if kind == "estimate"]
    assert estimate["memory"] > found["size.bytes"]["value"]
    phases = [data["name"] for kind, data in recorder.said if kind == "phase"]
    assert phases[:7] == ["checking", "loading", "Wanda", "Logit distillation", "GPTQ", "saving", "verifying"]
    took = [data for kind, data in recorder.said if kind == "took"]
    assert [data["method"] for data in took] == ["prune/wanda", "distill/logits", "quantize/gptq"]
    assert all(float(str(data["seconds"])) > 0 and float(str(data["rate"])) > 0 for data in took)
    # What pruning set to zero is still zero after distillation and quantization, in the file a stranger reads.
    loaded = models.load(artifact).network
    loaded(torch.arange(4)[None])  # stock transformers unpacks on the first forward
    weight = loaded.get_submodule("model.layers.1.mlp.up_proj").weight
    assert bool(((weight == 0).view(-1, 4).sum(1) >= 2).all())


def test_the_same_recipe_gives_the_same_manifest_also_when_interrupted(tiny_folder: Maker, tmp_path: Path) -> None:
    wanted = recipe(
        tiny_folder(), {"quantize/gptq": {"group_size": 32, "samples": 4, "sequence_length": 32}}, measure=()
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    first = pipeline.run(wanted, whole, Recorder(), lambda: None)
    said = Recorder()

    def stop_in_the_last_block() -> None:
        if len(list(broken.rglob("block-*.safetensors"))) == 2:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        pipeline.run(wanted, broken, said, stop_in_the_last_block)
    second = pipeline.run(wanted, broken, said, lambda: None)
    assert "reused 2 finished blocks" in said.logs()
    assert not any(kind == "took" for kind, _ in said.said), "what took less than it takes"
    left = [data for kind, data in said.said if kind == "kept"]
    assert left == [{"modules": {"16": ["model.embed_tokens", "lm_head"]}}]
    manifests = [(folder / artifacts.MANIFEST).read_bytes() for folder in (first, second)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("damage", ["weights", "file"])
def test_an_artifact_that_is_not_the_model_fails_the_run(tiny_folder: Maker, tmp_path: Path, damage: str) -> None:
    wanted = recipe(tiny_folder())
    model = models.load(Path(wanted.model.source))
    artifact = tmp_path / "artifact"
    artifacts.write(model, wanted, artifact)
    save_file(verify.probe(model), tmp_path / "expected.safetensors")
    request: pipeline.Request = {
        "kind": "verify", "folder": str(artifact), "expected": str(tmp_path / "expected.safetensors"), "device": "cpu",
        "streamed": False, "bytes": 0,
    }  # fmt: skip
    verify.verify(request)
    file = next(artifact.glob("model-00002*"))
    if damage == "file":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        tensors = load_file(file)
        name = next(key for key in tensors if key.endswith("down_proj.weight"))
        save_file(tensors | {name: -tensors[name]}, file, metadata={"format": "pt"})
        (artifact / artifacts.MANIFEST).unlink()
        artifacts.write_manifest(artifact, wanted)  # the files are consistent; the numbers are not the model's
    with pytest.raises(BadArtifact, match="computes other logits" if damage == "weights" else "not what the manifest"):
        verify.verify(request)


def test_a_model_is_handed_out_once_it_is_verified(
    tiny_folder: Maker, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "probe", lambda model: {"ids": torch.arange(8)[None], "logits": torch.zeros(8, 1280)})
    with pytest.raises(RunError, match="computes other logits"):
        pipeline.run(recipe(tiny_folder()), tmp_path, recorder, lambda: None)
    assert (tmp_path / "artifact").is_dir()
    assert not [data for kind, data in recorder.said if kind == "artifact"]


@pytest.mark.parametrize(("first", "error"), [(True, BadParams), (False, RunError)])
def test_what_is_refused_after_some_work_fails_and_can_go_on(
    first: bool, error: type[Exception], tiny_folder: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may find out late that it cannot: only what nothing was done for is refused for good."""

    def refuse(*args: object) -> None:
        raise BadParams("not like this.")

    monkeypatch.setattr(rtn, "place", refuse)
    earlier = [] if first else [{"prune/depth": {"count": 1, "samples": 4, "sequence_length": 32}}]
    with pytest.raises(error, match="not like this") as found:
        pipeline.run(
            recipe(tiny_folder(), *earlier, {"quantize/rtn": {"group_size": 32}}), tmp_path, Recorder(), lambda: None
        )
    assert type(found.value) is error


def test_a_failing_child_fails_the_run_with_its_reason(tiny_folder: Maker, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    request: pipeline.Request = {
        "kind": "verify",
        "folder": str(tmp_path / "nothing"),
        "expected": "x",
        "device": "cpu",
    }
    with pytest.raises(BadArtifact, match=r"nothing has no readable MANIFEST"):
        pipeline.child(request, tmp_path, Recorder(), lambda: None)


def test_a_folder_is_measured_without_a_run(tiny_folder: Maker, recorder: Recorder) -> None:
    pipeline.measure_folder(tiny_folder(), ("size",), None, recorder, lambda: None, "cpu")
    assert {"size.bytes", "size.bits_per_weight"} <= {str(d["name"]) for k, d in recorder.said if k == "measurement"}


def test_what_cannot_work_is_refused_before_anything_is_written(tiny_folder: Maker, tmp_path: Path) -> None:
    folder = tmp_path / "attempt"
    folder.mkdir()
    with pytest.raises(InputError):
        pipeline.run(recipe(tiny_folder(), {"quantize/rtn": {"group_size": 48}}), folder, Recorder(), lambda: None)
    assert list(folder.iterdir()) == []


def test_long_work_is_probed_on_one_block_first(
    tiny_folder: Maker, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "PROBED_FROM", 0.0)
    monkeypatch.setattr(fit, "PROBED_BLOCKS", 3)
    step = {"quantize/gptq": {"group_size": 32, "samples": 4, "sequence_length": 32}}
    folder = tmp_path / "attempt"
    folder.mkdir()
    pipeline.run(recipe(tiny_folder(), step), folder, recorder, lambda: None)
    guessed, probed = [data for kind, data in recorder.said if kind == "estimate"]
    assert "probed" not in guessed
    assert probed["probed"] is True
    assert float(str(probed["seconds"])) > 0
    assert 100 << 20 < int(str(probed["memory"])) < 4 << 30
    assert len([kind for kind, _ in recorder.said if kind == "linear"]) == 3 * 7  # the probe's work is thrown away


def test_a_probe_works_on_the_first_block_alone(
    tiny_folder: Maker, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(0, 5)
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))  # the module's own: other threads ask for the time
    monkeypatch.setattr(probe, "time", clock)
    placed: list[str] = []
    monkeypatch.setattr(rtn, "place", lambda model, linear, *rest: placed.append(linear.name))
    folder = tiny_folder()
    probe.probe(recipe(folder, {"quantize/rtn": {"group_size": 32}}), folder, "cpu", recorder)
    assert {name.split(".")[2] for name in placed} == {"0"}
    assert len(placed) == 7
    ((kind, data),) = recorder.said  # made at 0, started at 5, blocks from 10, one until 15, the end at 20
    assert (kind, data["seconds"]) == ("estimate", (15 - 5) + 3 * 5)


def test_a_probe_counts_work_that_grows_with_the_square_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0, 0, 10, 17, 20, 22, 24, 25, 30])
    monkeypatch.setattr(probe, "time", SimpleNamespace(monotonic=lambda: float(next(times))))
    clock = probe.Clock({"passes"})
    for unit, done in (("blocks", 0), ("linears", 5), ("blocks", 1), ("passes", 0), ("passes", 1), ("passes", 2)):
        clock("progress", {"unit": unit, "done": done, "total": 9})
    clock("progress", {"unit": "blocks", "done": 2, "total": 9})  # the head
    # A block took 7, a pass 2; the rest of 30 comes once.
    assert clock.total(3, {"passes": 100}) == (30 - 7 - 4) + 3 * 7 + 100 * 2


@pytest.mark.parametrize("name", ["quantize/mixed", "quantize/gptq"])
def test_what_a_method_times_apart_is_what_it_reports(
    name: str, tiny_folder: Maker, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks: list[probe.Clock] = []
    kept = probe.Clock.total
    monkeypatch.setattr(probe.Clock, "total", lambda clock, *rest: (clocks.append(clock), kept(clock, *rest))[1])
    step = {name: {"samples": 4, "sequence_length": 32}}
    folder = tiny_folder()
    probe.probe(recipe(folder, step), folder, "cpu", recorder)
    survey = methods.get(name).params().survey(headers.inspect(folder), 2)
    (clock,) = clocks
    assert clock.block > 0
    assert clock.units.keys() == (set() if survey is None else survey.units.keys())
    # What each of seven linears makes passes one block, and the text as it is; each token of eight rows is predicted.
    assert {unit: done for unit, (_, done) in clock.units.items()} == (
        {} if survey is None else {"passes of blocks": 8, "tokens predicted": 8 * 8 * 32}
    )
    assert all(seconds > 0 for seconds, _ in clock.units.values())


@pytest.mark.parametrize(
    ("steps", "paths"),
    [
        ([{"quantize/rtn": {"group_size": 32, "ignore": "model.layers.0.*"}}], 7),
        ([{"quantize/rtn": {"group_size": 32, "targets": "re:.*[12].mlp"}}], 3),
        ([{"prune/magnitude": {"targets": "*.1.*"}}, {"quantize/rtn": {"group_size": 32, "ignore": "*.0.*"}}], 7),
        ([{"prune/magnitude": {"targets": "*.1.*"}}, {"quantize/rtn": {"group_size": 32, "ignore": "*.1.*"}}], None),
    ],
)
def test_a_probe_takes_a_block_that_the_steps_change(
    steps: list[object], paths: int | None, tiny_folder: Maker, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes may leave the first one as it is."""
    placed: list[str] = []
    monkeypatch.setattr(rtn, "place", lambda model, linear, *rest: placed.append(linear.name))
    folder = tiny_folder()
    probe.probe(recipe(folder, *steps), folder, "cpu", recorder)
    assert len(placed) == (paths or 0)
    assert [kind for kind, _ in recorder.said] == ["estimate"] * (paths is not None)


def test_what_a_probe_refuses_is_refused(tiny_folder: Maker, tmp_path: Path) -> None:
    """Weights that are no numbers, say: nothing has been done yet."""
    folder = tiny_folder()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    asked = recipe(folder, {"quantize/rtn": {"group_size": 32}}).model_dump(mode="json")
    request = {"kind": "probe", "recipe": asked, "source": str(folder), "device": "cpu"}
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        pipeline.child(request, tmp_path, Recorder(), lambda: None)


def test_a_block_that_takes_more_than_there_is_stops_the_run(recorder: Recorder) -> None:
    serving = Need("serve", {})
    needs = (Need("compress", {"weights": 600}), Need("measure", {"weights": 400, "runtime": 100}))
    estimate = Estimate(needs, serving, available=1000, times={"steps": 60.0, "measure": 40.0})
    tell = pipeline._refined(estimate, recorder)
    tell("estimate", {"memory": 400, "seconds": 7.0, "probed": True})
    assert recorder.said == [("estimate", {"memory": 500, "seconds": 47.0, "probed": True})]
    with pytest.raises(TooBig, match="One block took"):
        tell("estimate", {"memory": 2000, "seconds": 7.0, "probed": True})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said() -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        pipeline.choose_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_the_gpu(tiny_folder: Maker, tmp_path: Path, recorder: Recorder) -> None:
    folder = tmp_path / "attempt"
    folder.mkdir()
    step = {"quantize/gptq": {"group_size": 32, "samples": 4, "sequence_length": 32}}
    wanted = recipe(tiny_folder(), step, measure=USUAL_MEASURES).model_copy(update={"device": "cuda"})
    artifacts.verify(pipeline.run(wanted, folder, recorder, lambda: None))
    peak = next(data for kind, data in recorder.said if kind == "measurement" and data["name"] == "memory.peak")
    details = peak["details"]
    assert isinstance(details, dict)
    assert details["kind"] == "cuda allocated"
    shutil.rmtree(folder)
