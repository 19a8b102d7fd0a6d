"""The training loop: AdamW, cosine schedule, checkpoints that resume to the same result.

Distillation trains with it, and pruning that lets the model recover.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import Diverged
from engine.files import publish
from engine.methods import Context
from engine.models import LoadedModel

WARMUP = 0.05  # share of the steps
CLIP = 1.0
BETAS, DECAY = (0.9, 0.95), 0.01


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: optimizer steps, sequences in each, the highest learning rate."""

    steps: int
    batch: int
    rate: float
    checkpoint_every: int = 50

    def at(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine down to a tenth."""
        warm = max(1, round(self.steps * WARMUP))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


Loss = Callable[[Tensor], Tensor]  # token ids (batch, length) -> scalar
Prune = Callable[[int], None]  # changes the weights in place after so many steps; also where training begins


def train(
    student: LoadedModel, rows: Tensor, loss_of: Loss, schedule: Schedule, context: Context, prune: Prune | None = None
) -> None:  # fmt: skip
    """Train the student's network in float32 on packed rows (count, length), drawn anew from the seed each epoch.

    Weights of the linears in `pruned` that are zero stay zero; `prune` may make more of them so after any step. The
    network comes back in its own dtype.

    Raises:
        Diverged: the loss is not finite, or far above where it began.
    """
    network, dtype = student.network, student.network.dtype
    cast(network, torch.float32)
    network.train().requires_grad_(True)
    network.config.use_cache = False
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), betas=BETAS, weight_decay=DECAY)
    saved = context.folder / "training.safetensors"
    first = resume(saved, parameters, optimizer) if saved.exists() else 0
    if first:
        context.log(f"resumed at step {first} of {schedule.steps}")
    if prune is not None:
        with torch.no_grad():
            prune(first)
    began, highest = time.monotonic(), math.inf
    for step in range(first, schedule.steps):
        context.check_cancelled()
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        batch = draw(rows, schedule.batch, step, context.seed).to(network.device)
        with torch.enable_grad():
            loss = loss_of(batch)
        value = loss.item()
        highest = 3 * value + 10 if step == first else highest
        if not math.isfinite(value) or value > highest:
            raise Diverged(f"Training diverged at step {step + 1}: the loss is {value:.3g}. Use a lower learning_rate.")
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        zeros = {name: parameters[f"{name}.weight"] == 0 for name in student.pruned}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, zero in zeros.items():
                parameters[f"{name}.weight"].masked_fill_(zero, 0)
            if prune is not None:
                prune(step + 1)
        if (step + 1) % 10 == 0 or step + 1 == schedule.steps:
            context.sample("loss", value, "nats")
            context.sample("learning_rate", schedule.at(step), "1")
            context.sample("tokens_per_second", (step + 1 - first) * batch.numel() / (time.monotonic() - began), "1/s")
            context.progress(step + 1, schedule.steps, "steps")
        if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == schedule.steps:
            checkpoint(saved, parameters, optimizer, step + 1)
    cast(network, dtype)
    network.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    network.config.use_cache = True


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters another dtype, and nothing else: rotary frequencies must keep their float32."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def draw(rows: Tensor, batch: int, step: int, seed: int) -> Tensor:
    """The batch of a step: rows in an order that the seed and the epoch give, whatever came before."""
    each = max(1, len(rows) // batch)
    epoch, place = divmod(step, each)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return rows[order[place * batch : (place + 1) * batch]]


def checkpoint(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and optimizer state in one safetensors file, replaced whole."""
    tensors = {f"weight.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for part, state in optimizer.state[value].items():
            tensors[f"{part}.{name}"] = torch.as_tensor(state)
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary, metadata={"state": json.dumps({"step": step})})
    publish(temporary, path)


def resume(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint back; returns the step at which training goes on."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step: int = json.loads(file.metadata()["state"])["step"]
    tensors = load_file(path)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(tensors[f"weight.{name}"])
            parts = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[value] = {
                part: tensors[f"{part}.{name}"].to("cpu" if part == "step" else value.device) for part in parts
            }
    return step
