"""The method: what it notes, what it refuses, and that it survives saving, alone and after other methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from transformers import AutoModelForCausalLM, MambaConfig

from engine import artifacts, headers, methods, models, runtime
from engine.errors import BadModel, BadParams
from engine.generate import generate
from engine.kv_cache import ARGUMENT, PackedCache
from engine.measure import latency, suite
from engine.methods import Context
from engine.models import LoadedModel
from engine.packing import CACHE_KEY, CacheGrid
from engine.places import DEMO
from engine.quantize import kv_cache
from engine.records import Recipe
from tests.conftest import Recorder, in_memory, tiny_config

PARAMS = kv_cache.Params(bits=4, group_size=8, window=4)
PROMPT = [5, 99, 1200, 7, 7, 431, 20]


def written(model: LoadedModel) -> torch.Tensor:
    """Log-probabilities of 40 tokens that it writes."""
    model.network.generation_config.eos_token_id = None
    model.network.config.eos_token_id = None
    return torch.stack([step.logprobs for step in generate(model, PROMPT, max_new_tokens=40)])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


CHAINS: dict[str, dict[str, JsonValue]] = {
    "nothing": {},
    "quantize/gptq": {"group_size": 32, "samples": 4, "sequence_length": 16},
    "quantize/smoothquant": {"samples": 4, "sequence_length": 16},
    "quantize/bitsandbytes": {"samples": 4, "sequence_length": 16},
}


@pytest.mark.parametrize("earlier", CHAINS)
def test_a_saved_model_writes_the_same_and_strangers_load_it(earlier: str, context: Context, tmp_path: Path) -> None:
    model = in_memory(tiny_config())
    if earlier in methods.methods():
        method = methods.get(earlier)
        model = method.apply(model, method.check(CHAINS[earlier]), context)
    model = kv_cache.apply(model, PARAMS, context)
    assert model.kv_cache == CacheGrid(4, 8, 4)
    folder = tmp_path / "artifact"
    artifacts.write(model, Recipe(), folder)
    artifacts.verify(folder)
    assert json.loads((folder / "config.json").read_text())[CACHE_KEY] == {"bits": 4, "group_size": 8, "window": 4}
    loaded = runtime.load(folder)
    assert loaded.kv_cache == models.load(folder).kv_cache == model.kv_cache
    assert apart(written(loaded), written(model)) < 0.02
    assert latency.kernels(loaded).endswith(", KV cache 4 bit, unpacked for attention")
    stranger = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert apart(stranger(ids).logits.float(), model.network(ids).logits.float()) < 0.02
        # With its own cache it writes, too, and with ours.
        assert stranger.generate(torch.tensor([PROMPT]), max_new_tokens=12, min_new_tokens=12).shape == (1, 19)
        cache = PackedCache(stranger.config, CacheGrid(4, 8, 4))
        stranger.generate(torch.tensor([PROMPT]), max_new_tokens=12, min_new_tokens=12, **{ARGUMENT: cache})
        assert cache.get_seq_length() == 18
    stranger.config.save_pretrained(tmp_path / "again")
    assert CACHE_KEY in json.loads((tmp_path / "again" / "config.json").read_text())


def test_what_was_measured_is_said(context: Context, tmp_path: Path, recorder: Recorder) -> None:
    model = kv_cache.apply(in_memory(tiny_config()), PARAMS, context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    suite.measure(tmp_path / "artifact", ("perplexity", "memory"), None, "cpu", recorder)
    found = {str(data["name"]): data for kind, data in recorder.said if kind == "measurement"}
    details = found["perplexity"]["details"]
    assert isinstance(details, dict)
    assert details["kv_cache"] == "4 bit, every key and value rounded, the newest too"
    assert found["memory.kv_cache"]["value"] == 3 * 2 * CacheGrid(4, 8, 4).bytes(256, 16, 2)
    assert "kernels: dense bfloat16 x 22, KV cache 4 bit, unpacked for attention" in recorder.logs()


def test_no_weight_changes(context: Context) -> None:
    model, original = in_memory(tiny_config()), in_memory(tiny_config()).network.state_dict()
    for name, weight in kv_cache.apply(model, PARAMS, context).network.state_dict().items():
        torch.testing.assert_close(weight, original[name], rtol=0, atol=0)


def test_a_family_without_keys_and_values_is_refused_also_when_loaded(context: Context) -> None:
    network = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    tiny = in_memory(tiny_config())
    with pytest.raises(BadModel, match="mamba keeps LinearAttentionLayer in block 0"):
        kv_cache.apply(LoadedModel(network, tiny.tokenizer, tiny.source), PARAMS, context)


def test_a_cache_that_is_not_used_is_noticed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_memory(tiny_config())
    right = type(model.network).forward

    def own_cache(*args: object, **kwargs: object) -> object:
        kwargs.pop(ARGUMENT)
        return right(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.network), "forward", own_cache)
    with pytest.raises(BadModel, match="LlamaForCausalLM has a cache of its own"):
        kv_cache.apply(model, PARAMS, context)


def test_groups_that_do_not_divide_a_head_are_refused_also_when_loaded(context: Context) -> None:
    with pytest.raises(BadParams, match=r"group_size 32 does not divide the 16 channels of a head\. .* do: 8, 16"):
        kv_cache.apply(in_memory(tiny_config()), kv_cache.Params(), context)


def test_a_window_as_long_as_any_text_is_said_to_bring_nothing() -> None:
    shape = headers.inspect(DEMO / "model")
    longest = shape.config["max_position_embeddings"]
    notes = [kv_cache.Params(window=window).notes(shape, "cpu") for window in (0, longest - 1, longest)]
    assert [any("the cache is no smaller" in note for note in each) for each in notes] == [False, False, True]
