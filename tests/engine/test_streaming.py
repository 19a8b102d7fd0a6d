"""Models larger than memory: parts are opened one at a time, and everything comes out as if all were in memory."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconH1Config, PreTrainedModel

from engine import artifacts, flow, headers, methods, models, places, verify
from engine.calibration import walk_blocks
from engine.checkpoint import part_names
from engine.errors import BadModel
from engine.headers import read_header
from engine.methods import Context, Params
from engine.models import LoadedModel, blocks, load_tokenizer
from engine.quantize import gptq, rtn
from engine.records import Recipe
from engine.stranger import Stranger
from engine.surgery import keep_blocks
from tests.conftest import in_memory
from tests.families import FAMILIES, MIXTURES

Maker = Callable[..., Path]
IDS = torch.randint(3, 1280, (2, 24), generator=torch.Generator().manual_seed(7))
GPTQ = gptq.Params(bits=4, group_size=32, samples=4, sequence_length=32)


def saved(family: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint as `transformers` writes it."""
    model = in_memory((FAMILIES | MIXTURES)[family])
    stock = AutoModelForCausalLM.from_config(model.network.config, dtype=dtype)
    stock.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(network: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = network(input_ids=IDS, use_cache=False).logits
    return found


def in_use(model: LoadedModel) -> set[str]:
    """The parts with a weight in memory."""
    parts = part_names(model.network, blocks(model.network)[0])
    return {
        part for part in parts if not all(p.is_meta for p in model.network.get_submodule(part).parameters())
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_a_streamed_model_computes_what_the_whole_does(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "model", dtype=torch.float32)
    model = models.stream(folder, "float32")
    assert in_use(model) == set()
    found = logits(model.network)
    assert in_use(model) == set()
    torch.testing.assert_close(found, logits(models.load(folder, "float32").network))
    model.load_all()
    assert logits(model.network).equal(found)


def test_what_a_body_computes_for_its_blocks_is_computed(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    config = FalconH1Config(vocab_size=1280, num_key_value_heads=2, ssm_multipliers=[2.0, 3.0, 4.0, 5.0, 6.0], **sizes)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    whole.save_pretrained(tmp_path)
    load_tokenizer(places.DEMO / "model").save_pretrained(tmp_path)
    assert torch.equal(logits(models.stream(tmp_path).network), logits(whole))


def test_only_one_block_is_in_memory(tiny_folder: Maker, context: Context) -> None:
    model = models.stream(tiny_folder())
    for block in walk_blocks(model, context, GPTQ, "hessian"):
        assert in_use(model) == {block.name}
    assert in_use(model) == set()


def test_what_lies_beside_the_blocks_is_not_read_for_each_batch(
    tiny_folder: Maker, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.stream(tiny_folder())
    read: list[str] = []
    fill = models.Parts.fill
    monkeypatch.setattr(models.Parts, "fill", lambda self, model, part: (read.append(part), fill(self, model, part))[1])
    ran: list[bool] = []
    blocks(model.network)[1][0].register_forward_hook(lambda *_: ran.append(True))
    params = gptq.Params(group_size=32, samples=40, sequence_length=32)  # five batches
    next(walk_blocks(model, context, params, "hessian"))
    embeddings, norm = (models.embeddings(model.network)[0], "model.norm")
    assert read.count(embeddings) == 2  # with the first batch a block computes, alone in memory
    assert norm not in read
    assert len(ran) == 1 + 5


def test_the_next_block_is_asked_for_while_one_is_worked_on(
    tiny_folder: Maker, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: asked.append((start, length)))
    folder = tiny_folder()
    headers = read_header(folder / "model.safetensors")
    wanted = []
    for block in walk_blocks(models.stream(folder), context, GPTQ):
        following = f"model.layers.{block.number + 1}."
        wanted += [(each.start, each.length) for name, each in headers.items() if name.startswith(following)]
        assert sorted(asked) == sorted(wanted)
    assert len(asked) == 2 * 9


@pytest.mark.parametrize("name", [name for name, method in methods.methods().items() if not method.params().whole()])
def test_methods_that_do_not_say_otherwise_hold_one_block(
    name: str, tiny_folder: Maker, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = methods.get(name)
    short: dict[str, JsonValue] = {"samples": 4, "sequence_length": 32, "group_size": 16, "multiple": 8}
    params = chosen.check({key: value for key, value in short.items() if key in chosen.params.model_fields})
    held: list[int] = []
    fill = models.Parts.fill

    def counting(parts: models.Parts, model: LoadedModel, part: str) -> None:
        fill(parts, model, part)
        held.append(sum(".layers." in open_ for open_ in {*parts.opened, part}))

    monkeypatch.setattr(models.Parts, "fill", counting)
    model = chosen.apply(models.stream(tiny_folder()), params, context)
    assert max(held, default=0) <= 1
    assert model.parts is not None, "load_all was called: `whole` must say so"
    assert in_use(model) == set()


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "falcon", *MIXTURES])
def test_gptq_of_a_stream_writes_the_bytes_of_gptq_in_memory(family: str, context: Context, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "model")
    streamed, whole = models.stream(folder), models.stream(folder)
    whole.load_all()
    for name, model in (("streamed", streamed), ("whole", whole)):
        gptq.apply(model, GPTQ, Context("cpu", 0, tmp_path / name / "b", tmp_path, context.calibration,
                                        context.emit, context.check_cancelled))  # fmt: skip
        artifacts.write(model, Recipe(), tmp_path / name / "artifact")
    manifests = [(tmp_path / name / "artifact" / artifacts.MANIFEST).read_bytes() for name in ("streamed", "whole")]
    assert manifests[0] == manifests[1]


CUTS: tuple[tuple[str, dict[str, JsonValue]], ...] = (
    ("prune/depth", {"count": 1, "samples": 3, "sequence_length": 24}),
    (
        "prune/width",
        {"neurons": 0.5, "heads": 0.5, "channels": 0.5, "multiple": 8, "samples": 3, "sequence_length": 24},
    ),
    ("prune/vocabulary", {}),
    ("quantize/gptq", {"group_size": 16, "samples": 3, "sequence_length": 24}),
)


@pytest.mark.parametrize("by", ["influence", "greedy"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon"])
def test_a_chain_of_a_stream_writes_the_bytes_of_one_in_memory(
    family: str, by: str, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(family, tmp_path / "model")
    monkeypatch.setattr(flow, "HELD", 0)  # all states go to files
    for way in ("streamed", "whole"):
        model = models.stream(folder)
        if way == "whole":
            model.load_all()
        for number, (name, settings) in enumerate(CUTS):
            method, place = methods.get(name), tmp_path / way / str(number)
            params = method.check({**settings, "by": by} if name == "prune/depth" else settings)
            model = method.apply(model, params, replace(context, folder=place / "blocks", cache=place))
            assert (model.parts is not None) == (way == "streamed")
            assert way == "whole" or in_use(model) == set()
            if not name.startswith("quantize"):
                assert not any(path.is_file() for path in (place / "blocks").rglob("*"))
        artifacts.write(model, Recipe(), tmp_path / way / "artifact")
    streamed, whole = ((tmp_path / way / "artifact" / artifacts.MANIFEST).read_bytes() for way in ("streamed", "whole"))
    assert streamed == whole


def test_a_part_of_a_smaller_network_is_read_when_it_is_opened(tiny_folder: Maker) -> None:
    """A cut of a cut: only what stands in a part is read for it, and tied weights once."""
    whole = models.stream(tiny_folder(num_hidden_layers=5))
    smaller = keep_blocks(keep_blocks(whole, [0, 2, 3, 4]), [1, 3])
    assert smaller.tied == whole.tied
    with smaller.opened("model.layers.1"):
        assert in_use(smaller) == {"model.layers.1"}
        assert in_use(whole) == set()
        weight = smaller.network.get_parameter("model.layers.1.mlp.up_proj.weight")
        with whole.opened("model.layers.4"):
            assert torch.equal(weight, whole.network.get_parameter("model.layers.4.mlp.up_proj.weight"))
    assert in_use(smaller) == set()


def test_a_finished_block_is_the_artifacts_file(tiny_folder: Maker, context: Context, tmp_path: Path) -> None:
    model = rtn.apply(models.stream(tiny_folder()), rtn.Params(bits=3, group_size=32), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    linked = {file.stat().st_ino for file in (tmp_path / "artifact").glob("*.safetensors")}
    assert {file.stat().st_ino for file in context.folder.glob("block-*")} < linked
    assert all(weight.codes.is_meta for weight in model.quantized.values())


def test_a_disk_without_hard_links_gets_a_copy(
    tiny_folder: Maker, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rtn.apply(models.stream(tiny_folder()), rtn.Params(bits=3, group_size=32), context)

    def link(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    artifacts.write(model, Recipe(), tmp_path / "linked")
    monkeypatch.setattr(os, "link", link)
    artifacts.write(model, Recipe(), tmp_path / "copied")
    linked, copied = (tmp_path / name / artifacts.MANIFEST for name in ("linked", "copied"))
    assert copied.read_bytes() == linked.read_bytes()
    artifacts.verify(tmp_path / "copied")


@pytest.mark.parametrize("settings", [{}, {"bits": 3}, {"symmetric": False}, {"granularity": "tensor"}, {"bits": 8}])
def test_a_strangers_reading_part_by_part_gives_the_logits(
    settings: dict[str, object], tiny_folder: Maker, context: Context, tmp_path: Path
) -> None:
    params = rtn.Params.model_validate({"group_size": 32} | settings)
    model = rtn.apply(models.stream(tiny_folder()), params, context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    stranger = models.stream(tmp_path / "artifact", "bfloat16", "cpu", Stranger)
    torch.testing.assert_close(logits(stranger.network), logits(model.network), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "activations"), [("smoothquant", "token"), ("smoothquant", "tensor"), ("fp8", "token")]
)
def test_a_stranger_rounds_the_inputs_that_the_config_names(
    method: str, activations: str, tiny_folder: Maker, context: Context, tmp_path: Path
) -> None:
    chosen = methods.get(f"quantize/{method}")
    given: dict[str, JsonValue] = {"activations": activations}
    given |= {"samples": 4, "sequence_length": 32} if method == "smoothquant" else {}
    model = chosen.apply(models.stream(tiny_folder()), chosen.check(given), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    stranger = models.stream(tmp_path / "artifact", "bfloat16", "cpu", Stranger)
    torch.testing.assert_close(logits(stranger.network), logits(model.network), rtol=0, atol=0)


def test_an_artifact_larger_than_memory_is_verified_part_by_part(
    tiny_folder: Maker, context: Context, tmp_path: Path
) -> None:
    model = rtn.apply(models.stream(tiny_folder()), rtn.Params(group_size=32), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    save_file(verify.probe(model), tmp_path / "expected.safetensors")
    request = {"folder": str(tmp_path / "artifact"), "expected": str(tmp_path / "expected.safetensors"),
               "device": "cpu", "streamed": True}  # fmt: skip
    assert "with transformers" in verify.verify({**request, "bytes": 0})
    assert "part by part" in verify.verify({**request, "bytes": 1 << 50})


@pytest.mark.parametrize(
    ("damage", "words"),
    [("missing", "missing: model.layers.1.mlp.up_proj.weight"), ("shape", "the config says"), ("nan", "holds NaN")],
)
def test_damaged_checkpoints_are_refused_before_work(damage: str, words: str, tiny_folder: Maker) -> None:
    folder = tiny_folder()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tensors.pop(name)
    if damage == "shape":
        tensors[name] = weight[:, :32].contiguous()
    if damage == "nan":
        weight[3, 4] = torch.nan
        tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModel, match=words):
        models.stream(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_read_for_both_and_stored_once(tied: bool, tiny_folder: Maker, tmp_path: Path) -> None:
    model = models.stream(tiny_folder(tie_word_embeddings=tied))
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    index = json.loads((tmp_path / "artifact" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    torch.testing.assert_close(logits(models.load(tmp_path / "artifact").network), logits(model.network))


@pytest.mark.parametrize("same", [True, False])
def test_tied_weights_that_are_stored_twice_are_one_where_they_are_the_same(
    same: bool, tiny_folder: Maker, context: Context, tmp_path: Path
) -> None:
    folder = tiny_folder(tie_word_embeddings=True)
    once = headers.inspect(folder).parameters
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head if same else -head}, folder / "model.safetensors", {"format": "pt"})
    assert headers.inspect(folder).parameters == once
    model = models.stream(folder)
    assert model.tied == ({"lm_head.weight"} if same else set())
    before = logits(models.load(folder).network)
    torch.testing.assert_close(logits(model.network), before)
    rtn.apply(model, rtn.Params(bits=8, group_size=32, head=True, embeddings=same), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    torch.testing.assert_close(logits(models.load(tmp_path / "artifact").network), before, rtol=0.1, atol=0.1)


def test_a_walk_that_only_looks_changes_nothing(tiny_folder: Maker, context: Context) -> None:
    model = models.stream(tiny_folder())
    before = logits(model.network)
    for _ in walk_blocks(model, context, Params(), keep_blocks=False):
        pass
    assert logits(model.network).equal(before)
    assert not context.folder.exists()
