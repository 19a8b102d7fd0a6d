"""What llama.cpp computes of each family: its architecture there, and what of a config it does not know. JSON alone.

llama.cpp's graphs fix much that a config may choose. Where one asks for something else the export is refused by name:
a file would be read, and compute something else. As llama.cpp's src/models has it (commit 0c1e57098,
which llama-cpp-python 0.3.36 builds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pydantic import JsonValue

from engine.anatomy import NEURONS
from engine.errors import BadModel, short
from engine.headers import experts, integer

Config = Mapping[str, JsonValue]
SILU, TANH = ("silu", "swish"), ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
QKV = ("attn_q", "attn_k", "attn_v")
ALL = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm", "token_embd_norm")
SCALINGS = ("default", "linear", "yarn")  # of rotations, wherever the graph has one


@dataclass(frozen=True)
class Family:
    """How llama.cpp knows a family.

    arch: its `general.architecture`. rows: of which tensors rows change places, and how: `rotary`, q and k, as pairs
    that are neighbours; `heads`, `groups`: fused q, k and v by their heads, or by the heads that share keys and values.
    biases: tensors that may have one. activations: of the feed-forward, those that are computed. square: heads times
    their size are the hidden size. headed: there must be an output.weight, even where it is the embeddings.
    scalings: of rotations. normed: experts' weights are made to sum up to 1, or not; None, no mixture.
    """

    arch: str
    rows: str = ""
    biases: tuple[str, ...] = QKV
    activations: tuple[str, ...] = SILU
    square: bool = True
    headed: bool = False
    scalings: tuple[str, ...] = SCALINGS
    normed: bool | None = None


LLAMA = Family(
    "llama", "rotary", (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"), square=False,
    scalings=(*SCALINGS, "llama3"),
)  # fmt: skip
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": LLAMA,
        "mistral": LLAMA,
        "mixtral": Family("llama", "rotary", QKV, square=False, scalings=LLAMA.scalings, normed=True),
        "qwen2": Family("qwen2"),
        "qwen3": Family("qwen3", square=False),
        "qwen2_moe": Family("qwen2moe", headed=True, normed=False),
        "qwen3_moe": Family("qwen3moe", square=False, normed=True),
        "olmoe": Family("olmoe", headed=True, normed=False),
        "phi3": Family("phi3", scalings=("default", "longrope")),
        "smollm3": Family("smollm3", "rotary", square=False),
        "stablelm": Family("stablelm", biases=(*QKV, "attn_norm", "ffn_norm", "output_norm"), headed=True),
        "olmo2": Family("olmo2", headed=True),
        "gpt2": Family("gpt2", biases=ALL, activations=TANH),
        "gpt_neox": Family("gptneox", "heads", ALL, (*TANH, "gelu"), headed=True),
        "falcon": Family("falcon", "groups", ("attn_norm", "attn_norm_2", "output_norm"), (*TANH, "gelu")),
        "bloom": Family("bloom", "heads", ALL),
        "gemma": Family("gemma", activations=TANH, square=False),
        "gemma2": Family("gemma2", activations=TANH, square=False),
        "gemma3_text": Family("gemma3", activations=TANH, square=False),
    }
)


def family_of(config: Config, label: str) -> Family:
    """How llama.cpp knows the family of a config.

    Raises:
        BadModel: it does not, or it computes something that the config does not say.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise BadModel(
            f"{label}: no GGUF of {short(kind)} models can be written here. Those that can: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    found = sizes(config)
    if kind == "qwen2" and found.heads * found.head != found.hidden:
        family = LLAMA  # which has biases, too, and heads of any size
    if (unknown := _unknown(config, family)) is not None:
        raise BadModel(f"{label}: llama.cpp computes {kind} models without {unknown}, so no GGUF of it is written.")
    return family


@dataclass(frozen=True)
class Sizes:
    """What a config says of heads and widths. rotary: numbers of a head that are turned."""

    hidden: int
    heads: int
    shared: int
    head: int
    neurons: int
    blocks: int
    rotary: int


def sizes(config: Config) -> Sizes:
    """The sizes of a network by its config, whatever its family calls them."""
    kind = str(config.get("model_type"))
    hidden, heads, blocks = (_first(config, *names) for names in (
        ("hidden_size", "n_embd"), ("num_attention_heads", "n_head"), ("num_hidden_layers", "n_layer"),
    ))  # fmt: skip
    head = integer(config.get("head_dim")) or hidden // max(heads, 1)
    shared = integer(config.get("num_key_value_heads")) or heads
    if kind == "falcon":
        grouped = bool(config.get("new_decoder_architecture"))
        shared = _first(config, "num_kv_heads") if grouped else 1 if config.get("multi_query") else heads
    neurons = integer(config.get(NEURONS.get(kind, "intermediate_size"))) or 4 * hidden
    share = _number(rotation(config).get("partial_rotary_factor", 1.0))
    return Sizes(hidden, heads, shared, head, neurons, blocks, int(share * head))


def rotation(config: Config, kind: str = "full_attention") -> Config:
    """The `rope_parameters` of a config; where kinds of attention have their own, those of one."""
    found = config.get("rope_parameters")
    found = found if isinstance(found, dict) else {}
    own = found.get(kind)
    return own if isinstance(own, dict) else found


def sliding(config: Config) -> list[bool]:
    """For each block whether its attention sees the last tokens alone; empty, where all see all."""
    kinds = config.get("layer_types")
    window = config.get("sliding_window")
    if not isinstance(window, int) or window <= 0 or config.get("use_sliding_window") is False:
        return []
    blocks = sizes(config).blocks
    found = [kind == "sliding_attention" for kind in kinds] if isinstance(kinds, list) else [True] * blocks
    return found if any(found) else []


def usual_sliding(config: Config) -> list[bool] | None:
    """The blocks that slide where a file does not say which, as llama.cpp has it; None, where none can."""
    every = {"gemma2": 2, "gemma3_text": 6}.get(str(config.get("model_type")))
    return None if every is None else [(number + 1) % every != 0 for number in range(sizes(config).blocks)]


def context(config: Config) -> tuple[int, bool]:
    """How many tokens a network reads as llama.cpp computes it, and whether that is fewer than it could.

    Where the graph knows no sliding window it attends to all tokens, which is the same up to a window's length.
    """
    longest = integer(config.get("max_position_embeddings")) or integer(config.get("n_positions"))
    longest = longest or integer(config.get("seq_length")) or 2048
    window = integer(config.get("sliding_window"))
    cut = bool(sliding(config)) and usual_sliding(config) is None and window < longest
    return (window if cut else longest), cut


def _first(config: Config, *names: str) -> int:
    return next((value for name in names if (value := integer(config.get(name)))), 0)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 1.0


def _unknown(config: Config, family: Family) -> str | None:
    """The first thing that a config asks for and llama.cpp does not compute."""
    found = sizes(config)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    activation = activation or config.get("activation_function") or config.get("activation")
    if activation is not None and activation not in family.activations:
        return f"the activation {short(activation)}"
    if family.square and found.heads * found.head != found.hidden:
        return f"heads of {found.head} that are not the hidden size {found.hidden} together"
    if (scaling := _scaling(config, family)) is not None:
        return scaling
    own = OWN.get(str(config.get("model_type")), ())
    for key, wanted in own:
        if config.get(key, wanted) != wanted:
            return f"{key} = {short(config.get(key))}"
    if family.normed is not None and bool(config.get("norm_topk_prob", family.normed)) is not family.normed:
        return f"norm_topk_prob = {short(config.get('norm_topk_prob'))}"
    return _of_family(config, found)


OWN: Mapping[str, tuple[tuple[str, JsonValue], ...]] = MappingProxyType(
    {
        "gpt2": (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)),
        "gpt_neox": (("attention_bias", True),),
        "falcon": (("alibi", False), ("parallel_attn", True), ("bias", False)),
        "bloom": (("apply_residual_connection_post_layernorm", False),),
        "gemma3_text": (("attn_logit_softcapping", None), ("use_bidirectional_attention", False)),
        "qwen2_moe": (("decoder_sparse_step", 1), ("mlp_only_layers", [])),
        "qwen3_moe": (("decoder_sparse_step", 1), ("mlp_only_layers", [])),
        "olmoe": (("clip_qkv", None),),
    }
)  # fmt: skip


def _scaling(config: Config, family: Family) -> str | None:
    """What of a config's rotations is not computed."""
    kind, found = str(config.get("model_type")), rotation(config)
    scaling, numbers = str(found.get("rope_type", "default")), sizes(config)
    if scaling not in family.scalings:
        return f"rope_type {short(scaling)}"
    if numbers.rotary != numbers.head and kind not in ("gpt_neox", "stablelm", "phi3"):
        return f"partial_rotary_factor = {short(found.get('partial_rotary_factor'))}"
    if str(rotation(config, "sliding_attention").get("rope_type", "default")) not in ("default", scaling):
        return "scaled rotations in sliding windows"
    if scaling == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # which it takes whatever a file says
        for key in ("attention_factor", "mscale", "mscale_all_dim", *usual):
            if (value := found.get(key)) is not None and value != usual.get(key):
                return f"{key} = {short(value)}"
    return None


def _of_family(config: Config, found: Sizes) -> str | None:
    """What is computed in one family alone."""
    kind = config.get("model_type")
    if kind in ("gemma2", "gemma3_text"):
        large = found.blocks == {"gemma2": 46}.get(str(kind), 62)  # by which it knows the 27B models
        expected = found.hidden // max(found.heads, 1) if large else found.head
        if config.get("query_pre_attn_scalar", expected) != expected:
            return f"query_pre_attn_scalar = {short(config.get('query_pre_attn_scalar'))} for {found.blocks} blocks"
    if kind == "gemma2" and not (config.get("attn_logit_softcapping") and config.get("final_logit_softcapping")):
        return "attention or logits that are not capped"
    if kind == "smollm3":
        turned = config.get("no_rope_layers")
        usual = [int((number + 1) % 4 != 0) for number in range(found.blocks)]
        if isinstance(turned, list) and turned != usual:
            return f"no_rope_layers = {short(turned)}"
    if kind == "olmoe" and found.shared != found.heads:
        return "shared keys and values"
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe") and experts(config) < 2:
        return "a single expert"
    return None
