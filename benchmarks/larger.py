"""Models larger than memory: `python -m benchmarks.larger [--write] [--blocks N] [--methods rtn,gptq]`.

Makes a checkpoint with the shape of an 8 B Llama at random (32 blocks, 4096 / 14336, 16 GB), quantizes it through the
command line and samples the resident memory of all processes of the run from outside. A run is killed with SIGKILL in
block 17 and resumed; the artifact must be the same to the byte. Blocks are equal, so time grows with their number and
memory does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from benchmarks.sections import README, write_section
from engine import hardware
from engine.checkpoint import part_names, shell
from engine.models import blocks
from engine.preflight import DEMO

log = logging.getLogger("larger")
STEPS: dict[str, dict[str, object]] = {
    "rtn": {"group_size": 128},
    "gptq": {"group_size": 128, "samples": 32, "sequence_length": 512},
}


def shape(number: int) -> LlamaConfig:
    """The config of an 8 B Llama with `number` blocks instead of 32."""
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=number, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=8192, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def make(folder: Path, number: int) -> None:
    """Write a checkpoint at random, a file for each part; nothing where it is there already."""
    if (folder / "model.safetensors.index.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    network = shell(shape(number), torch.bfloat16)
    folder.mkdir(parents=True)
    network.config.save_pretrained(folder)
    for file in (DEMO / "model").glob("*token*"):
        shutil.copy(file, folder)
    index, dice = {}, torch.Generator().manual_seed(0)
    for part in part_names(network, blocks(network)[0]):
        tensors = {}
        for name, parameter in network.get_submodule(part).named_parameters(prefix=part):
            tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
            tensors[name] = tensor.normal_(0, 0.02, generator=dice) if tensor.dim() > 1 else tensor.fill_(1)
        save_file(tensors, folder / f"{part}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@dataclass
class Watched:
    """A run of the command line: its last line of JSON, seconds, and the largest resident bytes of its processes."""

    result: dict[str, object]
    seconds: float
    peak: int
    by_phase: dict[str, int] = field(default_factory=dict)


def run(recipe: Path, home: Path, kill_after: str = "", resume: str = "") -> Watched:
    """Run a recipe, or resume a run; kill all its processes when a line says `kill_after`."""
    what = ["resume", resume] if resume else ["run", str(recipe)]
    command = [sys.executable, "-m", "engine", *what, "--home", str(home), "--json"]
    began, peak, phase, phases = time.monotonic(), 0, "", {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        os.set_blocking(process.stderr.fileno(), False)
        while process.poll() is None:
            mine = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            resident = sum(_resident(each) for each in mine)
            peak = max(peak, resident)
            for line in process.stderr.read().splitlines() if (ready := process.stderr.readable()) and ready else []:
                log.info("  %s", line)
                phase = line if not line.startswith(" ") else phase
                if kill_after and kill_after in line:
                    for each in mine:
                        each.send_signal(signal.SIGKILL)
            phases[phase] = max(phases.get(phase, 0), resident)
            time.sleep(0.05)
        out = process.stdout.read().splitlines()
    return Watched(json.loads(out[-1]) if out else {}, time.monotonic() - began, peak, phases)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
