"""Low rank: optimal truncation on correlated inputs, exact sizes, one format from the block to the export."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engine import artifacts, export, headers, models, places, preflight, runtime, verify
from engine.errors import BadModel, BadParams
from engine.low_rank import ranks
from engine.methods import Context
from engine.models import LoadedModel, blocks, load_tokenizer
from engine.prune import low_rank, magnitude
from engine.prune.low_rank import Params, factors, fill, root_of, uniform
from engine.quantize import gptq, rtn
from engine.records import Recipe
from engine.surgery import keep_blocks
from tests.conftest import Recorder, in_memory
from tests.engine.quantize.test_gptq import correlated
from tests.engine.test_bitmask import logits, saved
from tests.families import FAMILIES, MIXTURES

Maker = Callable[..., Path]
SMALL = Params(samples=8, sequence_length=16, multiple=8)


@pytest.mark.parametrize("rank", [1, 9, 24])
def test_the_output_error_is_the_sum_of_what_is_dropped(rank: int) -> None:
    inputs = correlated(400, 48).double()
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)).double()
    root = root_of((inputs.t() @ inputs).float(), 1e-9).double()
    dropped = torch.linalg.svdvals(weight @ root)[rank:].square().sum()
    down, up = factors(weight.float(), root.float(), rank)
    error = (inputs @ (up.double() @ down.double() - weight).t()).square().sum()
    torch.testing.assert_close(error, dropped, rtol=1e-3, atol=1e-3)
    # No other product of that rank does better: neither that of W's own singular values nor a step in any direction.
    own_down, own_up = factors(weight.float(), torch.eye(48), rank)
    assert error < 0.99 * (inputs @ (own_up.double() @ own_down.double() - weight).t()).square().sum()
    for seed in range(5):
        step = torch.randn(down.shape, generator=torch.Generator().manual_seed(seed)) * down.abs().mean() * 0.01
        assert error < (inputs @ (up.double() @ (down + step).double() - weight).t()).square().sum()


def test_water_filling_takes_what_saves_most() -> None:
    values = {"flat": torch.full((64,), 1 / 64), "steep": torch.tensor([0.9] + [0.1 / 63] * 63)}
    shapes = {"flat": (64, 64), "steep": (64, 64)}
    found = fill(values, shapes, 0.6, 1)
    assert found["flat"] == 0 or found["flat"] > found["steep"]
    spent = sum(64 * 64 if rank == 0 else 128 * rank for rank in found.values())
    assert 0.58 * 2 * 64 * 64 < spent <= 0.6 * 2 * 64 * 64
    falling = 0.9 ** torch.arange(64)
    equal = fill({"a": falling, "b": falling.clone()}, {"a": (64, 64), "b": (64, 64)}, 0.4, 4)
    assert max(equal.values()) - min(equal.values()) <= 4
    with pytest.raises(BadParams, match=r"ratio 0\.1 leaves no rank"):
        fill(values, shapes, 0.1, 16)


@pytest.mark.parametrize("allocation", ["uniform", "water-filling"])
def test_the_size_is_the_ratio_at_most(allocation: str, tiny: LoadedModel, context: Context) -> None:
    before = sum(p.numel() for n, p in tiny.network.named_parameters() if "proj" in n)
    params = Params.model_validate({**SMALL.model_dump(), "ratio": 0.5, "allocation": allocation})
    low_rank.apply(tiny, params, context)
    after = sum(p.numel() for n, p in tiny.network.named_parameters() if "proj" in n)
    assert (0.35 if allocation == "uniform" else 0.47) * before < after <= 0.5 * before
    assert all(rank % 8 == 0 for rank in ranks(tiny.network).values())
    assert uniform((64, 128), 0.5, 8) == 16


def test_another_ratio_needs_no_new_look(tiny_folder: Maker, context: Context, recorder: Recorder) -> None:
    folder = tiny_folder()
    low_rank.apply(models.stream(folder), SMALL, context)
    assert not any("reused" in line for line in recorder.logs())
    again = dataclasses.replace(context, folder=context.folder / "again")
    low_rank.apply(models.stream(folder), SMALL.model_copy(update={"ratio": 0.4}), again)
    assert "singular values: measured before, now reused" in recorder.logs()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon", "bloom", "mixtral"])
def test_every_reader_of_ours_reads_it_and_stock_transformers_its_export(
    family: str, context: Context, tmp_path: Path
) -> None:
    model = in_memory((FAMILIES | MIXTURES)[family])
    low_rank.apply(model, SMALL.model_copy(update={"allocation": "uniform"}), context)
    expected, folder = logits(model), saved(model, tmp_path / "artifact")
    assert set(ranks(model.network))
    for read in (models.load(folder), models.stream(folder), runtime.load(folder)):
        torch.testing.assert_close(logits(read), expected, rtol=0, atol=0)
        assert ranks(read.network) == ranks(model.network)
    assert headers.inspect(folder).parameters == sum(
        p.numel() for p in {id(p): p for p in model.network.parameters()}.values()
    )
    with pytest.raises((RuntimeError, ValueError, IndexError), match=r"mismatch|conversion|shape|dimension"):
        AutoModelForCausalLM.from_pretrained(folder)
    export.exporter("dense")(folder, tmp_path / "dense")
    assert not ranks(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    plain = logits(models.load(tmp_path / "dense"))
    assert float((plain - expected).norm() / expected.norm()) < 0.02


def test_a_run_that_resumes_gives_the_same_files(tiny_folder: Maker, context: Context, tmp_path: Path) -> None:
    source = tiny_folder()
    first = saved(low_rank.apply(models.stream(source), SMALL, context), tmp_path / "first")
    next(context.folder.glob("block-0001*")).unlink()
    next(context.folder.glob("block-0002*")).unlink()
    second = saved(low_rank.apply(models.stream(source), SMALL, context), tmp_path / "second")
    assert (first / artifacts.MANIFEST).read_bytes() == (second / artifacts.MANIFEST).read_bytes()


@pytest.mark.parametrize("targets", ["", "*.mlp.*"])
def test_the_factors_are_quantized_afterwards_verified_and_exported(
    targets: str, tiny_folder: Maker, context: Context, tmp_path: Path
) -> None:
    model = low_rank.apply(models.stream(tiny_folder()), SMALL.model_copy(update={"allocation": "uniform"}), context)
    params = gptq.Params(bits=8, granularity="channel", samples=4, sequence_length=16, targets=targets)
    gptq.apply(model, params, dataclasses.replace(context, folder=tmp_path / "gptq"))
    assert all(name.endswith((".up", ".down")) for name in model.quantized)
    folder = saved(model, tmp_path / "artifact")
    expected = verify.probe(model)
    save_file(expected, tmp_path / "expected.safetensors")
    asked = {"folder": str(folder), "device": "cpu", "expected": str(tmp_path / "expected.safetensors"),
             "streamed": True, "bytes": 0}  # fmt: skip
    assert "by Maquette's own reader" in verify.verify(asked)
    assert runtime.load(folder).kernels.keys() == model.quantized.keys()
    with pytest.raises(BadModel, match="products of two"):
        export.exporter("gptq")(folder, tmp_path / "gptq-format")
    export.exporter("dense")(folder, tmp_path / "dense")
    ids, wanted = expected["ids"], expected["logits"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    with torch.no_grad():
        found = stock(ids).logits[0].float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_a_mixture_with_experts_that_are_products_is_exported_without_any_packed_linear(
    context: Context, tmp_path: Path
) -> None:
    """Of experts of which some were left as they are, the others packed: stock `transformers` reads all or none."""
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(MIXTURES["mixtral"]), dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path / "model")
    load_tokenizer(places.DEMO / "model").save_pretrained(tmp_path / "model")
    params = SMALL.model_copy(update={"targets": "*.experts.*", "multiple": 16, "allocation": "uniform"})
    model = low_rank.apply(models.stream(tmp_path / "model"), params, context)
    assert any(".experts." in name for name in ranks(model.network))
    rounding = rtn.Params(group_size=16, head=True, embeddings=True)
    rtn.apply(model, rounding, dataclasses.replace(context, folder=tmp_path / "rtn"))
    folder, expected = saved(model, tmp_path / "artifact"), verify.probe(model)
    export.exporter("dense")(folder, tmp_path / "dense")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    with torch.no_grad():
        found = read(expected["ids"]).logits[0].float()
    assert float((found - expected["logits"]).norm() / expected["logits"].norm()) < 0.02


def test_blocks_of_products_are_kept_by_their_new_names(tiny: LoadedModel, context: Context) -> None:
    low_rank.apply(tiny, SMALL, context)
    kept = keep_blocks(tiny, [0, 2])
    old, new = blocks(tiny.network)[1][2], blocks(kept.network)[1][1]
    torch.testing.assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)


def test_a_bitmask_is_exported_dense_and_a_plain_folder_is_not(
    tiny: LoadedModel, context: Context, tmp_path: Path
) -> None:
    magnitude.apply(tiny, magnitude.Params(sparsity=0.6, storage="bitmask"), context)
    folder = saved(tiny, tmp_path / "artifact")
    export.exporter("dense")(folder, tmp_path / "dense")
    torch.testing.assert_close(logits(models.load(tmp_path / "dense")), logits(tiny), rtol=0, atol=0)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not stock.state_dict().keys() ^ tiny.network.state_dict().keys()
    with pytest.raises(BadModel, match="use the folder as it is"):
        export.exporter("dense")(tmp_path / "dense", tmp_path / "again")


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"ratio": 0.05}, "ratio 0.05 leaves"), ({"ratio": 0.05, "allocation": "uniform"}, r"Use a ratio from 0\.\d+ on")],
)
def test_a_ratio_that_leaves_nothing_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(BadParams, match=words):
        Params.model_validate(settings).check_model({"a": (128, 128), "b": (64, 128)}, 1 << 20)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, float("nan")])
def test_a_ratio_out_of_bounds_is_refused(ratio: float) -> None:
    from engine import methods

    with pytest.raises(BadParams, match="ratio"):
        methods.get("prune/low_rank").check({"ratio": ratio})


def test_a_config_that_lies_is_refused(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    import json

    low_rank.apply(tiny, SMALL, context)
    folder = saved(tiny, tmp_path / "artifact")
    config = json.loads((folder / "config.json").read_text())
    name = next(iter(config["maquette_low_rank"]))
    for wrong in ({name: 10**9}, {name: "8"}, {"model.nothing": 8}, {"lm_head": 0}, "all"):
        (folder / "config.json").write_text(json.dumps(config | {"maquette_low_rank": wrong}))
        with pytest.raises(BadModel, match="maquette_low_rank"):
            models.load(folder)


def test_a_model_of_low_rank_loses_blocks_and_never_widths_or_ranks(
    tiny: LoadedModel, context: Context, tmp_path: Path
) -> None:
    low_rank.apply(tiny, SMALL, context)
    folder = saved(tiny, tmp_path / "artifact")
    before = ranks(tiny.network)
    model = models.load(folder)
    fewer = keep_blocks(model, [0, 2])
    kept = {name.replace(".2.", ".1."): rank for name, rank in before.items() if ".1." not in name}
    assert ranks(models.load(saved(fewer, tmp_path / "fewer")).network) == kept
    for method, words in (("prune/width", "cannot be made narrower"), ("prune/low_rank", "of low rank already")):
        recipe = Recipe.model_validate({"model": str(folder), "steps": [method], "measure": ["size"]})
        with pytest.raises(BadParams, match=f"{method}: .*{words}"):
            preflight.check(recipe)


def test_recipe_is_kept_by_the_export(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    low_rank.apply(tiny, SMALL, context)
    artifacts.write(tiny, Recipe(seed=5), tmp_path / "artifact")
    export.exporter("dense")(tmp_path / "artifact", tmp_path / "dense")
    assert '"seed": 5' in (tmp_path / "dense" / artifacts.MANIFEST).read_text()
