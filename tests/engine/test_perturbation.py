"""One linear changed at a time: block by block as with the whole network, in waves of any size."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from engine import branches, models
from engine.methods import Context
from engine.models import LoadedModel, blocks, embeddings, head, linears
from engine.observing import BlockLinear
from engine.perturbation import divergences
from tests.conftest import in_memory, tiny_config
from tests.engine.test_streaming import Maker, in_use, saved
from tests.families import FAMILIES, MIXTURES

ROWS = torch.randint(3, 1280, (3, 24), generator=torch.Generator().manual_seed(7))


def coarser(name: str, weight: Tensor) -> Tensor:
    """The weight in steps of a quarter of its largest number."""
    step = 0.03
    return torch.round(weight / step) * step


def names(model: LoadedModel) -> list[str]:
    prefix, modules = blocks(model.network)
    return [f"{prefix}.{number}.{path}" for number, block in enumerate(modules) for path, _ in linears(block)]


@torch.no_grad()
def slowly(model: LoadedModel, name: str) -> float:
    """The divergence by two passes of the whole network."""

    def predict() -> Tensor:
        found: Tensor = model.network(input_ids=ROWS, use_cache=False).logits.float().log_softmax(-1)
        return found

    known = predict()
    weight = BlockLinear(name, model.network.get_submodule(name)).weight  # type: ignore[arg-type]
    exact = weight.clone()
    weight.copy_(coarser(name, exact))
    mine = predict()
    weight.copy_(exact)
    return float(kl_div(mine, known, reduction="sum", log_target=True)) / ROWS.numel()


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_streams_are_what_the_whole_network_computes(family: str, tmp_path: Path, context: Context) -> None:
    folder = saved(family, tmp_path / "model", dtype=torch.float32)
    whole = models.load(folder, "float32")
    some = names(whole)[:: max(1, len(names(whole)) // 6)]
    found = dict(divergences(models.stream(folder, "float32"), ROWS, some, coarser, context))
    assert list(found) == some
    assert any(each > 1e-9 for each in found.values())
    assert found == pytest.approx({name: slowly(whole, name) for name in some}, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("most", [1, 1 << 14, 1 << 16, 1 << 30])
def test_waves_of_any_size_find_the_same(most: int, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_memory(tiny_config())
    model.untie(head(model.network)[0])
    wanted = [*names(model), head(model.network)[0]]
    before = {name: each.clone() for name, each in model.network.state_dict().items()}
    together = dict(divergences(model, ROWS, wanted, coarser, context))
    monkeypatch.setattr(branches, "HELD", most)
    assert dict(divergences(model, ROWS, wanted, coarser, context)) == together
    monkeypatch.setattr(branches, "PREDICTED", 7 * 1280)  # seven tokens at a time
    assert dict(divergences(model, ROWS, wanted, coarser, context)) == pytest.approx(together, rel=1e-4)
    assert together[wanted[-1]] == pytest.approx(slowly(model, wanted[-1]), rel=1e-4)
    assert all(torch.equal(each, before[name]) for name, each in model.network.state_dict().items())


def test_a_head_that_is_the_embeddings_changes_alone(tmp_path: Path, context: Context) -> None:
    folder = saved("llama", tmp_path / "model", dtype=torch.float32)
    model, whole = models.stream(folder, "float32"), models.load(folder, "float32")
    assert model.tied
    name = head(whole.network)[0]
    whole.untie(name)
    found = dict(divergences(model, ROWS, [name], coarser, context))
    assert found == pytest.approx({name: slowly(whole, name)}, rel=1e-3)
    assert model.tied


@pytest.mark.parametrize(("counts", "waves"), [
    ([7, 7, 7, 1], [(0, 2), (2, 4)]), ([0, 0, 20, 0], [(0, 4)]), ([20, 20], [(0, 1), (1, 2)]), ([0, 0, 0, 1], [(0, 4)]),
])  # fmt: skip
def test_a_wave_has_as_many_blocks_as_fit(counts: list[int], waves: list[tuple[int, int]]) -> None:
    assert [(wave.start, wave.stop) for wave in branches._waves(counts, 15)] == waves


def test_one_block_at_a_time_is_in_memory(
    tiny_folder: Maker, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.stream(tiny_folder())
    held: list[int] = []
    fill = models.Parts.fill

    def counting(parts: models.Parts, model: LoadedModel, part: str) -> None:
        fill(parts, model, part)
        held.append(sum(".layers." in open_ for open_ in {*parts.opened, part}))

    monkeypatch.setattr(models.Parts, "fill", counting)
    monkeypatch.setattr(branches, "HELD", 1)
    assert len(dict(divergences(model, ROWS, names(model), coarser, context))) == len(names(model))
    assert max(held) == 1
    assert in_use(model) == set()


@pytest.mark.parametrize(("family", "reads"), [("mistral", 1), ("gpt2", 4)])
def test_embeddings_are_read_for_predictions_only_where_the_head_is_these(
    family: str, reads: int, tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.stream(saved(family, tmp_path / "model"))
    assert bool(model.tied) == (reads > 1)
    read: list[str] = []
    fill = models.Original.fill
    monkeypatch.setattr(
        models.Original, "fill", lambda self, model, part: (read.append(part), fill(self, model, part))[1]
    )
    monkeypatch.setattr(branches, "HELD", 1)
    assert len(dict(divergences(model, ROWS, names(model), coarser, context))) == len(names(model))
    assert read.count(embeddings(model.network)[0]) == reads  # with the text, and for each of three waves


def test_a_linear_without_a_change_costs_nothing(context: Context) -> None:
    model = in_memory(tiny_config())
    found = dict(divergences(model, ROWS, names(model), lambda name, weight: weight, context))
    assert set(found.values()) == {0.0}
    assert not list(divergences(model, ROWS, [], coarser, context))
