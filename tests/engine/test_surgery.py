"""Networks of another shape: what is missing must be as if it were zero, in every family and in stock transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconH1Config,
    GPT2Config,
    ModernBertDecoderConfig,
    OPTConfig,
    PretrainedConfig,
    StableLmConfig,
)

from engine import anatomy
from engine.errors import BadModel, BadParams
from engine.models import LoadedModel, blocks
from engine.surgery import Kept, keep_blocks, narrow
from tests.conftest import in_memory, tiny_config
from tests.families import ENDS, FAMILIES, GROUPED, MIXTURES, SIZES

IDS = torch.randint(3, 1280, (2, 24), generator=torch.Generator().manual_seed(7))
SMALL = {"vocab_size": 1280, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, **ENDS}
KNOWN: dict[str, PretrainedConfig] = {
    **{name: config for name, config in FAMILIES.items() if name != "bloom"},
    "llama-biased": tiny_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "falcon-groups": FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon-heads": FalconConfig(**SMALL, multi_query=False, parallel_attn=False),
    "gpt2-inner": GPT2Config(vocab_size=1280, n_embd=64, n_layer=3, n_head=4, n_positions=64, n_inner=96, **ENDS),
    "stablelm-parallel": StableLmConfig(**(SIZES | {"num_key_value_heads": 4}), use_qkv_bias=True,
                                        use_parallel_residual=True),
    "gemma-grouped": FAMILIES["gemma"].__class__(**GROUPED, head_dim=32),
}  # fmt: skip
LAYER_NORMS = ("stablelm", "gpt2", "gpt_neox", "opt", "falcon")  # which subtract the mean


def lively(config: PretrainedConfig) -> LoadedModel:
    """A float32 model with no bias at zero, no norm at one, and hidden states that make every epsilon small."""
    config = copy.deepcopy(config)
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        if hasattr(config, key):
            setattr(config, key, 1e-12)
    model = in_memory(config, torch.float32)
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            noise = torch.randn(weight.shape, generator=dice)
            if weight.dim() == 1:
                weight.add_(0.3 * noise)
            else:
                weight.copy_(noise * (1.0 if "emb" in name or "wte" in name or "wpe" in name else 0.2))
    return model


@torch.inference_mode()
def logits(model: LoadedModel) -> Tensor:
    found: Tensor = model.network(input_ids=IDS, use_cache=False).logits
    return found


def silence(model: LoadedModel, kept: Kept) -> None:
    """Zero what removed neurons and heads give to the block's output, and what anything writes to removed channels:
    linears, embeddings, and the biases of norms.

    Channels of families whose norms subtract the mean are centred, so that the mean over fewer is the same.
    """
    body = anatomy.of(model.network.config)
    prefix, _ = blocks(model.network)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            number = int(name.removeprefix(f"{prefix}.").split(".")[0]) if name.startswith(f"{prefix}.") else None
            module = name.rpartition(".")[0]
            gives = anatomy.ends(module, anatomy.ATTENTION_OUT + anatomy.NARROWING)
            writes = gives or any(word in name for word in ("emb", "wte", "wpe"))
            for dim, entry in enumerate(anatomy.units(body, name, tuple(weight.shape))):
                if entry is None or (staying := kept.of(entry[0], number)) is None:
                    continue
                mask = torch.isin(entry[1], torch.tensor([-1, *staying])).float()
                shape = [-1 if place == dim else 1 for place in range(weight.dim())]
                if gives and entry[0] != "channels":
                    weight.mul_(mask.view(shape))
                if entry[0] == "channels" and (writes or name.endswith("bias")):
                    if writes and body.family in LAYER_NORMS:
                        weight.sub_((weight * mask.view(shape)).sum(dim, keepdim=True) / mask.sum())
                    weight.mul_(mask.view(shape))


def choose(config: PretrainedConfig, *axes: str) -> Kept:
    """Other neurons and heads in each block: some from the middle, so that a wrong order shows."""
    body = anatomy.of(config)
    dice = torch.Generator().manual_seed(11)

    def some(size: int) -> list[int]:
        return sorted(torch.randperm(size, generator=dice)[: size * 3 // 4 if size > 2 else 1].tolist())

    heads = [some(body.attention_units) for _ in range(body.blocks)]
    share = len(heads[0]) / body.attention_units if "heads" in axes else 0.75
    channels = sorted(torch.randperm(body.channels, generator=dice)[: int(body.channels * share)].tolist())
    return Kept(
        [some(body.neurons) for _ in range(body.blocks)] if "neurons" in axes else None,
        heads if "heads" in axes else None,
        channels if "channels" in axes else None,
    )


def prove(model: LoadedModel, kept: Kept, tolerance: float = 1e-4) -> LoadedModel:
    """The narrow model, which computes what the silenced one does."""
    before = logits(model)
    narrower = narrow(model, kept)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)  # the original is as it was
    silence(model, kept)
    expected = logits(model)
    assert (expected - before).norm() > 0.01 * before.norm(), "nothing was silenced"
    if kept.channels is not None and anatomy.of(model.network.config).family in LAYER_NORMS:
        narrower = narrow(model, kept)  # what is kept was centred
    torch.testing.assert_close(logits(narrower), expected, rtol=tolerance, atol=tolerance * float(expected.std()))
    return narrower


def meet_a_stranger(model: LoadedModel, folder: Path, tolerance: float = 1e-5) -> None:
    """Stock `transformers` computes the same with the model's folder."""
    model.network.save_pretrained(folder)
    stranger = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=model.network.config._attn_implementation
    )
    with torch.inference_mode():
        found = stranger(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, logits(model), rtol=tolerance, atol=tolerance * float(found.std()))


@pytest.mark.parametrize("family", [*KNOWN, *MIXTURES])
def test_without_neurons_and_heads_a_model_computes_as_with_them_at_zero(family: str) -> None:
    config = (KNOWN | MIXTURES)[family]
    body = anatomy.of(config)
    heads = "heads" not in body.fixed and not body.coupled
    if not heads:
        with pytest.raises(BadParams, match=r"normalises the queries|Remove the same share of both"):
            narrow(lively(config), choose(config, "heads"))
    axes = [*(["neurons"] if family in KNOWN else []), *(["heads"] if heads else [])]
    if not axes:  # OLMoE
        return
    kept = choose(config, *axes)
    found = anatomy.of(prove(lively(config), kept, tolerance=1e-3).network.config)
    if kept.neurons is not None:
        assert found.neurons == body.neurons * 3 // 4
    if kept.heads is not None:
        assert (found.heads, found.head_size) == (len(kept.heads[0]) * body.heads_of_unit, body.head_size)
        assert found.groups == (len(kept.heads[0]) if body.groups > 1 else 1)


def test_neurons_go_where_channels_are_of_two_sizes() -> None:
    sizes = SMALL | {"ffn_dim": 128, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    config = OPTConfig(**sizes, do_layer_norm_before=False)
    prove(lively(config), choose(config, "neurons"), tolerance=1e-3)


@pytest.mark.parametrize("family", KNOWN)
def test_without_any_of_all_a_model_computes_as_with_them_at_zero_and_loads(family: str, tmp_path: Path) -> None:
    """Channels with neurons and, where they can be removed, heads: families that couple the two need both."""
    body = anatomy.of(KNOWN[family])
    kept = choose(KNOWN[family], "neurons", "channels", *(["heads"] if "heads" not in body.fixed else []))
    model = lively(KNOWN[family])
    model.pruned = {f"{blocks(model.network)[0]}.1.x"}
    narrower = prove(model, kept, tolerance=2e-3)
    assert kept.channels is not None
    network = narrower.network
    assert network.config.hidden_size == len(kept.channels)
    if network.config.tie_word_embeddings:
        assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert narrower.pruned == model.pruned
    meet_a_stranger(narrower, tmp_path / "artifact")


@pytest.mark.parametrize("family", ["gemma2", "llama", "phi3"])
def test_channels_alone_are_exact_too(family: str) -> None:
    prove(lively(KNOWN[family]), choose(KNOWN[family], "channels"), tolerance=2e-3)


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    with pytest.raises(BadModel, match="A bloom model cannot get other widths"):
        narrow(in_memory(FAMILIES["bloom"]), Kept(channels=range(32)))
    mixture = in_memory(MIXTURES["mixtral"])
    with pytest.raises(BadParams, match="mixtral is a mixture of experts"):
        narrow(mixture, Kept(neurons=[range(32)] * 3))
    with pytest.raises(BadParams, match="all heads would be removed"):
        narrow(in_memory(tiny_config()), Kept(heads=[[], [], []]))
    with pytest.raises(BadParams, match="4 heads of 16 and 32 channels do not fit"):
        narrow(in_memory(FAMILIES["gpt2"]), Kept(channels=range(32)))


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_dropped_blocks_are_as_if_they_were_skipped(family: str, tmp_path: Path) -> None:
    model = in_memory((FAMILIES | MIXTURES)[family], torch.float32)
    config = model.network.config
    if family == "smollm3":
        config.no_rope_layers = [1, 0, 1]
        for module, rope in zip(blocks(model.network)[1], config.no_rope_layers, strict=True):
            module.self_attn.use_rope = rope
    prefix, modules = blocks(model.network)
    kept = [0, *range(2, len(modules))]
    model.pruned = {f"{prefix}.2.x"}
    smaller = keep_blocks(model, kept)
    gives_tuple = family in ("falcon", "bloom")

    def skip(states: Tensor, *args: object, **kwargs: object) -> object:
        return (states,) if gives_tuple else states

    modules[1].forward = skip
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-5, atol=1e-6)
    assert smaller.pruned == {f"{prefix}.1.x"}
    types = getattr(config, "layer_types", None)
    if types:
        assert smaller.network.config.layer_types == [types[number] for number in kept]
    if family in ("gemma3", "smollm3", "bloom"):
        meet_a_stranger(smaller, tmp_path / "artifact")


def test_lists_that_are_of_no_block_stay() -> None:
    model = in_memory(tiny_config(num_hidden_layers=2))
    model.network.config.eos_token_id = [0, 5]
    assert keep_blocks(model, [1]).network.config.eos_token_id == [0, 5]


SMALL = {
    "vocab_size": 1280,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
}


def test_blocks_of_different_parts_stay_all() -> None:
    model = in_memory(ModernBertDecoderConfig(**SMALL, pad_token_id=0, cls_token_id=0, sep_token_id=0))
    assert len(list(blocks(keep_blocks(model, [0, 2]).network)[1])) == 2
    with pytest.raises(BadModel, match="modernbert-decoder model have different parts"):
        keep_blocks(model, [1, 2])


def test_kinds_of_blocks_that_follow_from_other_keys_are_left_to_them() -> None:
    model = in_memory(FalconH1Config(**SMALL, num_key_value_heads=2))
    assert len(list(blocks(keep_blocks(model, [0, 2]).network)[1])) == 2
