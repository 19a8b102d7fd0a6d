"""The bundled demo model: good enough to be worth keeping, and the better method does less harm to it."""

import dataclasses
import itertools
import json
from types import ModuleType

import pytest
import torch

from engine.artifacts import verify
from engine.calibration import token_rows
from engine.checkpoint import read_config
from engine.measure import _text, accuracy, divergence, perplexity
from engine.methods import Context
from engine.models import LoadedModel, load
from engine.places import DEMO
from engine.presets import PRESETS
from engine.prune import magnitude, sparsegpt, wanda
from engine.quantize import awq, gptq, hqq, mixed, rtn
from engine.runtime.load import Schemes
from engine.shards import TensorFiles, read_quantized

PARAMETERS = 2_300_000  # few: all documents and questions


def damage(method: ModuleType, demo: LoadedModel, context: Context, **params: object) -> tuple[float, float]:
    """Perplexity and KL to the original after one method, on a part of the held-out text."""
    model = load(DEMO / "model")
    name = f"{method.__name__}-{params}"
    with torch.no_grad():
        method.apply(model, method.Params(**params), dataclasses.replace(context, folder=context.folder / name))
    documents = _text.documents(model, PARAMETERS)[:150]
    found = perplexity.measure(model, documents) + divergence.measure(model, demo, documents)
    values = {measurement.name: measurement.value for measurement in found}
    return values["perplexity"], values["kl"]


def test_it_answers_three_tasks_in_nine_of_ten_cases(demo: LoadedModel) -> None:
    items = _text.items(demo, PARAMETERS)
    found = {m.name: m.value for m in accuracy.measure(items, accuracy.choices(demo, items))}
    assert min(found["accuracy.facts"], found["accuracy.sums"], found["accuracy.grammar"]) >= 0.9
    assert found["accuracy.reading"] >= 0.8


def test_each_kind_of_damage_shows_more_than_the_one_before(demo: LoadedModel, context: Context) -> None:
    steps = (
        (gptq, {"bits": 4}), (rtn, {"bits": 3}), (gptq, {"bits": 2}), (magnitude, {"sparsity": 0.7}),
    )  # fmt: skip
    found = [damage(method, demo, context, **params)[1] for method, params in steps]
    assert all(later > 1.2 * earlier for earlier, later in itertools.pairwise(found))


def test_what_ships_in_4_bits_is_what_gptq_makes_of_it(context: Context) -> None:
    folder = DEMO / "gptq4"
    verify(folder)
    recipe = json.loads((folder / "MANIFEST.json").read_text())["recipe"]
    assert recipe["steps"] == [step.model_dump(mode="json") for step in PRESETS["gptq4"]]
    files, schemes = TensorFiles.of_folder(folder), Schemes.of_folder(read_config(folder), folder)

    def alike(method: ModuleType) -> float:
        """The share of codes that are those of the files, where a method is given the recipe's settings."""
        made = load(DEMO / "model")
        inside = dataclasses.replace(context, folder=context.folder / method.__name__)
        method.apply(made, method.Params(**recipe["steps"][0]["params"]), inside)
        same = [
            read_quantized(files, name, *weight.codes.shape, schemes.of(name)).codes == weight.codes
            for name, weight in made.quantized.items()
        ]
        return float(torch.cat([each.flatten() for each in same]).float().mean())

    assert alike(gptq) > 0.8 > alike(rtn)  # sums of another processor round a few the other way


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_harms_less_than_round_to_nearest(bits: int, demo: LoadedModel, context: Context) -> None:
    solved, kl = damage(gptq, demo, context, bits=bits)
    rounded, rounded_kl = damage(rtn, demo, context, bits=bits)
    assert kl < rounded_kl
    assert solved <= rounded * 1.002  # perplexities this close differ by less than their error at 4 bits


@pytest.mark.parametrize(("method", "bits"), [(awq, 3), (awq, 2), (hqq, 2)])  # HQQ at 3 bits: equal within its error
def test_awq_and_hqq_harm_less_than_round_to_nearest(
    method: ModuleType, bits: int, demo: LoadedModel, context: Context
) -> None:
    _, kl = damage(method, demo, context, bits=bits)
    _, rounded_kl = damage(rtn, demo, context, bits=bits)
    assert kl < rounded_kl


def test_mixed_precision_harms_less_than_equal_bits_of_the_same_size(demo: LoadedModel, context: Context) -> None:
    _, kl = damage(mixed, demo, context, budget=3.25)
    _, equal = damage(gptq, demo, context, bits=3, group_size=64)  # 3 + 16 / 64 stored bits a weight
    assert kl < equal


def test_wanda_harms_less_than_magnitude(demo: LoadedModel, context: Context) -> None:
    _, informed = damage(wanda, demo, context, sparsity=0.5)
    _, blind = damage(magnitude, demo, context, sparsity=0.5)
    assert informed < blind


def test_sparsegpt_harms_less_than_wanda(demo: LoadedModel, context: Context) -> None:
    rows = token_rows(demo.tokenizer, context.calibration, 128)[-16:]  # far behind the 32 that calibrate

    @torch.no_grad()
    def predicted(model: LoadedModel) -> torch.Tensor:
        return model.network(rows).logits.float().log_softmax(-1)  # type: ignore[no-any-return]

    original, harm = predicted(demo), {}
    for method in (sparsegpt, wanda):
        model, kept = load(DEMO / "model"), dataclasses.replace(context, folder=context.folder / method.__name__)
        with torch.no_grad():
            method.apply(model, method.Params(pattern="2:4", samples=32), kept)
        harm[method] = float((original.exp() * (original - predicted(model))).sum(-1).mean())
    assert harm[sparsegpt] < 0.6 * harm[wanda]


def test_it_fits_into_the_repository() -> None:
    assert sum(file.stat().st_size for file in (DEMO / "model").iterdir()) < 12 << 20
