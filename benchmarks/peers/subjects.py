"""What the peers compress: the demo model, and two blocks of the shape of an 8 B Llama with random weights.

White noise would make every method look alike: with inputs that do not correlate GPTQ is rounding to nearest. So the
weights and embeddings of the second are of low rank with noise on top, which correlates the activations, and a few
channels are many times larger than the others, as in trained models of that size. Its text is the demo's, so its
perplexity says nothing; the distance to the original does.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.environments import CACHE
from engine.calibration import token_rows
from engine.models import load_tokenizer
from engine.places import DEMO

SAMPLES, LENGTH = 128, 128
SHAPE = LlamaConfig(
    vocab_size=4096, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, max_position_embeddings=512, bos_token_id=0,
    eos_token_id=0, pad_token_id=0,
)  # fmt: skip
RANK, OUTLIERS, TIMES = 64, 16, 12.0  # of each matrix; channels that are larger, and how many times
TITLES = {
    "demo": "the demo model (2.3 M parameters, 4 blocks of 256)",
    "shape": "two blocks of the shape of an 8 B Llama (470 M parameters; random, correlated)",
}


def folder(name: str) -> Path:
    """The folder of a subject; the random one is made where it is not there."""
    if name == "demo":
        return DEMO / "model"
    made = CACHE / "models" / name
    if not (made / "config.json").exists():
        random_model().save_pretrained(made)
        load_tokenizer(DEMO / "model").save_pretrained(made)
    return made


def rows() -> Path:
    """A JSON file with the calibration's token ids, the same for all: SAMPLES rows of LENGTH."""
    file = CACHE / "rows.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        ids = token_rows(load_tokenizer(DEMO / "model"), DEMO / "text.txt", LENGTH, SAMPLES)
        file.write_text(json.dumps(ids.tolist()))
    return file


@torch.no_grad()
def random_model() -> LlamaForCausalLM:
    """The random model in bfloat16, the same from the same seed."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(SHAPE).to(torch.bfloat16)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            rows_, columns = module.weight.shape
            size = 1.0 if isinstance(module, nn.Embedding) else columns**-0.5
            module.weight.copy_(size * correlated(rows_, columns))
    for block in network.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.copy_(torch.rand(SHAPE.hidden_size) + 0.5)
            norm.weight[torch.randperm(SHAPE.hidden_size)[:OUTLIERS]] *= TIMES
        block.mlp.up_proj.weight[torch.randperm(SHAPE.intermediate_size)[:OUTLIERS]] *= TIMES
    return network.eval()


def correlated(rows_: int, columns: int) -> Tensor:
    """A matrix of unit variance, half of it of rank RANK."""
    low = torch.randn(rows_, RANK) @ torch.randn(RANK, columns) / RANK**0.5
    return (low + torch.randn(rows_, columns)) / 2**0.5
