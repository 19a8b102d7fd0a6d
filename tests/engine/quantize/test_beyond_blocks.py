"""The head and the embeddings, quantized beside the blocks: tied or not, streamed or not, read by everybody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import artifacts, export, headers, methods, models, own_packed, preflight, runtime
from engine.errors import BadModel, BadParams, Cancelled
from engine.methods import Context
from engine.models import LoadedModel, embeddings, head
from engine.quantize import gptq, rtn
from engine.records import Recipe
from engine.runtime.embedding import Int8Embedding
from engine.sizes import Holding
from engine.stranger import Stranger
from tests.conftest import in_memory
from tests.families import FAMILIES

Maker = Callable[..., Path]
IDS = torch.randint(3, 1280, (2, 24), generator=torch.Generator().manual_seed(7))
BOTH = {"head": True, "embeddings": True, "group_size": 32}


@torch.inference_mode()
def logits(network: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = network(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("rtn", {}), ("gptq", {}), ("awq", {}), ("hqq", {}), ("fp8", {}), ("fp8", {"activations": "token"}),
        ("mixed", {"budget": 4.5}), ("mixed", {"budget": 0.18, "unit": "mib"}),
        ("smoothquant", {}), ("smoothquant", {"activations": "tensor"}),
    ],
)  # fmt: skip
def test_everybody_reads_a_model_that_is_quantized_throughout(
    method: str, own: dict[str, JsonValue], tied: bool, tiny_folder: Maker, context: Context, tmp_path: Path
) -> None:
    chosen = methods.get(f"quantize/{method}")
    given = BOTH | {"samples": 4, "sequence_length": 32} | own
    settings = {key: value for key, value in given.items() if key in chosen.params.model_fields}
    folder = tiny_folder(tie_word_embeddings=tied)
    model = chosen.apply(models.stream(folder), chosen.check(settings), context)
    assert {"lm_head", "model.embed_tokens"} <= set(model.quantized)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    expected = logits(model.network)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    torch.testing.assert_close(logits(stock), expected, rtol=0, atol=0)
    assert stock.lm_head.weight is not stock.model.embed_tokens.weight
    by_parts = models.stream(tmp_path / "artifact", "bfloat16", "cpu", Stranger)
    torch.testing.assert_close(logits(by_parts.network), expected, rtol=0, atol=0)
    ours = runtime.load(tmp_path / "artifact")
    assert isinstance(ours.network.get_input_embeddings(), Int8Embedding)
    assert (logits(ours.network) - expected).norm() / expected.norm() < 0.03
    stored = headers.inspect(tmp_path / "artifact").bytes
    assert Holding(headers.inspect(folder), 2).after(chosen.check(settings)).file_bytes() == pytest.approx(
        stored, rel=0.02
    )
    eight = method in ("fp8", "smoothquant") and tied  # two matrices of 8 bits, where one of 16 was
    assert stored < (0.75 if eight else 0.55) * headers.inspect(folder).bytes


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma", "gemma2", "gemma3"}))
def test_every_family_has_a_head_and_embeddings(family: str, context: Context, tmp_path: Path) -> None:
    params = gptq.Params.model_validate(BOTH | {"samples": 4, "sequence_length": 32})
    model = gptq.apply(in_memory(FAMILIES[family]), params, context)
    assert {head(model.network)[0], embeddings(model.network)[0]} <= set(model.quantized)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    folder = tmp_path / "artifact"
    if family in own_packed.FAMILIES:
        assert {head(model.network)[0], embeddings(model.network)[0]} < set(runtime.load(folder).kernels)
        folder = tmp_path / "dense"
        export.exporter("dense")(tmp_path / "artifact", folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    torch.testing.assert_close(logits(stock), logits(model.network), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_statistics_are_those_of_what_enters_it(tied: bool, tiny_folder: Maker, context: Context) -> None:
    folder = tiny_folder(tie_word_embeddings=tied)
    params = gptq.Params.model_validate(BOTH | {"samples": 4, "sequence_length": 32, "equal_tokens": False})
    model = models.stream(folder)
    seen: dict[str, torch.Tensor] = {}
    from engine.calibration import token_rows, walk_blocks

    for block in walk_blocks(model, context, params, params.collect):
        for linear in block.linears:
            assert linear.hessian is not None
            seen[linear.name] = linear.hessian.clone()
    whole = models.load(folder)
    entered: list[torch.Tensor] = []
    whole.network.lm_head.register_forward_pre_hook(lambda _, args: entered.append(args[0].flatten(0, 1).float()))
    with torch.inference_mode():
        whole.network(input_ids=token_rows(whole.tokenizer, context.calibration, 32, 4), use_cache=False)
    inputs = torch.cat(entered)
    expected = 2 * inputs.t() @ inputs / len(inputs)
    torch.testing.assert_close(seen["lm_head"].triu(), expected.triu(), rtol=2e-2, atol=2e-2)


def test_a_resumed_run_takes_the_head_and_the_embeddings_up(
    tiny_folder: Maker, context: Context, tmp_path: Path
) -> None:
    folder, params = tiny_folder(), rtn.Params.model_validate(BOTH)

    def run(model: LoadedModel, name: str, kept: Path, stop_at: int = 99) -> bytes:
        def check() -> None:
            if len(list(kept.glob("*.safetensors"))) >= stop_at:
                raise Cancelled("stopped")

        given = Context("cpu", 0, kept, tmp_path, context.calibration, context.emit, check)
        artifacts.write(rtn.apply(model, params, given), Recipe(), tmp_path / name)
        return (tmp_path / name / artifacts.MANIFEST).read_bytes()

    whole = run(models.stream(folder), "a", tmp_path / "kept-a")
    with pytest.raises(Cancelled):
        run(models.stream(folder), "b", tmp_path / "kept-b", stop_at=3)
    assert run(models.stream(folder), "b", tmp_path / "kept-b") == whole
    assert run(models.stream(folder), "c", tmp_path / "kept-b") == whole  # nothing is left to do


@pytest.mark.parametrize(("head", "embeddings"), [(True, False), (False, True)])
def test_half_of_a_tied_pair_is_refused(head: bool, embeddings: bool, tiny_folder: Maker) -> None:
    step = {"quantize/rtn": {"group_size": 32, "head": head, "embeddings": embeddings}}
    with pytest.raises(BadParams, match="Choose both"):
        preflight.check(Recipe.model_validate({"model": str(tiny_folder()), "steps": [step], "measure": ["size"]}))
    free = str(tiny_folder(tie_word_embeddings=False))
    preflight.check(Recipe.model_validate({"model": free, "steps": [step], "measure": ["size"]}))


def test_embeddings_that_no_file_can_hold_are_refused_before_work(context: Context) -> None:
    with pytest.raises(BadModel, match="can only stay as they are"):
        rtn.apply(in_memory(FAMILIES["gemma3"]), rtn.Params.model_validate(BOTH), context)
    assert not context.folder.exists()
