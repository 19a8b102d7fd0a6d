"""Generation against `transformers` itself, for families with and without the lean decoder."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTJConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

from engine.generate import _read_prompt, allowed, decode, end_tokens, generate, score
from engine.models import LoadedModel, linears
from engine.quantize._grid import GridParams, round_to_nearest
from engine.runtime import lean
from engine.runtime.lean import LeanDecoder
from engine.runtime.linear import packed_linear
from tests.conftest import in_memory, tiny_config

SMALL = {"vocab_size": 1280, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"intermediate_size": 128, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
FREE = GROUPED | {"tie_word_embeddings": False}  # Gemma scales its embeddings: were they the head, it would repeat
KINDS = ["sliding_attention", "full_attention"]
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}  # low, so that they bend
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FOUR = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
SHARED = FOUR | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
NEAR_AND_FAR = {"full_attention": LLAMA3, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
PLAIN: dict[str, PretrainedConfig] = {  # what our kernels compute, too
    "llama": tiny_config(),
    "llama biased, untied": tiny_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama without groups": tiny_config(num_key_value_heads=4),
    "llama3 rope": tiny_config(rope_parameters=LLAMA3),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mistral within its window": MistralConfig(**GROUPED, sliding_window=64),
    "qwen2 within its window": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=64, max_window_layers=1),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=32),
    "smollm3": SmolLM3Config(**GROUPED, pad_token_id=0, no_rope_layers=[1, 0]),
}
MIXTURES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
    "qwen2_moe": Qwen2MoeConfig(**SHARED),
    "qwen3_moe with a plain block": Qwen3MoeConfig(
        **FOUR, head_dim=32, moe_intermediate_size=64, mlp_only_layers=[1], norm_topk_prob=True
    ),
    "olmoe": OlmoeConfig(**FOUR),
}
LEAN: dict[str, PretrainedConfig] = (
    PLAIN
    | MIXTURES
    | {
        "gelu llama": tiny_config(hidden_act="gelu"),
        "relu llama": tiny_config(hidden_act="relu"),
        "phi3": Phi3Config(**GROUPED, pad_token_id=0, sliding_window=64),
        "phi3 that turns in part": Phi3Config(**GROUPED, pad_token_id=0, rope_parameters=HALF),
        "sliding llama": tiny_config(sliding_window=9),  # of no family, but a cache that slides makes it one
        "sliding mistral": MistralConfig(**GROUPED, sliding_window=9),
        "sliding phi3": Phi3Config(**GROUPED, pad_token_id=0, sliding_window=9),
        "sliding qwen2": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=9, max_window_layers=1),
        "sliding qwen3": Qwen3Config(**GROUPED, use_sliding_window=True, sliding_window=9, max_window_layers=1),
        "sliding smollm3": SmolLM3Config(
            **GROUPED, pad_token_id=0, no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=9
        ),
        "olmo2": Olmo2Config(**GROUPED, pad_token_id=0),
        "gemma": GemmaConfig(**FREE, head_dim=32),
        "gemma2": Gemma2Config(**FREE, head_dim=32, query_pre_attn_scalar=24, sliding_window=64, **CAPS),
        "sliding gemma2": Gemma2Config(**FREE, head_dim=32, sliding_window=9, **CAPS),
        "gemma2 without caps": Gemma2Config(
            **FREE, head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=None
        ),
        "gemma3": Gemma3TextConfig(**FREE, head_dim=32, query_pre_attn_scalar=24, sliding_window=64, layer_types=KINDS),
        "sliding gemma3": Gemma3TextConfig(
            **FREE, head_dim=16, sliding_window=9, layer_types=KINDS, rope_parameters=NEAR_AND_FAR, **CAPS
        ),
        "stablelm": StableLmConfig(**GROUPED, pad_token_id=0),
        "stablelm biased": StableLmConfig(**GROUPED, pad_token_id=0, use_qkv_bias=True, rope_parameters=HALF),
    }
)
OTHERS: dict[str, PretrainedConfig] = {
    "llama of blocks that slide": tiny_config(sliding_window=9, layer_types=["sliding_attention"] * 3),
    "gemma3 that looks ahead": Gemma3TextConfig(**FREE, head_dim=16, use_bidirectional_attention=True),
    "olmoe that clips": OlmoeConfig(**FOUR, clip_qkv=0.5),
    "parallel stablelm": StableLmConfig(**GROUPED, pad_token_id=0, use_parallel_residual=True),
    "stablelm with norms of heads": StableLmConfig(**GROUPED, pad_token_id=0, qk_layernorm=True),
    "dynamic rope": tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    "quick llama": tiny_config(hidden_act="quick_gelu"),
    "gptj": GPTJConfig(vocab_size=1280, n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
}
PROMPT = [5, 99, 1200, 7, 7, 431, 20]


def make(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A model whose next token depends strongly on the text, and that never ends it."""
    model = in_memory(config, dtype)
    with torch.no_grad():
        for parameter in model.network.parameters():
            _ = parameter.mul_(8) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.2)
    model.network.generation_config.eos_token_id = None
    model.network.config.eos_token_id = None
    return model


def fused(model: LoadedModel) -> LoadedModel:
    """A mixture with experts as `transformers` holds them, with the same weights."""
    network = AutoModelForCausalLM.from_config(copy.deepcopy(model.network.config), dtype=model.network.dtype)
    given = model.network.state_dict()
    for name in [name for name in network.state_dict() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts = model.network.get_submodule(name.rpartition(".")[0])
        gates, ups, downs = zip(*([each.weight for each in expert.linears] for expert in experts), strict=True)
        pairs = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        given[name] = torch.stack(list(downs) if name.endswith("down_proj") else pairs)
    network.load_state_dict({name: given[name] for name in network.state_dict()})
    network.generation_config = model.network.generation_config
    return dataclasses.replace(model, network=network.eval())


def by_transformers(model: LoadedModel, count: int) -> tuple[list[int], Tensor]:
    """Greedy tokens and their logits (count, V)."""
    output = model.network.generate(
        torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return output.sequences[0, len(PROMPT) :].tolist(), torch.cat(output.logits)


@pytest.mark.parametrize("name", [*LEAN, *OTHERS])
def test_greedy_tokens_and_their_log_probabilities_are_those_of_transformers(name: str) -> None:
    model = make((LEAN | OTHERS)[name])
    tokens, logits = by_transformers(model, 24)
    steps = list(generate(model, PROMPT, max_new_tokens=24))
    assert [step.token_id for step in steps] == tokens
    assert len(set(tokens)) > 3  # a text that varies, so that agreement says something
    torch.testing.assert_close(
        torch.stack([step.logprobs for step in steps]), logits.float().log_softmax(-1), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", [*LEAN, *OTHERS])
def test_the_lean_decoder_is_taken_where_it_is_right_and_nowhere_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    step = LeanDecoder.step
    monkeypatch.setattr(LeanDecoder, "step", lambda self, ids: used.append(1) or step(self, ids))
    model = make((LEAN | OTHERS)[name])
    list(generate(model, PROMPT, max_new_tokens=5))
    assert len(used) == (5 if name in LEAN else 0)  # one that is checked, four that count


@pytest.mark.parametrize(("name", "batch"), zip(MIXTURES, [3, 1, 3, 1], strict=True))
@torch.inference_mode()
def test_experts_are_as_lean_where_transformers_fused_them(name: str, batch: int) -> None:
    apart = make(MIXTURES[name])
    text = torch.randint(5, 1280, (batch, 16), generator=torch.Generator().manual_seed(1))
    network = fused(apart).network
    assert any(parameter.dim() == 3 for parameter in network.parameters())
    assert LeanDecoder.supports(network, 7)
    decoder = LeanDecoder(network, _read_prompt(network, text[:, :7], None)[1], 16)
    found = torch.stack([decoder.step(text[:, place : place + 1]) for place in range(6, 16)], dim=1)
    for each in (network, apart.network):
        torch.testing.assert_close(found, each(input_ids=text, use_cache=False).logits[:, 6:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("window", "taken"), [(13, True), (8, True), (7, False), (4, False)])
def test_a_window_that_the_prompt_fills_is_left_to_transformers(
    window: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    step = LeanDecoder.step
    monkeypatch.setattr(LeanDecoder, "step", lambda self, ids: used.append(1) or step(self, ids))
    model = make(MistralConfig(**GROUPED, sliding_window=window))
    assert [found.token_id for found in generate(model, PROMPT, max_new_tokens=5)] == by_transformers(model, 5)[0]
    assert bool(used) == taken


def test_a_lean_decoder_that_disagrees_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(tiny_config())
    tokens, _ = by_transformers(model, 12)
    right = LeanDecoder.__init__

    def wrong(self: LeanDecoder, *arguments: object) -> None:
        right(self, *arguments)  # type: ignore[arg-type]
        self._sights = [dataclasses.replace(each, cos=each.cos.roll(1, 0)) for each in self._sights]

    monkeypatch.setattr(LeanDecoder, "__init__", wrong)
    with caplog.at_level(logging.WARNING):
        assert [step.token_id for step in generate(model, PROMPT, max_new_tokens=12)] == tokens
    assert "lean decoder" in caplog.text


def test_in_bfloat16_the_distributions_stay_close() -> None:
    model = make(tiny_config(), torch.bfloat16)
    _, logits = by_transformers(model, 1)
    first, second, *_ = generate(model, PROMPT, max_new_tokens=3)
    torch.testing.assert_close(first.logprobs, logits[0].float().log_softmax(-1))
    expected = score(model, [*PROMPT, first.token_id, second.token_id], len(PROMPT) + 1)
    assert float((second.logprobs - expected[0]).norm() / expected[0].norm()) < 0.02


def test_a_prompt_of_one_token_has_a_continuation() -> None:
    model = make(tiny_config())
    ids = [7]
    for step in generate(model, [7], max_new_tokens=5):
        torch.testing.assert_close(step.logprobs, score(model, [*ids, 0], len(ids))[0], rtol=1e-3, atol=1e-3)
        ids.append(step.token_id)


def test_score_is_the_probability_of_each_token_given_those_before() -> None:
    model = make(tiny_config())
    ids = [*PROMPT, 44, 3]
    rows = score(model, ids, 2)
    assert rows.shape == (len(ids) - 2, 1280)
    for place in range(2, len(ids)):
        with torch.no_grad():
            logits = model.network(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
        torch.testing.assert_close(rows[place - 2], logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [0, 10])
def test_score_refuses_what_has_nothing_before_it(start: int) -> None:
    with pytest.raises(ValueError, match="start"):
        score(make(tiny_config()), PROMPT, start)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *itertools.product(["olmo2", "sliding gemma2", "sliding gemma3", "stablelm"], [None, 4]),
        ("qwen2_moe", None),
        ("all experts", 4),  # where rounding could not change which are asked
    ],
)
@torch.inference_mode()
def test_each_sequence_of_a_batch_has_its_own_logits(name: str, bits: int | None) -> None:
    """Against the whole text read at once, by a network with the very same linears."""
    config = LEAN.get(name) or Qwen2MoeConfig(**(SHARED | {"num_experts_per_tok": 4}))
    model = make(config, torch.float32 if bits is None else torch.bfloat16)
    for path, linear in list(linears(model.network)) if bits else []:
        if path.startswith("model.layers.") and not path.endswith("shared_expert_gate"):
            grid = GridParams.model_validate({"bits": bits, "group_size": 32})
            weight = round_to_nearest(linear.weight, grid, path, torch.bfloat16)
            packed = packed_linear(weight, linear.bias, "cpu", torch.bfloat16)
            model.network.set_submodule(path, packed or pytest.fail("no kernel"))
    text = torch.randint(5, 1280, (3, 20), generator=torch.Generator().manual_seed(1))
    _, cache = _read_prompt(model.network, text[:, :7], None)
    decoder = LeanDecoder(model.network, cache, 20)
    found = torch.stack([decoder.step(text[:, place : place + 1]) for place in range(6, 20)], dim=1).float()
    whole = model.network(input_ids=text, use_cache=False).logits[:, 6:].float()
    if bits is None:
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert float((found - whole).norm() / whole.norm()) < 0.03


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_batch_repeats_what_one_sequence_gives(name: str) -> None:
    network = make((LEAN | OTHERS)[name]).network
    one = [int(step.tokens) for step in decode(network, PROMPT, 10)]
    three = [step.tokens.tolist() for step in decode(network, PROMPT, 10, batch=3)]
    assert three == [[token] * 3 for token in one]


def test_sampling_follows_the_seed_and_the_temperature() -> None:
    model = make(tiny_config())

    def drawn(temperature: float, seed: int) -> list[int]:
        steps = generate(model, PROMPT, max_new_tokens=12, temperature=temperature, seed=seed)
        return [step.token_id for step in steps]

    assert drawn(1.5, 1) == drawn(1.5, 1)
    assert drawn(1.5, 1) != drawn(1.5, 2)
    assert drawn(1e-4, 3) == drawn(0.0, 0)


def test_the_end_token_comes_last(tiny: LoadedModel) -> None:
    model = make(tiny_config())
    tokens, _ = by_transformers(model, 12)
    model.network.generation_config.eos_token_id = [1279, tokens[4]]
    assert end_tokens(model.network) == {1279, tokens[4]}
    expected = tokens[: tokens.index(tokens[4]) + 1]
    assert [step.token_id for step in generate(model, PROMPT, max_new_tokens=12)] == expected


def test_closing_stops_and_no_tokens_are_no_work() -> None:
    model = make(tiny_config())
    assert list(generate(model, PROMPT, max_new_tokens=0)) == []
    steps = generate(model, PROMPT, max_new_tokens=50)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert list(steps) == []
    with pytest.raises(ValueError, match="prompt"):
        list(generate(model, [], max_new_tokens=3))


def test_one_row_products_leave_the_flag_as_it_was() -> None:
    before = torch._C._get_mkldnn_enabled()
    inside = []

    def fail() -> None:
        with lean._one_row_products(1):
            inside.append(torch._C._get_mkldnn_enabled())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == [False]
    assert torch._C._get_mkldnn_enabled() == before


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    odds = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert allowed(odds, 1.0, 0) is odds
    torch.testing.assert_close(allowed(odds, 1.0, 2)[0], torch.tensor([0.0, 0.4, 0.0, 0.3]))
    torch.testing.assert_close(allowed(odds, 0.65, 0)[0], torch.tensor([0.0, 0.4, 0.0, 0.3]))
    torch.testing.assert_close(allowed(odds, 0.75, 0)[0], torch.tensor([0.0, 0.4, 0.2, 0.3]))
    torch.testing.assert_close(allowed(odds, 1e-9, 0)[0], torch.tensor([0.0, 0.4, 0.0, 0.0]))
    torch.testing.assert_close(allowed(odds, 0.5, 3)[0], torch.tensor([0.0, 0.4, 0.0, 0.3]))  # of the three
    assert allowed(odds, 1.0, 1)[1].tolist() == [0.25, 0.0, 0.0, 0.0]  # equals: the first


def test_top_k_of_one_is_greedy_whatever_the_temperature(tiny: LoadedModel) -> None:
    likeliest = [step.token_id for step in generate(tiny, [1, 2, 3], max_new_tokens=6)]
    drawn = [step.token_id for step in generate(tiny, [1, 2, 3], max_new_tokens=6, temperature=2.0, top_k=1, seed=5)]
    assert drawn == likeliest
