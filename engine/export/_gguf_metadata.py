"""What a GGUF says of a network: its sizes and settings, by the keys that llama.cpp reads for its architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gguf import GGUFWriter, RopeScalingType
from pydantic import JsonValue

from engine.export._gguf_families import Config, Family, context, rotation, sizes, sliding, usual_sliding
from engine.headers import experts, integer

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")


def add_network(writer: GGUFWriter, config: Config, family: Family) -> list[str]:
    """Add sizes and settings; what is to be said of how llama.cpp computes them."""
    found = sizes(config)
    longest, cut = context(config)
    writer.add_context_length(longest)
    writer.add_embedding_length(found.hidden)
    writer.add_block_count(found.blocks)
    writer.add_feed_forward_length(found.neurons)
    writer.add_head_count(found.heads)
    writer.add_head_count_kv(found.shared)
    writer.add_key_length(found.head)
    writer.add_value_length(found.head)
    name = next(each for each in EPSILONS if each in config)
    epsilon = _float(config, name)
    (writer.add_layer_norm_rms_eps if name == EPSILONS[0] else writer.add_layer_norm_eps)(epsilon)
    if family.arch == "falcon":
        writer.add_tensor_data_layout("jploski")
    if "use_parallel_residual" in config:
        writer.add_parallel_residual(bool(config["use_parallel_residual"]))
    _add_experts(writer, config)
    if family.arch not in ("gpt2", "bloom"):
        writer.add_rope_dimension_count(found.rotary)
        _add_rotation(writer, config)
    _add_windows(writer, config)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(key):
            add(_float(config, key))
    return _notes(config, cut, longest)


def _float(config: Config, key: str) -> float:
    return float(str(config[key]))


def _add_experts(writer: GGUFWriter, config: Config) -> None:
    if (count := experts(config)) < 2:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(integer(config.get("num_experts_per_tok")))
    if own := integer(config.get("moe_intermediate_size")):
        writer.add_expert_feed_forward_length(own)
    if own := integer(config.get("shared_expert_intermediate_size")):
        writer.add_expert_shared_feed_forward_length(own)


def _add_rotation(writer: GGUFWriter, config: Config) -> None:
    said = rotation(config)
    writer.add_rope_freq_base(_float(said, "rope_theta"))
    local = rotation(config, "sliding_attention")
    if usual_sliding(config) is not None and local != said:
        writer.add_rope_freq_base_swa(_float(local, "rope_theta"))
    kind = said.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(_float(said, "factor"))
    if kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(_float(said, "factor"))
        writer.add_rope_scaling_orig_ctx_len(_original(config, said))
    if kind == "longrope":
        original = _original(config, said)
        factor = _float(said, "factor") if said.get("factor") else integer(config["max_position_embeddings"]) / original
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(
            _float(said, "attention_factor") if said.get("attention_factor") else usual
        )


def _original(config: Config, said: Mapping[str, JsonValue]) -> int:
    """The length of texts that a model was trained on before its rotations were scaled."""
    found = said.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    return integer(found) or integer(config.get("max_position_embeddings"))


def _add_windows(writer: GGUFWriter, config: Config) -> None:
    """Sliding windows, where llama.cpp's graph has them; which blocks, where not those that it would take."""
    usual, own = usual_sliding(config), sliding(config)
    if usual is None:
        if config.get("model_type") == "phi3":
            writer.add_sliding_window(0)  # it looks for one there
        return
    if (
        not own
    ):  # its Gemma 2 wants blocks with a window, so they get one that holds any text; its Gemma 3 has a way out
        writer.add_sliding_window(context(config)[0] if config.get("model_type") == "gemma2" else 0)
        return
    writer.add_sliding_window(integer(config.get("sliding_window")))
    if own != usual:
        writer.add_sliding_window_pattern(own)


def _notes(config: Config, cut: bool, longest: int) -> list[str]:
    found = []
    if cut:
        found.append(
            f"llama.cpp has no sliding window for {config.get('model_type')}, so the file says a context of {longest} "
            "tokens, a window's length, up to which that makes no difference."
        )
    if (config.get("hidden_act") or config.get("activation")) == "gelu":
        found.append("llama.cpp computes gelu by its tanh approximation.")
    if rotation(config).get("rope_type") == "longrope":
        found.append(
            "llama.cpp chooses the short or the long rotations by the context that it is started with, transformers by "
            "the length of the text."
        )
    if usual_sliding(config) is not None and sliding(config) not in ([], usual_sliding(config)):
        found.append(
            "Which blocks have a sliding window is not as usual; older versions of llama.cpp may not read that."
        )
    return found
