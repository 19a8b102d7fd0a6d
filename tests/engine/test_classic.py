"""Lean decoding of families older than Llama, against `transformers`: every layout and variation, dense and packed."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from engine.generate import _read_prompt, cache_bytes, decode
from engine.kv_cache import read_on
from engine.models import linears
from engine.packing import CacheGrid
from engine.quantize._grid import GridParams, round_to_nearest
from engine.runtime.lean import LeanDecoder
from engine.runtime.linear import packed_linear
from tests.engine.test_generate import PROMPT, by_transformers, make

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"vocab_size": 1280, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT = SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
NEOX = SMALL | {"intermediate_size": 96}
SIX = {"hidden_size": 96, "num_attention_heads": 6}  # heads of which alibi's slopes are no plain powers
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GPT2 = {"vocab_size": 1280, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
CLASSIC: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2 with other scales": GPT2Config(
        **GPT2, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, n_inner=96, activation_function="gelu"
    ),
    "opt": OPTConfig(**OPT),
    "opt with norms after sums": OPTConfig(**OPT, do_layer_norm_before=False, activation_function="gelu"),
    "opt with projections": OPTConfig(**(OPT | {"word_embed_proj_dim": 32}), _remove_final_layer_norm=True),
    "opt without biases": OPTConfig(**OPT, enable_bias=False, layer_norm_elementwise_affine=False),
    "neox": GPTNeoXConfig(**NEOX),
    "neox in turn": GPTNeoXConfig(**NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=1.0),
    "neox of longer texts": GPTNeoXConfig(**NEOX, rope_parameters=LINEAR, rotary_pct=0.5),
    "falcon": FalconConfig(**SMALL),
    "falcon in turn": FalconConfig(**SMALL, multi_query=False, parallel_attn=False, bias=True),
    "falcon in turn with one key": FalconConfig(**SMALL, parallel_attn=False, ffn_hidden_size=96),
    "falcon of groups": FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon of groups with one norm": FalconConfig(
        **SMALL, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon with alibi": FalconConfig(**(SMALL | SIX), alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "falcon with alibi and one key": FalconConfig(**SMALL, alibi=True),
    "bloom": BloomConfig(**SMALL),
    "bloom of six heads": BloomConfig(**(SMALL | SIX)),
}
REFUSED: dict[str, PretrainedConfig] = {
    "gpt2 that reads another": GPT2Config(**GPT2, add_cross_attention=True),
    "gpt2 that bends otherwise": GPT2Config(**GPT2, activation_function="quick_gelu"),
    "dynamic neox": GPTNeoXConfig(**NEOX, rope_parameters=LINEAR | {"rope_type": "dynamic"}),
    "bloom that goes on from norms": BloomConfig(**SMALL, apply_residual_connection_post_layernorm=True),
    "bloom in slices": BloomConfig(**SMALL, slow_but_exact=True, pretraining_tp=2),
    "sliding gpt2": GPT2Config(**GPT2, sliding_window=9),  # not the family's, but a cache that slides makes it one
}


@pytest.mark.parametrize("name", ["gpt2", "opt", "neox", "falcon", "bloom"])
def test_greedy_tokens_are_those_of_transformers_by_the_lean_decoder(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    step = LeanDecoder.step
    monkeypatch.setattr(LeanDecoder, "step", lambda self, ids: used.append(1) or step(self, ids))
    model = make(CLASSIC[name])
    tokens, logits = by_transformers(model, 20)
    steps = list(decode(model.network, PROMPT, 20))
    assert [int(step.tokens) for step in steps] == tokens
    assert len(used) == 20  # one that is checked, nineteen that count
    found, expected = torch.cat([step.logprobs for step in steps]), logits.log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CLASSIC)
@torch.inference_mode()
def test_each_sequence_of_a_batch_has_the_logits_of_its_whole_text(name: str) -> None:
    network = make(CLASSIC[name]).network
    text = torch.randint(5, 1280, (3, 24), generator=torch.Generator().manual_seed(1))
    decoder = LeanDecoder(network, _read_prompt(network, text[:, :7], None)[1], 24)
    found = torch.stack([decoder.step(text[:, place : place + 1]) for place in range(6, 24)], dim=1)
    whole = network(input_ids=text, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4 * float(whole.std()))


@pytest.mark.parametrize(("batch", "grid"), [(1, None), (3, CacheGrid(8, 16, 4))])
@pytest.mark.parametrize("name", ["gpt2", "opt", "neox", "falcon", "falcon of groups", "bloom"])
@torch.inference_mode()
def test_packed_weights_and_caches_compute_what_transformers_computes_with_them(
    name: str, batch: int, grid: CacheGrid | None
) -> None:
    network = make(CLASSIC[name], torch.bfloat16).network
    for path, linear in list(linears(network)):
        if path != "lm_head":
            weight = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
            settings = GridParams.model_validate({"bits": 4, "group_size": 32})
            codes = round_to_nearest(weight.contiguous(), settings, path, torch.bfloat16)
            packed = packed_linear(codes, linear.bias, "cpu", torch.bfloat16)
            network.set_submodule(path, packed or pytest.fail("no kernel"))
    ids = torch.randint(5, 1280, (batch, 21), generator=torch.Generator().manual_seed(1))
    _, cache = _read_prompt(network, ids[:, :20], grid)
    _, ours = _read_prompt(network, ids if grid is None else ids[:, :20], grid)  # of an exact one the last is dropped
    decoder, step = LeanDecoder(network, ours, 60), ids[:, 20:]
    for _ in range(20):  # groups are packed meanwhile
        expected = read_on(network, step, cache)[0][:, -1].float()
        found = decoder.step(step).float()
        assert (found - expected).norm() / expected.norm() < 0.04
        step = expected.argmax(-1, keepdim=True)


@pytest.mark.parametrize("name", ["bloom", "falcon with alibi"])
@torch.inference_mode()
def test_alibi_far_into_a_text_is_rounded_as_transformers_rounds_it(name: str) -> None:
    """Exactly computed, scores of BLOOM would differ by more than what a decoder may be off."""
    network = make(CLASSIC[name], torch.bfloat16).network
    ids = torch.randint(5, 1280, (1, 500), generator=torch.Generator().manual_seed(1))
    logits, cache = _read_prompt(network, ids, None)
    found = LeanDecoder(network, cache, 501).step(ids[:, -1:]).float()
    assert (found - logits).norm() / logits.float().norm() < 0.025


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(name: str) -> None:
    assert not LeanDecoder.supports(make(REFUSED[name]).network, 7)


def test_learned_positions_end_and_a_text_may_fill_them(caplog: pytest.LogCaptureFixture) -> None:
    model = make(CLASSIC["gpt2"])
    model.kv_cache = CacheGrid(8, 16, 4)
    with caplog.at_level(logging.WARNING):
        for grid in (None, model.kv_cache):
            assert len(list(decode(model.network, PROMPT, 64 - len(PROMPT) + 1, kv_cache=grid))) == 58
        assert cache_bytes(model, [7] * 64) > 0  # no place is left to glance at
    assert "lean decoder" not in caplog.text
