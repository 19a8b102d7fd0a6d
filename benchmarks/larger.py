"""Models larger than memory: `python -m benchmarks.larger [--write] [--blocks N] [--recipes rtn,gptq]`.

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
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.sections import README, write_section
from engine import cradle, hardware
from engine.checkpoint import part_names, shell
from engine.models import blocks
from engine.places import DEMO

log = logging.getLogger("larger")
STEPS: dict[str, dict[str, dict[str, object]]] = {  # of each row of the table
    "rtn": {"quantize/rtn": {"group_size": 128}},
    "gptq": {"quantize/gptq": {"group_size": 128, "samples": 32, "sequence_length": 512}},
    "mixed": {"quantize/mixed": {"budget": 3.5, "samples": 32, "sequence_length": 512}},
    "bitsandbytes": {"quantize/bitsandbytes": {"scheme": "int8", "samples": 32, "sequence_length": 512}},
    "pruned": {
        "prune/depth": {"share": 0.25, "samples": 32, "sequence_length": 512},
        "prune/width": {"neurons": 0.25, "samples": 32, "sequence_length": 512},
        "quantize/rtn": {"group_size": 128},
    },
}


def shape(number: int) -> LlamaConfig:
    """The config of an 8 B Llama with `number` blocks instead of 32."""
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=number, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=8192, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def make(folder: Path, config: LlamaConfig) -> None:
    """Write a checkpoint of that shape at random, a file for each part; nothing where it is there already."""
    if (folder / "model.safetensors.index.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    network = shell(config, torch.bfloat16)
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
    """A run of the command line: its result, seconds, and the most resident bytes of its worker's processes."""

    result: dict[str, object]
    seconds: float
    peak: int


def run(recipe: Path, home: Path, *, resume: str = "", kill_at: str = "") -> Watched:
    """Run a recipe, or go on with a run; kill all its processes once a file `kill_at` exists below `home`."""
    command = [sys.executable, "-m", "engine", "run", *([] if resume else [str(recipe)]), "--home", str(home), "--json"]
    command += ["--resume", resume] if resume else []
    began, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None:
            workers = psutil.Process(process.pid).children(recursive=True)
            peak = max(peak, resident(workers))
            if kill_at and any(home.rglob(kill_at)):
                for each in [*workers, psutil.Process(process.pid)]:
                    each.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        assert process.stdout is not None
        out = process.stdout.read().splitlines()
    return Watched(json.loads(out[-1]) if out else {}, time.monotonic() - began, peak)


def resident(processes: Sequence[psutil.Process]) -> int:
    """Resident bytes of processes together; those that have ended take none.

    A child that still has its parent's command and name has only been forked: what it shows is its parent's memory. So
    is what a cradle shows.
    """
    found: dict[tuple[str, ...], int] = {}
    for process in processes:
        with suppress(psutil.Error):
            name, command = process.name(), process.cmdline()
            if name != cradle.NAME:
                found[name, *command] = max(found.get((name, *command), 0), process.memory_info().rss)
    return sum(found.values())


def artifact(home: Path) -> Path:
    """The one artifact below a data folder."""
    (found,) = home.glob("runs/*/attempt-*/artifact")
    return found


def main() -> None:
    """Measure and report; with --write also into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "maquette-larger")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--recipes", default="rtn,gptq")
    parser.add_argument("--no-kill", action="store_true", help="leave out the run that is killed and resumed")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = arguments.folder / f"model-{arguments.blocks}"
    make(model, shape(arguments.blocks))
    lines = [
        f"A checkpoint with the shape of an 8 B Llama, {arguments.blocks} blocks of random weights, "
        f"{size(model) / 1e9:.1f} GB. {hardware.machine()}. Peak: resident memory of all processes of the run "
        "together, reading the artifact back included.",
        "",
        "| recipe | minutes | peak, GiB | artifact, GB | after `kill -9` |",
        "|---|---:|---:|---:|---|",
    ]
    for name in arguments.recipes.split(","):
        recipe = arguments.folder / f"{name}.yaml"
        steps = [{method: settings} for method, settings in STEPS[name].items()]
        recipe.write_text(json.dumps({"model": str(model), "measure": ["size"], "steps": steps}))
        home = arguments.folder / f"home-{name}"
        shutil.rmtree(home, ignore_errors=True)
        whole = run(recipe, home)
        if whole.result.get("status") != "succeeded":
            raise SystemExit(f"{name}: {whole.result}")
        made, bytes_ = digests(artifact(home)), size(artifact(home))
        shutil.rmtree(home)
        after = "" if arguments.no_kill else killed_and_resumed(recipe, home, arguments.blocks, made)
        cells = (name, f"{whole.seconds / 60:.1f}", f"{whole.peak / 2**30:.2f}", f"{bytes_ / 1e9:.2f}", after)
        lines.append(f"| {' | '.join(cells)} |")
        log.info("%s", lines[-1])
    if arguments.write:
        write_section(README, "larger", "\n".join(lines))


def killed_and_resumed(recipe: Path, home: Path, blocks: int, expected: dict[str, str]) -> str:
    """Kill a run in its middle block, go on with it, and compare the artifact's files with `expected`."""
    middle = blocks // 2  # finished blocks count from 0: the next one is at work
    run(recipe, home, kill_at=f"block-{middle:04d}.safetensors")
    (name,) = (folder.name for folder in (home / "runs").iterdir())
    again = run(recipe, home, resume=name)
    found = digests(artifact(home)) if again.result.get("status") == "succeeded" else {}
    same = "identical to the byte" if found == expected else f"DIFFERENT: {again.result}"
    shutil.rmtree(home)
    return f"killed in block {middle + 1}, resumed in {again.seconds / 60:.1f} min, {same}"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder."""
    found = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
