"""Decoding and prefill of a Llama shape: `python -m benchmarks.decode [--device cuda] [--threads N] [--write]`.

250 M parameters on a CPU; on an NVIDIA GPU 8 B, which takes 45 GiB of it by its weights, and a table of its own.

Prefill is bound by arithmetic, decoding by memory: each token reads all weights once, so fewer bytes are less
time, until what surrounds the products costs as much. One process, one set of random weights, all ways to
the next token in turn, so that whatever else the machine does falls on all alike; medians over all tokens.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.sections import README, write_section
from engine import hardware
from engine.generate import decode
from engine.packing import InputGrid, QuantizedWeight
from engine.runtime.linear import Int8Linear, packed_linear
from engine.runtime.native.library import available
from engine.runtime.norms_and_gates import take_over
from engine.runtime.pages import use_large_pages
from engine.wide import widen

log = logging.getLogger("decode")
SHAPES = {
    "cpu": LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False, max_position_embeddings=2048,
    ),
    "cuda": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=2048,
    ),
}  # fmt: skip
SECTIONS = {None: "decode", "avx512": "decode", "avx2": "decode-avx2", "amx": "decode-amx", "cuda": "decode-cuda"}
PROMPT, NEW, GROUP = 32, 32, 64
BATCHES = (1, 4, 16)
PREFILL = 512  # tokens
Way = Callable[[], list[float]]


class Clock(StoppingCriteria):
    """Called by `generate` after each token of a batch: notes when, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.times.append(now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def by_transformers(network: PreTrainedModel, prompt: list[int], batch: int) -> list[float]:
    """Seconds of each token after the first, through `generate` with its defaults."""
    clock = Clock()
    with torch.inference_mode():
        network.generate(
            torch.tensor([prompt] * batch, device=network.device), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
    return [b - a for a, b in itertools.pairwise(clock.times)]


def by_maquette(network: PreTrainedModel, prompt: list[int], batch: int) -> list[float]:
    """Seconds of each token after the first, through Maquette's own loop."""
    times = []
    for _ in decode(network, prompt, NEW, batch=batch):
        times.append(now(network.device))
    # The second token also pays for the change of decoders and the check of their first step.
    return [b - a for a, b in itertools.pairwise(times[1:])]


@torch.inference_mode()
def prefill(network: PreTrainedModel, prompt: list[int]) -> list[float]:
    """Seconds of one forward pass of `transformers` over the prompt."""
    ids = torch.tensor([prompt], device=network.device)
    began = now(network.device)
    network(input_ids=ids, use_cache=True, logits_to_keep=1)
    return [now(network.device) - began]


def packed(dense: PreTrainedModel, bits: int, group: int | None, integers: bool = False) -> PreTrainedModel:
    """A network of the same shape whose linears in the blocks compute on packed codes; shares all else."""
    with torch.device("meta"):
        network = LlamaForCausalLM(dense.config).to(torch.bfloat16)
    for name, module in dense.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            network.get_submodule(name)._parameters[leaf] = parameter
        for leaf, buffer in module.named_buffers(recurse=False):
            network.get_submodule(name)._buffers[leaf] = buffer
    for name, module in dense.model.named_modules():
        if isinstance(module, nn.Linear):
            weight = quantized(module.weight, bits, group)
            how = (weight, None, dense.device)
            linear = Int8Linear(*how) if integers else packed_linear(*how, torch.bfloat16)
            assert linear is not None
            network.model.set_submodule(name, linear)
    network.generation_config = dense.generation_config
    if dense.device.type == "cpu":
        use_large_pages(network)
        take_over(network)
    return network.eval()


def kernel(network: PreTrainedModel) -> str:
    """The kernel of the blocks' linears."""
    return str(getattr(network.model.layers[0].mlp.down_proj, "kernel", "dense"))


def quantized(weight: torch.Tensor, bits: int, group: int | None) -> QuantizedWeight:
    """Round to nearest on a symmetric grid."""
    rows, columns = weight.shape
    groups = columns // group if group else 1
    split = weight.detach().float().view(rows, groups, -1)
    half = 2 ** (bits - 1)
    scale = (split.abs().amax(-1) / (half - 0.5)).to(torch.bfloat16)
    codes = (split / scale.float().unsqueeze(-1)).round().add_(half).clamp_(0, 2 * half - 1)
    zero = torch.full_like(scale, half, dtype=torch.uint8)
    return QuantizedWeight(codes.view(rows, columns).to(torch.uint8), scale, zero, bits, True, InputGrid())


def main() -> None:
    """Measure and report; with --write also into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--threads", type=int, default=hardware.cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.device(arguments.device):
        stock = LlamaForCausalLM._from_config(SHAPES[arguments.device], dtype=torch.bfloat16).eval()
    stock.generation_config.eos_token_id = None
    dense = stock
    if arguments.device == "cpu":
        dense = copy.deepcopy(stock)
        widen(dense)  # as every network is that Maquette loads
        use_large_pages(dense)
    networks = {
        "bf16": dense,
        f"4 bit, groups of {GROUP}": packed(dense, 4, GROUP),
        f"8 bit, groups of {GROUP}": packed(dense, 8, GROUP),
        "8 bit, one scale a row": packed(dense, 8, None),
        "8 bit, 8-bit inputs (W8A8)": packed(dense, 8, None, integers=True),
    }
    networks = {f"{name}, {kernel(network)}": network for name, network in networks.items()}
    long = torch.randint(5, 32000, (PREFILL,)).tolist()
    prompt = long[:PROMPT]
    tables = []
    for batch in BATCHES:
        ways: dict[str, Way] = {"bf16, transformers `generate`": partial(by_transformers, stock, prompt, batch)}
        ways |= {name: partial(by_maquette, network, prompt, batch) for name, network in networks.items()}
        title = f"Decoding, batch {batch}: ms for the next token of all sequences"
        tables.append(table(title, measure(ways, arguments.rounds)))
    ways = {"bf16, transformers": partial(prefill, stock, long)}
    ways |= {name: partial(prefill, network, long) for name, network in networks.items()}
    tables.append(table(f"Prefill of {PREFILL} tokens through transformers: ms", measure(ways, 3 * arguments.rounds)))
    text = "\n\n".join([about(stock, arguments.threads), *tables])
    log.info("%s", text)
    if arguments.write:
        write_section(README, SECTIONS[available() if arguments.device == "cpu" else arguments.device], text)


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            found = way()
            seconds[name] += found if number else []
    return seconds


def about(network: PreTrainedModel, threads: int) -> str:
    """What was measured, on what."""
    shape = network.config
    return (
        f"{network.num_parameters() / 1e6:,.0f} M parameters ({shape.num_hidden_layers} blocks of {shape.hidden_size},"
        f" feed-forward {shape.intermediate_size}, {shape.vocab_size:,} tokens), prompt of"
        f" {PROMPT}, {NEW} new tokens. {hardware.machine()}; {threads} threads; torch {torch.__version__}."
        f" The embeddings and the head stay bf16. The first line of each table is stock transformers; the others"
        f" decode in Maquette's loop.{priority()}"
    )


def table(title: str, seconds: dict[str, list[float]]) -> str:
    """A table in Markdown; the first line is what the others are compared with."""
    first = statistics.median(next(iter(seconds.values())))
    lines = [
        f"| {title} | median | 5th to 95th percentile | times as fast |",
        "|---|---|---|---|",
    ]
    for name, values in seconds.items():
        middle, ordered = statistics.median(values), sorted(values)
        low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
        spread = f"{low * 1e3:.1f} to {high * 1e3:.1f}"
        lines.append(f"| {name} | {middle * 1e3:.1f} | {spread} | {first / middle:.2f} |")
    return "\n".join(lines)


def priority() -> str:
    """A sentence where this process runs ahead of all others (`chrt -r 1`), for a machine that does other work."""
    ahead = hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
    return " Measured at real-time priority, beside other work." if ahead else ""


if __name__ == "__main__":
    main()
