"""Decoding of one shape in every kind of block: `python -m benchmarks.families [--threads N] [--write]`.

Twelve blocks of 768 and 32,000 tokens, as each family makes them: what differs are norms, gates, biases, positions and
an order of heads, so that all would take about as long, did nothing but the products take time. The linears of the
blocks have 4 bits. The same weights are decoded by torch's loop and by our kernels in turns, which shows what stands
around the products; stock `transformers` has them in bf16.

Mixtures are such that one text reads as much of its experts as the others do of their MLPs; four texts read more, for
each goes to experts of its own.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
from functools import partial
from unittest.mock import patch

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    StableLmConfig,
)
from transformers.pytorch_utils import Conv1D

from benchmarks.decode import GROUP, NEW, PROMPT, Way, by_maquette, by_transformers, measure, priority, quantized
from benchmarks.sections import README, write_section
from engine import hardware
from engine.experts import separate
from engine.models import linears
from engine.runtime.linear import packed_linear
from engine.runtime.native.decoder import NativeDecoder
from engine.runtime.native.library import available
from engine.runtime.norms_and_gates import take_over
from engine.runtime.pages import use_large_pages
from engine.wide import widen

log = logging.getLogger("families")
SHAPE = {"vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
GATED = SHAPE | {"intermediate_size": 2048, "pad_token_id": 0}
MANY = GATED | {"num_key_value_heads": 12, "num_experts": 32, "num_experts_per_tok": 8}
FAMILIES: dict[str, PretrainedConfig] = {
    "Llama": LlamaConfig(**GATED),
    "GPT-2": GPT2Config(vocab_size=32000),
    "OPT": OPTConfig(**SHAPE, ffn_dim=3072, word_embed_proj_dim=768),
    "GPT-NeoX": GPTNeoXConfig(**SHAPE, intermediate_size=3072),
    "Falcon": FalconConfig(**SHAPE),
    "BLOOM": BloomConfig(**SHAPE),
    "Gemma 2": Gemma2Config(**GATED, head_dim=64, num_key_value_heads=12),
    "Phi-3": Phi3Config(**GATED),
    "OLMo 2": Olmo2Config(**GATED),
    "StableLM": StableLmConfig(**GATED, num_key_value_heads=12),
    "Mixtral, 2 of 8": MixtralConfig(
        **(GATED | {"intermediate_size": 1024}), num_key_value_heads=12, num_local_experts=8, sliding_window=None
    ),
    "Qwen2-MoE, 4 of 16 and one": Qwen2MoeConfig(
        **(MANY | {"num_experts": 16, "num_experts_per_tok": 4}), moe_intermediate_size=256,
        shared_expert_intermediate_size=1024,
    ),
    "Qwen3-MoE, 8 of 32": Qwen3MoeConfig(**MANY, head_dim=64, moe_intermediate_size=256),
    "OLMoE, 8 of 32": OlmoeConfig(**(MANY | {"intermediate_size": 256})),
}  # fmt: skip


def packed(stock: PreTrainedModel) -> PreTrainedModel:
    """A copy whose blocks have linears of 4 bits."""
    network = copy.deepcopy(stock)
    separate(network)  # experts with numbers of their own, which take no other time
    widen(network)
    use_large_pages(network)
    for name, linear in list(linears(network)):
        if name == "lm_head":
            continue
        weight = linear.weight.T.contiguous() if isinstance(linear, Conv1D) else linear.weight
        bias = linear.bias if isinstance(linear.bias, nn.Parameter) else None
        made = packed_linear(quantized(weight, 4, GROUP), bias, "cpu", torch.bfloat16)
        assert made is not None
        network.set_submodule(name, made)
    take_over(network)
    return network


def by_torch(network: PreTrainedModel, prompt: list[int], batch: int) -> list[float]:
    """As `by_maquette`, where our kernels compute products alone."""
    with patch.object(NativeDecoder, "supports", staticmethod(lambda *_: False)):
        return by_maquette(network, prompt, batch)


def main() -> None:
    """Measure and report; with --write also into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=hardware.cores())
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    prompt = torch.randint(5, 32000, (PROMPT,)).tolist()
    lines = [
        "| ms for the next token | bf16, transformers | 4 bit, torch's loop | ours | four texts: torch's loop | ours |",
        "|---|---|---|---|---|---|",
    ]
    for name, config in FAMILIES.items():
        stock = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        stock.generation_config.eos_token_id = None
        network = packed(stock)
        assert NativeDecoder.supports(network, 4, PROMPT + NEW)
        ways: dict[str, Way] = {
            "transformers": partial(by_transformers, stock, prompt, 1),
            "torch": partial(by_torch, network, prompt, 1),
            "ours": partial(by_maquette, network, prompt, 1),
            "torch, four": partial(by_torch, network, prompt, 4),
            "ours, four": partial(by_maquette, network, prompt, 4),
        }
        found = [1e3 * statistics.median(each) for each in measure(ways, arguments.rounds).values()]
        lines.append(f"| {name} | {' | '.join(f'{each:.1f}' for each in found)} |")
        log.info("%s", lines[-1])
    table = "\n".join(lines)
    text = (
        f"Twelve blocks of 768, 32,000 tokens, prompt of {PROMPT}, {NEW} new tokens, medians. {hardware.machine()};"
        f" {arguments.threads} threads; kernels for {available()}; torch {torch.__version__}.{priority()}\n\n{table}"
    )
    log.info("%s", text)
    if arguments.write:
        write_section(README, "families", text)


if __name__ == "__main__":
    main()
