"""Tiny configurations of every decoder family that is compressed, over the demo's vocabulary."""

from __future__ import annotations

from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)  # fmt: skip

from tests.conftest import tiny_config

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {"vocab_size": 1280, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
         "num_attention_heads": 4, **ENDS}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": tiny_config(),
    "mistral": MistralConfig(**GROUPED, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "phi3": Phi3Config(**GROUPED),
    "smollm3": SmolLM3Config(**GROUPED),
    "stablelm": StableLmConfig(**GROUPED),
    "olmo2": Olmo2Config(**GROUPED),
    "gpt2": GPT2Config(vocab_size=1280, n_embd=64, n_layer=3, n_head=4, n_positions=256, **ENDS),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "opt": OPTConfig(
        vocab_size=1280, hidden_size=64, ffn_dim=128, num_hidden_layers=3, num_attention_heads=4,
        word_embed_proj_dim=64, max_position_embeddings=256, dropout=0.0, **ENDS,
    ),
    "bloom": BloomConfig(vocab_size=1280, hidden_size=64, n_layer=3, n_head=4, **ENDS),
    "falcon": FalconConfig(vocab_size=1280, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, **ENDS),
    "gemma": GemmaConfig(**(SIZES | {"num_key_value_heads": 1}), head_dim=16),
    "gemma2": Gemma2Config(**(SIZES | {"num_key_value_heads": 1}), head_dim=16, sliding_window=8),
    "gemma3": Gemma3TextConfig(
        **(SIZES | {"num_hidden_layers": 7, "num_key_value_heads": 1}), head_dim=16, sliding_window=8
    ),
}  # fmt: skip
MIXTURES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": Qwen3MoeConfig(
        **GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=96
    ),
    "olmoe": OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
}  # fmt: skip
