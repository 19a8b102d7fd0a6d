"""Decoders that take a packed cache over: attention to codes against float64, decoding against `transformers`."""

from __future__ import annotations

import ctypes
import logging

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig

from engine.generate import _read_prompt, cache_bytes, cache_label, decode, generate
from engine.kv_cache import PackedLayer, read_on
from engine.packing import CacheGrid
from engine.runtime.lean import LeanDecoder
from engine.runtime.native import held, library
from engine.runtime.native.decoder import NativeDecoder
from tests.conftest import in_memory, tiny_config
from tests.engine.test_generate import GROUPED, make
from tests.engine.test_kv_cache import states
from tests.engine.test_native import network

pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernels = pytest.mark.skipif(not library.available(), reason="our own kernels cannot be built here")
KINDS = [LeanDecoder, pytest.param(NativeDecoder, marks=needs_kernels)]
WIDE = tiny_config(head_dim=32)  # heads that the kernels' vectors fit


def attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """In float64: q (B, heads, D) to keys and values (B, shared, T, D)."""
    each = q.shape[1] // keys.shape[1]
    k, v = (x.double().repeat_interleave(each, 1) for x in (keys, values))
    weights = (torch.einsum("bhd,bhtd->bht", q.double(), k) * scale).softmax(-1)
    return torch.einsum("bht,bhtd->bhd", weights, v)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("size", "group", "window"), [(32, 16, 0), (64, 32, 5), (96, 48, 0), (128, 32, 40)])
@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_attention_to_codes_is_that_to_what_they_stand_for(
    bits: int, size: int, group: int, window: int, threads: int
) -> None:
    batch, heads, shared, prompt, steps = 2, 6, 2, 2 * group + window + 7, group + 3
    grid, scale = CacheGrid(bits, group, window), 0.2  # type: ignore[arg-type]
    layers = [PackedLayer(grid), PackedLayer(grid)]
    for layer in layers:
        layer.update(states(prompt, size), states(prompt, size, seed=1))
    ours, theirs = held.PackedKeys(layers[0], prompt + steps), layers[1]
    block = library.Heads(heads, shared, size, scale=scale)
    dice = torch.Generator().manual_seed(2)
    for at in range(prompt, prompt + steps):
        token = torch.randn(batch, heads + 2 * shared, size, generator=dice).bfloat16()
        q, k, v = token.split((heads, shared, shared), dim=1)
        found = torch.empty(batch, heads, size, dtype=torch.bfloat16)
        ours.attend(library.library(), ctypes.addressof(block), token.data_ptr(), 0, at, found.data_ptr(), threads)  # type: ignore[arg-type]
        seen = theirs.update_as(k.unsqueeze(2), v.unsqueeze(2), torch.float64)
        expected = attention(q, *seen, scale)
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)
        assert expected.std() > 0.1  # of weights that are spread and of values that are not


@needs_kernels
@pytest.mark.parametrize(("size", "group"), [(16, 16), (24, 8), (32, 8), (80, 16), (64, 48)])
def test_groups_and_heads_that_vectors_do_not_fit_are_left_to_torch(size: int, group: int) -> None:
    assert held.reads(CacheGrid(4, 32, 0), 64)
    assert not held.reads(CacheGrid(4, group, 0), size)
    subject = in_memory(tiny_config(head_dim=size)).network
    assert NativeDecoder.supports(subject, 1, 40)
    assert not NativeDecoder.supports(subject, 1, 40, CacheGrid(4, group, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [CacheGrid(8, 32, 0), CacheGrid(4, 16, 20)])
@torch.inference_mode()
def test_a_step_with_a_packed_cache_is_that_of_transformers(
    kind: type[LeanDecoder] | type[NativeDecoder], grid: CacheGrid
) -> None:
    subject = network(WIDE, "4 bit")
    ids = torch.randint(5, 1280, (3, 37), generator=torch.Generator().manual_seed(1))
    _, cache = _read_prompt(subject, ids, grid)
    decoder = kind(subject, _read_prompt(subject, ids, grid)[1], 90)
    step = ids[:, -1:]
    for _ in range(50):
        expected = read_on(subject, step, cache)[0][:, -1].float()
        glanced, found = decoder.glance(step), decoder.step(step)
        torch.testing.assert_close(glanced, found, rtol=0, atol=0)  # also where a group is packed
        # A key between two codes goes to either, as its last bit says.
        assert (found.float() - expected).norm() / expected.norm() < 0.04
        step = expected.argmax(-1, keepdim=True)


@needs_kernels
@torch.inference_mode()
def test_the_codes_stand_in_memory_once() -> None:
    subject, grid = network(WIDE, "dense"), CacheGrid(4, 16, 20)
    _, cache = _read_prompt(subject, torch.full((2, 100), 7), grid)
    before = cache.nbytes
    decoder = NativeDecoder(subject, cache, 150)
    assert cache.nbytes == 0  # type: ignore[attr-defined]
    heads = 3 * 2 * 2  # of all blocks and sequences
    assert before == heads * grid.bytes(100, 32, 2)
    packed = grid.packed_tokens(149)
    # Room for all groups that the last token sees, and for as many exact tokens as there ever are at once.
    assert decoder.cache_bytes == heads * (CacheGrid(4, 16, 0).bytes(packed, 32, 2) + 36 * 2 * 2 * 32)


@pytest.mark.parametrize(("size", "way"), [(32, NativeDecoder), (16, LeanDecoder)])
def test_packed_models_are_decoded_by_our_loops_and_it_is_said(
    size: int, way: type[LeanDecoder] | type[NativeDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way is NativeDecoder and not library.available():
        pytest.skip("our own kernels cannot be built here")
    model = in_memory(tiny_config(head_dim=size), torch.bfloat16)
    assert cache_label(model, 9) is None
    model.kv_cache = CacheGrid(8, 16, 0)
    used = []
    step = way.step
    monkeypatch.setattr(way, "step", lambda self, ids: used.append(1) or step(self, ids))
    assert len(list(decode(model.network, [5, 6, 7], 20, kv_cache=model.kv_cache))) == 20
    assert len(used) == 20  # one that is checked, nineteen that count
    how = "attention reads the codes" if way is NativeDecoder else "unpacked for attention"
    assert cache_label(model, 23) == f"KV cache 8 bit, {how}"
    monkeypatch.setenv(library.SWITCH, "0")
    assert cache_label(model, 23) == "KV cache 8 bit, unpacked for attention"


@pytest.mark.parametrize("prompt", [5, 30])
def test_a_prompt_that_fills_a_sliding_window_needs_no_other_loop(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(MistralConfig(**GROUPED, head_dim=32, sliding_window=9))
    model.kv_cache = CacheGrid(8, 8, 4)
    ids = torch.randint(5, 1280, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    used = []
    step = LeanDecoder.step
    monkeypatch.setattr(LeanDecoder, "step", lambda self, ids: used.append(1) or step(self, ids))
    ours = list(generate(model, ids, max_new_tokens=24))
    assert len(used) == 24
    monkeypatch.setattr(LeanDecoder, "supports", staticmethod(lambda *_: False))
    theirs = list(generate(model, ids, max_new_tokens=24))
    assert [step.token_id for step in ours] == [step.token_id for step in theirs]
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.logprobs, their.logprobs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_that_disagrees_gives_way_to_the_whole_packed_cache(
    kind: type[LeanDecoder] | type[NativeDecoder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(tiny_config(head_dim=32), torch.bfloat16)
    model.kv_cache = CacheGrid(4, 16, 0)
    ids = list(range(50, 90))

    def write() -> list[int]:
        return [step.token_id for step in generate(model, ids, max_new_tokens=30)]

    if kind is LeanDecoder:
        monkeypatch.setenv(library.SWITCH, "0")
    glance, supports = kind.glance, LeanDecoder.supports
    monkeypatch.setattr(LeanDecoder, "supports", staticmethod(lambda *_: False))
    expected = write()
    monkeypatch.setattr(LeanDecoder, "supports", staticmethod(supports))
    monkeypatch.setattr(kind, "glance", lambda self, ids: glance(self, ids).roll(1, -1))
    with caplog.at_level(logging.WARNING):
        assert write() == expected
    assert "lean decoder is off" in caplog.text


@needs_kernels
def test_a_context_of_many_tokens_takes_a_third_of_the_bytes() -> None:
    model = in_memory(tiny_config(head_dim=64, max_position_embeddings=2048), torch.bfloat16)
    text = [7] * 1000
    exact = cache_bytes(model, text)
    model.kv_cache = CacheGrid(4, 32, 0)
    assert cache_bytes(model, text) < exact / 3
