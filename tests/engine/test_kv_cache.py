"""The packed KV cache against slow references: rounding, bytes, masks, growth, and generation of every family."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig

from engine.generate import cache_bytes, decode, generate, score
from engine.kv_cache import TOKENS, Along, PackedCache, PackedLayer, PackedStates, RoundedLayer, read_on, rounded
from engine.measure import _text, memory
from engine.measure._text import log_probabilities
from engine.models import LoadedModel
from engine.packing import CacheGrid
from engine.quantize.kv_cache import OTHER_CACHES
from engine.runtime.native.decoder import NativeDecoder
from tests.conftest import in_memory, tiny_config
from tests.families import FAMILIES

GRID = CacheGrid(bits=4, group_size=8, window=3)


def states(tokens: int, channels: int = 32, batch: int = 2, seed: int = 0) -> Tensor:
    """Keys of two heads as they are: neighbouring tokens alike, and one channel ten times the others."""
    dice = torch.Generator().manual_seed(seed)
    steps = torch.randn(batch, 2, tokens, channels, generator=dice)
    walk = steps.cumsum(TOKENS) / torch.arange(1, tokens + 1).sqrt()[:, None] + 0.3 * steps
    walk[..., 5] = 10 + walk[..., 5]
    return walk.to(torch.bfloat16)


def by_hand(x: Tensor, bits: int, along: Along, size: int) -> tuple[Tensor, Tensor]:
    """One number at a time: what it becomes, and the step of its group."""
    result, steps = torch.empty_like(x), torch.empty(x.shape)
    for b, h, t, d in product(*map(range, x.shape)):
        start = (t if along == "tokens" else d) // size * size
        group = x[b, h, start : start + size, d] if along == "tokens" else x[b, h, t, start : start + size]
        low = group.min().to(torch.bfloat16).item()
        step = torch.tensor((group.max().item() - low) / (2**bits - 1)).to(torch.bfloat16).item() or 1.0
        code = min(max(round((x[b, h, t, d].item() - low) / step), 0), 2**bits - 1)
        result[b, h, t, d] = code * step + low
        steps[b, h, t, d] = step
    return result, steps


@pytest.mark.parametrize(("bits", "along", "size"), [*product((4, 8), ("tokens", "channels"), (8, 16))])
def test_rounding_is_that_of_the_slow_reference_within_half_a_step(bits: int, along: Along, size: int) -> None:
    x = states(16)
    x[0, 0, :, 3] = 0.5  # a group of equal numbers, kept exactly
    expected, steps = by_hand(x, bits, along, size)
    packed = PackedStates.of(x, bits, along, size)
    found = torch.empty_like(x)
    packed.write_to(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # Half a step; half of the last bit of a scale at the top code; the result's last bit.
    error = (found.float() - x.float()).abs()
    assert bool((error <= steps * (0.5 + (2**bits - 1) / 512) + x.float().abs() / 256).all())
    assert packed.codes.dtype == torch.uint8
    assert packed.codes.nbytes == x.numel() * bits // 8
    assert packed.scale.nbytes + packed.low.nbytes == 4 * x.numel() // size


def test_a_large_channel_spoils_only_groups_that_hold_it() -> None:
    x = states(32)
    error = {
        along: (rounded(x, 4, along, 8).float() - x.float()).square()[..., :8].mean().item()  # type: ignore[arg-type]
        for along in ("tokens", "channels")
    }
    assert error["tokens"] < error["channels"] / 3


@pytest.mark.parametrize("parts", [(40,), (1,) * 40, (11, 1, 1, 20, 7), (8, 8, 8, 16)])
def test_a_layer_gives_packed_groups_then_exact_tokens(parts: tuple[int, ...]) -> None:
    keys, values = states(sum(parts)), states(sum(parts), seed=1)
    layer, seen = PackedLayer(GRID), 0
    for new in parts:
        found = layer.update(keys[:, :, seen : seen + new], values[:, :, seen : seen + new])
        old = GRID.packed_tokens(seen)
        seen += new
        for got, whole, along in zip(found, (keys, values), ("tokens", "channels"), strict=True):
            past = rounded(whole[:, :, :old], 4, along, 8) if old else whole[:, :, :0]  # type: ignore[arg-type]
            torch.testing.assert_close(got, torch.cat((past, whole[:, :, old:seen]), TOKENS), rtol=0, atol=0)
        assert layer.get_seq_length() == seen
        assert layer.nbytes == 2 * 2 * GRID.bytes(seen, 32, 2)
        assert layer.get_mask_sizes(1) == (seen + 1, 0)
        assert 3 <= seen - GRID.packed_tokens(seen) < 11 or seen < 3
        assert layer.room == 11 - (seen - GRID.packed_tokens(seen))


def test_what_is_held_is_not_kept_alive_by_views() -> None:
    layer = PackedLayer(GRID)
    layer.update(states(400), states(400))
    recent = layer._streams[0].recent
    assert recent is not None
    assert recent.untyped_storage().nbytes() == recent.nbytes


@pytest.mark.parametrize("window", [12, 30])  # less than two groups, and several
def test_a_sliding_layer_forgets_whole_groups_and_shows_its_window(window: int) -> None:
    keys = states(60)
    layer = PackedLayer(CacheGrid(8, 8, 0), sliding_window=window)
    for place in range(60):
        length, first = layer.get_mask_sizes(1)
        found, _ = layer.update(keys[:, :, place : place + 1], keys[:, :, place : place + 1])
        assert (length, first) == (min(place + 1, window), max(0, place - window + 1))
        assert found.shape[TOKENS] == length
        torch.testing.assert_close(found, keys[:, :, first : place + 1], rtol=0.03, atol=0.03)
        assert layer.nbytes <= 2 * 2 * CacheGrid(8, 8, 0).bytes(window - 1 + 8 + 7, 32, 2)
    assert layer.get_seq_length() == 60


def test_sequences_are_chosen_and_forgotten() -> None:
    keys = states(20, batch=3)
    layer, other = PackedLayer(GRID), PackedLayer(GRID)
    order = torch.tensor([2, 0, 0])
    layer.update(keys, keys)
    layer.reorder_cache(order)
    other.update(keys[order], keys[order])
    new = states(1, batch=3, seed=2)
    for found, expected in zip(layer.update(new, new), other.update(new, new), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0


def strong(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A model whose next token depends strongly on the text, and that never ends it."""
    model = in_memory(config, dtype)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.network.generation_config.eos_token_id = None
    model.network.config.eos_token_id = None
    return model


PROMPT = [5, 99, 1200, 7, 7, 431, 20]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_and_scores_with_the_same_cache(family: str) -> None:
    model = strong(FAMILIES[family])
    model.kv_cache = CacheGrid(8, 8, 4)
    steps = list(generate(model, PROMPT, max_new_tokens=40))
    ids = [step.token_id for step in steps]
    written = torch.stack([step.logprobs for step in steps])
    # Read in parts, each token sees what it saw when it was written; with exact keys and values it sees others.
    torch.testing.assert_close(score(model, PROMPT + ids, len(PROMPT)), written, rtol=1e-3, atol=1e-3)
    exact = LoadedModel(model.network, model.tokenizer, model.source)
    apart = (score(exact, PROMPT + ids, len(PROMPT)) - written).abs()
    assert apart[:5].max() < 1e-3 < apart.max() < 1  # at first nothing is packed


def test_an_exact_window_longer_than_the_text_changes_nothing() -> None:
    model = strong(tiny_config())
    expected = [step.tokens.tolist() for step in decode(model.network, PROMPT, 30, batch=2)]
    found = decode(model.network, PROMPT, 30, batch=2, kv_cache=CacheGrid(4, 16, 64))
    assert [step.tokens.tolist() for step in found] == expected


def test_a_batch_repeats_what_one_sequence_gives() -> None:
    network = strong(tiny_config()).network
    one = [int(step.tokens) for step in decode(network, PROMPT, 30, kv_cache=GRID)]
    three = [step.tokens.tolist() for step in decode(network, PROMPT, 30, batch=3, kv_cache=GRID)]
    assert three == [[token] * 3 for token in one]


@pytest.mark.parametrize("prompt", [0, 3])
def test_the_demo_model_writes_the_same_with_8_bits_and_sees_nearly_the_same_with_4(
    demo: LoadedModel, prompt: int
) -> None:
    demo.network.generation_config.eos_token_id = None
    demo.network.config.eos_token_id = None
    ids = _text.encode(demo.tokenizer, _text.prompts()[prompt])

    def write(grid: CacheGrid) -> list[int]:
        demo.kv_cache = grid
        return [step.token_id for step in generate(demo, ids, max_new_tokens=80)]

    theirs = write(CacheGrid(8, 32, 4096))  # exact, on the same path
    reference = score(demo, ids + theirs, len(ids))
    ours = write(CacheGrid(8, 32, 0))
    parted = next((place for place in range(80) if ours[place] != theirs[place]), None)
    if parted is not None:  # two tokens that are as likely: either may be written
        assert parted > 20
        assert reference[parted, theirs[parted]] - reference[parted, ours[parted]] < 0.1
    for bits, most in ((8, 2e-4), (4, 2e-3)):
        demo.kv_cache = CacheGrid(bits, 32, 0)  # type: ignore[arg-type]
        logs = score(demo, ids + theirs, len(ids))
        assert 0 < (reference.exp() * (reference - logs)).sum(-1).mean() < most


def test_measuring_rounds_every_key_and_value_and_no_padding(tiny: LoadedModel) -> None:
    model = strong(tiny_config())
    model.kv_cache = CacheGrid(4, 8, 100)  # measured without its window
    rows = [list(range(9, 9 + n)) for n in (5, 21, 8, 21)]
    found = log_probabilities(model, rows)
    assert found.shape == (4, 21, 1280)
    for place, row in enumerate(rows):
        cache = PackedCache(model.network.config, model.kv_cache, RoundedLayer)
        with torch.no_grad():
            logits, _ = read_on(model.network, torch.tensor([row]), cache)
        torch.testing.assert_close(found[place, : len(row)], logits[0].log_softmax(-1), rtol=1e-4, atol=1e-4)
    model.kv_cache = None
    exact = log_probabilities(model, rows)
    assert (exact[1, :21] - found[1, :21]).abs().max() > 1e-2


def test_a_rounded_layer_rounds_also_the_last_group() -> None:
    keys, values = states(21), states(21, seed=1)
    found = RoundedLayer(GRID).update(keys, values)
    last = torch.cat((rounded(keys[:, :, :16], 4, "tokens", 8), rounded(keys[:, :, 16:], 4, "tokens", 5)), TOKENS)
    torch.testing.assert_close(found, (last, rounded(values, 4, "channels", 8)), rtol=0, atol=0)


def test_the_bytes_that_are_measured_are_those_that_are_held(tiny: LoadedModel) -> None:
    text = list(range(3, 203))
    width = 2 if NativeDecoder.supports(tiny.network, 1, len(text)) else 4  # our kernels read bfloat16, torch's float32
    assert cache_bytes(tiny, text) == 3 * 2 * 2 * 16 * 200 * width
    tiny.kv_cache = CacheGrid(4, 16, 0)
    assert cache_bytes(tiny, text) == 3 * 2 * tiny.kv_cache.bytes(200, 16, 2)
    found = memory.of_cache(tiny, PROMPT)
    assert found.value == 3 * 2 * 256 * 2 * 16 * (0.5 + 4 / 16)
    assert found.details["per_token"] == found.value / 256
    assert found.details["kind"] == "KV cache 4 bit, unpacked for attention"


def test_families_that_are_refused_are_known() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(OTHER_CACHES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
