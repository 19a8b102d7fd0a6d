"""Decoding of a 250 M-parameter Llama shape: `python -m benchmarks.decode [--threads N] [--write]`.

Prefill is bound by arithmetic, decoding by memory: each token reads all weights once, so fewer bytes are less
time, until what surrounds the products costs as much. One process, one set of random weights, four ways to
the next token in turn, so that whatever else the machine does falls on all alike; medians over all tokens.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.sections import README, write_section
from engine import hardware
from engine.generate import decode
from engine.packing import InputGrid, QuantizedWeight
from engine.runtime.linear import Int8Linear, PackedLinear

log = logging.getLogger("decode")
SHAPE = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16,
    num_key_value_heads=16, tie_word_embeddings=False, max_position_embeddings=2048,
)  # fmt: skip
PROMPT, NEW, GROUP = 32, 32, 64


class Clock:
    """A streamer for `generate` that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do after the last token."""


def by_transformers(network: PreTrainedModel, prompt: list[int]) -> list[float]:
    """Seconds of each token after the first, through `generate` with its defaults."""
    clock = Clock()
    with torch.inference_mode():
        network.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0, streamer=clock)
    return [b - a for a, b in itertools.pairwise(clock.times[1:])]  # the first put is the prompt


def by_maquette(network: PreTrainedModel, prompt: list[int]) -> list[float]:
    """Seconds of each token after the first, through Maquette's own loop."""
    times = []
    for _ in decode(network, prompt, NEW):
        times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


def packed(
    dense: PreTrainedModel, bits: int, group: int | None, kind: type[PackedLinear | Int8Linear] = PackedLinear
) -> PreTrainedModel:  # fmt: skip
    """A network of the same shape whose linears in the blocks compute on packed codes; shares all else."""
    with torch.device("meta"):
        network = LlamaForCausalLM(SHAPE).to(torch.bfloat16)
    for name, module in dense.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            network.get_submodule(name)._parameters[leaf] = parameter
        for leaf, buffer in module.named_buffers(recurse=False):
            network.get_submodule(name)._buffers[leaf] = buffer
    for name, module in dense.model.named_modules():
        if isinstance(module, nn.Linear):
            network.model.set_submodule(name, kind(quantized(module.weight, bits, group)))
    network.generation_config = dense.generation_config
    return network.eval()


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
    parser.add_argument("--threads", type=int, default=hardware.cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dense = LlamaForCausalLM(SHAPE).to(torch.bfloat16).eval()
    dense.generation_config.eos_token_id = None
    four, eight, rows = packed(dense, 4, GROUP), packed(dense, 8, GROUP), packed(dense, 8, None)
    integers = packed(dense, 8, None, Int8Linear)
    prompt = torch.randint(5, 32000, (PROMPT,)).tolist()
    ways: dict[str, Callable[[], list[float]]] = {
        "bf16, transformers `generate`": lambda: by_transformers(dense, prompt),
        "bf16, Maquette's loop": lambda: by_maquette(dense, prompt),
        f"4 bit, groups of {GROUP}, int4pack-cpu": lambda: by_maquette(four, prompt),
        f"8 bit, groups of {GROUP}, int4pack-cpu (two halves)": lambda: by_maquette(eight, prompt),
        "8 bit, one scale a row, int8pack-cpu": lambda: by_maquette(rows, prompt),
        "8 bit, 8-bit inputs (W8A8), int8-int8": lambda: by_maquette(integers, prompt),
    }
    text = table(measure(ways, arguments.rounds), dense.num_parameters(), arguments.threads)
    log.info("%s", text)
    if arguments.write:
        write_section(README, "decode", text)


def measure(ways: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[float]]:
    """Seconds per token of each way; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            found = way()
            seconds[name] += found if number else []
    return seconds


def table(seconds: dict[str, list[float]], parameters: int, threads: int) -> str:
    """The table in Markdown, with what it was measured on."""
    first = statistics.median(next(iter(seconds.values())))
    lines = [
        f"{parameters / 1e6:.0f} M parameters (12 blocks of 1024, feed-forward 4096, 32,000 tokens), prompt of"
        f" {PROMPT}, {NEW} new tokens, batch 1. {hardware.machine()}; {threads} threads; torch {torch.__version__}."
        f" The embeddings and the head stay bf16.{priority()}",
        "",
        "| way | ms per token, median | 5th to 95th percentile | times as fast |",
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
