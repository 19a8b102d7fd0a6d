"""What tests of GGUF share: models that llama.cpp knows, their files, and what stands in these."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerFast,
)  # fmt: skip
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from engine import artifacts, export
from engine.errors import InputError
from engine.export import notes
from engine.models import LoadedModel
from engine.packing import QuantizedWeight
from engine.places import DEMO
from engine.records import Recipe
from tests.conftest import in_memory, tiny_config
from tests.families import FAMILIES, MIXTURES
from tests.sentencepiece import Kind, sentencepiece
from ui import language
from ui.messages import translate

IDS = torch.arange(5, 45)[None]


def changed(config: PretrainedConfig, **changes: object) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


KNOWN = {name: config for name, config in {**FAMILIES, **MIXTURES}.items() if name != "opt"}
# As llama.cpp's graphs have them, and the models that people have: not so the defaults of these configs.
KNOWN |= {
    "gemma2": changed(KNOWN["gemma2"], query_pre_attn_scalar=16),
    "gemma3": changed(KNOWN["gemma3"], query_pre_attn_scalar=16),
    "qwen3_moe": changed(KNOWN["qwen3_moe"], norm_topk_prob=True),
    "olmoe": changed(KNOWN["olmoe"], num_key_value_heads=4),
}


def uneven(model: LoadedModel) -> LoadedModel:
    """With norms and biases that are not all alike, and weights large enough to be told apart."""
    dice = torch.Generator().manual_seed(1)
    for parameter in model.network.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.rand(parameter.shape, generator=dice).to(parameter.dtype) * 0.3)
        else:
            parameter.data.mul_(4)
    return model


def product(weight: QuantizedWeight) -> Tensor:
    """(code - zero) scale in float32, number by number: exact, for neither has more than twelve bits."""
    rows, groups = weight.codes.shape[0], weight.scale.shape[1]
    scale, zero = (part.float().expand(rows, groups).unsqueeze(-1) for part in (weight.scale, weight.zero))
    return ((weight.codes.float().view(rows, groups, -1) - zero) * scale).view(rows, -1)


@torch.inference_mode()
def logits_of(model: LoadedModel) -> Tensor:
    """Of the network in float32 with the products that codes and scales stand for."""
    network = model.network.float()
    for name, weight in model.quantized.items():
        held = network.get_submodule(name).weight
        full = product(weight)
        held.data = full.t().contiguous() if model.network.config.model_type == "gpt2" and ".h." in name else full
    found: Tensor = network(IDS, use_cache=False).logits[0]
    return found


def made(model: LoadedModel, at: Path, recipe: Recipe | None = None) -> Path:
    """The file of a model's export."""
    artifacts.write(model, recipe or Recipe(), at / "artifact")
    export.exporter("gguf")(at / "artifact", at / "out")
    artifacts.verify(at / "out")
    for note in notes(at / "out"):
        with language.use("zh-CN"):
            assert translate(note) != note
    (file,) = (at / "out").glob("*.gguf")
    return file


@functools.lru_cache(maxsize=1)
def reader(file: Path) -> GGUFReader:
    return GGUFReader(file)


def fields(file: Path) -> dict[str, Any]:
    """What a file says of its network, without the prefix of its architecture, and of its tokens."""
    found = {name: field.contents() for name, field in reader(file).fields.items()}
    return {name.removeprefix(f"{found['general.architecture']}."): value for name, value in found.items()}


SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
# What some models of a family have and others not; all of them llama.cpp is asked about.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama 3's rotations": (
        "llama",
        {"rope_parameters": {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "yarn": ("qwen2", {"rope_parameters": {**SCALED, "rope_type": "yarn"}}),
    "linear": ("qwen3", {"rope_parameters": {**SCALED, "rope_type": "linear"}}),
    "fewer heads": ("qwen2", {"head_dim": 32}),
    "norms of each head": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}),
    "grouped heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "all heads": ("falcon", {"multi_query": False}),
    "one after the other": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "parts of heads turn": (
        "phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "no windows in Gemma 2": ("gemma2", {"layer_types": ["full_attention"] * 3}),
    "no windows in Gemma 3": ("gemma3", {"layer_types": ["full_attention"] * 7}),
    "other windows": ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
}  # fmt: skip


def varied(case: str) -> PretrainedConfig:
    family, changes = VARIANTS[case]
    return changed(KNOWN[family], **changes)


TEXTS = [
    (DEMO / "text.txt").read_text()[:2000],
    "Ünï¢ødé 🚀 12345 3.14\n\n  don't DON'T we'll   x\t\ty <|endoftext|> end",
    " leading and trailing  ",
    "年12月，三",
]


def with_bytes(name: str, *, forgotten: int = 0) -> LoadedModel:
    """A model with a tokenizer as Llama 2's, Gemma's or Phi-3's."""
    kind: Kind = "Llama" if name == "Llama" else "Gemma" if name == "Gemma" else "a file"
    fast = sentencepiece(kind, TEXTS[0].splitlines(), 340, forgotten=forgotten)
    ids = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id, "pad_token_id": None}
    model = in_memory(changed(KNOWN["gemma" if name == "Gemma" else "llama"], vocab_size=640, **ids))
    fast.chat_template = "{{ messages[0].content }}"
    model.tokenizer = fast
    return model


def refusal(artifact: Path) -> str:
    """The one line; nothing is left behind."""
    with pytest.raises(InputError) as caught:
        export.exporter("gguf")(artifact, artifact.parent / "out")
    assert [path.name for path in artifact.parent.iterdir() if "out" in path.name] == []
    return one_line(caught.value)


def one_line(error: Exception) -> str:
    """What an error says, which is in Chinese, too."""
    said = str(error)
    assert "\n" not in said
    with language.use("zh-CN"):
        assert translate(said) != said
    return said


WORDS = pre_tokenizers.ByteLevel(False)
BYTEWISE = pre_tokenizers.ByteLevel(False, use_regex=False)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# The rules of tokenizer.json files of the hub, with the names that llama.cpp has for them.
SPLITS: dict[str, tuple[list[pre_tokenizers.PreTokenizer], bool]] = {
    "gpt-2": ([WORDS], False),
    "smollm": ([pre_tokenizers.Digits(True), WORDS], False),
    "falcon": (
        [pre_tokenizers.Punctuation("contiguous"), WORDS, pre_tokenizers.Digits(), split_by("[0-9][0-9][0-9]")], False,
    ),
    "bloom": ([split_by(" ?[^(\\s|[.,!?…。，、।۔،])]+"), BYTEWISE], False),
    **{name: ([split_by(GGUF_PRE_TOKENIZER_SPLITS[name]), BYTEWISE], name in ("llama-bpe", "tekken"))
       for name in ("llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o")},
}  # fmt: skip


def splitting(name: str) -> LoadedModel:
    """A model whose tokenizer splits a text by a rule."""
    parts, whole = SPLITS[name]
    model = in_memory(tiny_config())
    backend = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.model.ignore_merges = whole
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    return model
