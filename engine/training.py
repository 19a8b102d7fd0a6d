"""The training loop: AdamW, cosine schedule, checkpoints that resume to the same result.

Distillation trains with it, and pruning that lets the model recover.

What a step does depends on the seed and its number alone: the rows that are drawn and what dropout drops. So a
checkpoint needs the weights, the optimizer's two moments and the number of the step. It is written once the loss *with
its weights* is known to be good, so a training that diverges never replaces a good checkpoint by a bad one. A loss may
be bounded (Jensen-Shannon is, by ln 2) and so never far above where it began: the KL on held-out rows, which is not,
is judged like it at each look. Where a teacher is what is learned from, a KL that stays far above its best is
divergence, too: a student that has collapsed to one answer for everything is still within what a beginner's may be.

The loop is the same in each of several processes that `engine.distributed` joined: each takes its share of the batch's
rows, loss and gradient are those of the batch, the first process says and writes everything. What is trained beside
the network is whole in each, and stays the same. A checkpoint holds whole tensors, whoever wrote it, so any number of
processes can go on from it.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import distributed, rescue
from engine.distributed import Shards, gathered, local, scattered
from engine.errors import Diverged
from engine.files import publish
from engine.methods import Context
from engine.models import LoadedModel
from engine.wide import multiplies_bfloat16

WARMUP = 0.05  # share of the steps
CLIP = 1.0
BETAS, DECAY = (0.9, 0.95), 0.01
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
SAID_EVERY = 10  # steps
LOOKS = 20  # at the held-out rows in one training
MARGIN = 15  # nats by which a training may get worse: who knows nothing of 256,000 tokens is 12.5 from the truth
WORSE = 1.0  # nats by which the held-out KL may be above its best at one look, not at two, nor at the last
T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: optimizer steps, sequences in each, the highest learning rate.

    micro_batch: sequences of a step that are computed together, each part adding to the gradient what its share of
        the sequences weighs; 0: all of them.
    recompute: keep what enters each block alone, and compute the rest again in the backward pass (gradient
        checkpointing; Chen et al., 2016, arXiv 1604.06174).
    factors: by what the rate is multiplied, each from so many steps on; training ends before a step whose factor is 0.
    """

    steps: int
    batch: int
    rate: float
    checkpoint_every: int = 50
    micro_batch: int = 0
    recompute: bool = False
    factors: rescue.Factors = ()

    @property
    def end(self) -> int:
        """How many of the steps are done."""
        return rescue.end(self.factors, self.steps)

    def at(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine down to a tenth; times the factor of the step."""
        rate = self.rate * rescue.at(self.factors, step)
        warm = max(1, round(self.steps * WARMUP))
        if step < warm:
            return rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


Loss = Callable[[Tensor], Tensor]  # rows of a batch (batch, length) -> scalar
Prune = Callable[[int], None]  # changes the network's weights in place after that step, counted from 1


@dataclass(frozen=True)
class Extras:
    """What a training may have beside its student, rows and loss.

    tokens: that each row stands for, where a row is no sequence of token ids. trainable: names of the parameters that
        are trained, the others staying as they are in dtype and value. beside: parameters that are trained with the
        network's and are none of it; of several processes each has them whole. begin: is told each step's number, from
        0, before its loss is asked for. weigh: what the loss of some rows, their mean, weighs in that of the batch,
        asked before it with the same rows; without it, as much as they are.
        held_out: the KL on rows that are never trained on; `closer`: it is what the training is to lower.
    """

    tokens: int | None = None
    trainable: Collection[str] | None = None
    beside: Mapping[str, nn.Parameter] = field(default_factory=dict)
    begin: Callable[[int], None] | None = None
    weigh: Callable[[Tensor], float] | None = None
    held_out: Callable[[], float] | None = None
    closer: bool = False


def train(
    student: LoadedModel, rows: Tensor, loss_of: Loss, schedule: Schedule, context: Context,
    prune: Prune | None = None, extras: Extras | None = None,
) -> None:  # fmt: skip
    """Train the student's network in float32 on packed rows (count, length), drawn anew from the seed each epoch.

    Weights of the linears in `pruned` that are zero stay zero; `prune` may make more of them so after any step. The
    network comes back in its own dtype; several processes, which train all parameters and those alone, get a new one.

    Raises:
        Diverged: the loss, the held-out KL or a gradient is not finite, or one of the first two far above where it
            began, or the KL that should fall stays above its best.
    """
    extras = extras or Extras()
    network, dtype = student.network, student.network.dtype
    names = {name for name, _ in network.named_parameters()} if extras.trainable is None else set(extras.trainable)
    trained = {name: each for name, each in network.named_parameters() if name in names}
    network.train().requires_grad_(False)
    cache, network.config.use_cache = network.config.use_cache, False
    if schedule.recompute:
        recompute(network)
    # Where bfloat16 has no instructions what is not trained computes in float32, too, and comes back as it was.
    narrow = trained.values() if multiplies_bfloat16(student.device.type) else list(network.parameters())
    shards = None
    if distributed.count() > 1:
        assert (prune, extras.trainable) == (None, None), "not in several processes"
        shards = Shards(network)
        trained = dict(shards.parameters)
    else:
        cast(narrow, torch.float32)
    run = Training({**trained, **extras.beside}, student, schedule, context, extras, shards)
    with torch.enable_grad():
        for each in run.parameters.values():
            each.requires_grad_(True)
    rows_each = rows.shape[1] if extras.tokens is None else extras.tokens
    first, end = run.resume(), schedule.end
    began = time.monotonic()
    for step in range(first, end):
        context.check_cancelled()
        value = run.step(step, draw(rows, schedule.batch, step, context.seed).to(student.device), loss_of, prune)
        done = step + 1 - first
        if (step + 1) % SAID_EVERY == 0 or step + 1 == end:
            run.say(step, value, rows_each * min(schedule.batch, len(rows)) * done, done, time.monotonic() - began)
    run.finish(draw(rows, schedule.batch, end - 1, context.seed).to(student.device), loss_of)
    if shards is None:
        cast(narrow, dtype)
    else:
        student.network = network = shards.whole(dtype)
    if schedule.recompute:
        recompute(network, again=False)
    network.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    network.config.use_cache = cache


def recompute(network: PreTrainedModel, again: bool = True) -> None:
    """Let the blocks of a network be computed again in the backward pass, or not."""
    newer = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"  # from 5.24 on
    if again:
        getattr(network, f"{newer}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(network, f"{newer}_checkpointing_disable")()


def cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Give parameters another dtype, in memory of their own: it may be shared with the model that they were made of.

    Nothing else of the network is touched: rotary frequencies must keep their float32.
    """
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype, copy=True)


class Training:
    """The state of one training: what is trained, its optimizer, the last good checkpoint."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], student: LoadedModel, schedule: Schedule, context: Context,
        extras: Extras, shards: Shards | None = None,
    ) -> None:  # fmt: skip
        self._shards = shards
        self.parameters, self._student, self._schedule = parameters, student, schedule
        self._context, self._extras = context, extras
        self._saved = context.folder / "training.safetensors"
        whole = list(extras.beside.values()) if shards is not None else []  # which no optimizer steps beside shards
        own = {id(each) for each in whole}
        self._groups = [[each for each in parameters.values() if id(each) not in own], whole]
        groups = [{"params": group} for group in self._groups if group]
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=DECAY, fused=True)
        self._highest, self._furthest, self._kept = math.inf, math.inf, 0
        self._closest, self._worse = math.inf, False
        self._zeros: list[tuple[Tensor, Tensor]] = []

    def resume(self) -> int:
        """Go on from a checkpoint, where there is one; the step at which training goes on."""
        if self._saved.exists():
            state = read_checkpoint(self._saved, self.parameters, self._optimizer)
            self._highest, self._kept = state["highest"], int(state["step"])
            self._furthest, self._closest = state.get("furthest", math.inf), state.get("closest", math.inf)
            self._context.log(f"resumed at step {self._kept} of {self._schedule.steps}")
        for first, factor in self._schedule.factors:
            if factor:
                self._context.log(f"after step {first} the learning rate is {factor:g} times what the schedule says")
        if (end := self._schedule.end) < self._schedule.steps:
            self._context.log(f"warning: the training ends after step {end}, with the weights of that step")
        self._look_for_zeros()
        return self._kept

    def step(self, step: int, batch: Tensor, loss_of: Loss, prune: Prune | None) -> float:
        """One step of the optimizer; the loss before it."""
        schedule = self._schedule
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.at(step)
        # Before the loss: gradients must be the last thing that is computed with shards before they change.
        if self._extras.held_out is not None and step % max(SAID_EVERY, schedule.steps // LOOKS) == 0:
            self.look(step)
        torch.manual_seed(self._context.seed * 1_000_003 + step)
        if self._extras.begin is not None:
            self._extras.begin(step)
        with torch.enable_grad():
            value = self._loss(step, batch, loss_of)
        if step > self._kept and step % schedule.checkpoint_every == 0 and not self._worse:
            self.keep(step)
        norm = self._clip()
        if not math.isfinite(norm):
            raise self.diverged(step, "a gradient is not finite")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for own, zero in self._zeros:
                own.masked_fill_(zero, 0)
            if prune is not None:
                prune(step + 1)
                self._look_for_zeros()
        return value

    def finish(self, batch: Tensor, loss_of: Loss) -> None:
        """The last look, or the loss of a last batch where no rows are held out, and the last checkpoint."""
        steps = self._schedule.end
        bad = sum(not bool(local(each).isfinite().all()) for each in self.parameters.values())
        if distributed.mean(float(bad), self._student.device) > 0:
            raise self.diverged(steps - 1, "weights are not finite")
        if self._extras.held_out is not None:
            self.look(steps - 1, last=True)
        else:
            with torch.no_grad():
                self._loss(steps - 1, batch, loss_of)
        if self._kept < steps:
            self.keep(steps)

    def keep(self, step: int) -> None:
        """Write the checkpoint of so many steps."""
        limits = {"highest": self._highest, "furthest": self._furthest, "closest": self._closest}
        state = {"step": step, **limits}
        write_checkpoint(self._saved, self.parameters, self._optimizer, state)
        self._kept = step

    def look(self, step: int, last: bool = False) -> None:
        """Say the KL on held-out rows, and judge it."""
        assert self._extras.held_out is not None
        self._student.network.eval()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            value = self._with_network(self._extras.held_out)
        self._furthest = self._judged(step, "the held-out KL", value, self._furthest)
        self._context.sample("kl_heldout", value, "nats")
        self._student.network.train()
        self._closest = min(self._closest, value)
        worse = self._extras.closer and value > self._closest + WORSE
        if worse and (self._worse or last):
            raise self.diverged(step, f"the held-out KL is {value:.3g}, after {self._closest:.3g}")
        self._worse = worse

    def say(self, step: int, loss: float, tokens: int, steps: int, seconds: float) -> None:
        """One point of each live chart, after `steps` steps that read so many tokens in so many seconds."""
        self._context.sample("loss", loss, "nats")
        self._context.sample("learning_rate", self._schedule.at(step), "1")
        self._context.sample("tokens_per_second", tokens / seconds, "1/s")
        self._context.sample("eta", (self._schedule.end - step - 1) * seconds / steps, "s")
        self._context.progress(step + 1, self._schedule.end, "steps")

    def diverged(self, step: int, why: str) -> Diverged:
        """What to say of a training that went wrong in that step; whoever may go on from its checkpoint is told."""
        self._context.emit("diverged", {"step": step + 1, "kept": self._kept, "why": why})
        kept = f"The checkpoint of step {self._kept} is kept." if self._kept else "No checkpoint was written yet."
        return Diverged(f"Training diverged at step {step + 1}: {why}. Use a lower learning_rate. {kept}")

    def _loss(self, step: int, batch: Tensor, loss_of: Loss) -> float:
        """The loss of a batch, judged; this process adds the gradients of its share, one part after the other."""
        value = 0.0
        for part, counts in self._parts(batch):
            loss = counts * self._with_network(functools.partial(loss_of, part))
            if torch.is_grad_enabled():
                loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        if torch.is_grad_enabled() and self._groups[1]:
            distributed.average_(each.grad for each in self._groups[1] if each.grad is not None)
        value = distributed.mean(value, batch.device)
        self._highest = self._judged(step, "the loss", value, self._highest)
        return value

    def _parts(self, batch: Tensor) -> list[tuple[Tensor, float]]:
        """The parts of this process's share, and what the loss of each weighs in the mean over the processes.

        All have as many, for they compute together; a part that is too many is computed for nothing.
        """
        rows, weight = distributed.share(batch)
        most = -(-len(batch) // distributed.count())  # rows of any process
        size = min(self._schedule.micro_batch or most, most)
        parts = [rows[start : start + size] for start in range(0, most, size)]
        counts = [weight * len(part) / len(rows) for part in parts]
        parts = [part if len(part) else rows[:1] for part in parts]
        if (weigh := self._extras.weigh) is not None:
            with torch.no_grad():
                weights = [self._with_network(functools.partial(weigh, part)) for part in parts]
            weights = [each if count else 0.0 for each, count in zip(weights, counts, strict=True)]
            whole = distributed.mean(sum(weights), batch.device)
            counts = [each / whole for each in weights]
        return list(zip(parts, counts, strict=True))

    def _clip(self) -> float:
        """Bound the gradients, all together; their norm before that."""
        found = [[each.grad for each in group if each.grad is not None] for group in self._groups]
        if not found[1]:
            return gathered(torch.nn.utils.clip_grad_norm_(self._groups[0], CLIP)).item()
        norm = math.hypot(*(gathered(torch.nn.utils.get_total_norm(group)).item() for group in found))
        for each in (*found[0], *found[1]):
            local(each).mul_(min(1.0, CLIP / (norm + 1e-6)))
        return norm

    def _judged(self, step: int, what: str, value: float, highest: float) -> float:
        """The highest value that is not yet divergence, which the first one says."""
        highest = 3 * abs(value) + MARGIN if math.isinf(highest) else highest
        if not math.isfinite(value) or value > highest:
            raise self.diverged(step, f"{what} is {value:.3g}")
        return highest

    def _look_for_zeros(self) -> None:
        weights = [self.parameters.get(f"{name}.weight") for name in sorted(self._student.pruned)]
        own = [local(each.data) for each in weights if each is not None]
        self._zeros = [(each, each == 0) for each in own]

    def _with_network(self, work: Callable[[], T]) -> T:
        return work() if self._shards is None else self._shards.run(work)


def draw(rows: Tensor, batch: int, step: int, seed: int) -> Tensor:
    """The batch of a step: rows in an order that the seed and the epoch give, whatever came before."""
    each = max(1, len(rows) // batch)
    epoch, place = divmod(step, each)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return rows[order[place * batch : (place + 1) * batch]]


def write_checkpoint(
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: Mapping[str, float]
) -> None:
    """Weights and optimizer state in one safetensors file with the JSON `state`, replaced whole."""
    tensors = {f"weight.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for part, moment in optimizer.state[value].items():
            tensors[f"{part}.{name}"] = torch.as_tensor(moment)
    if distributed.count() > 1:
        for name in tensors:  # one after the other leaves the device again
            tensor = gathered(tensors[name])
            tensors[name] = tensor.cpu() if distributed.rank() == 0 else tensor.new_empty(0)
        if distributed.rank() > 0:
            return
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary, metadata={"state": json.dumps(dict(state))})
    publish(temporary, path)


def read_checkpoint(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Read a checkpoint back into weights and optimizer; returns its `state`."""
    with safe_open(path, "pt") as file, torch.no_grad():
        state: dict[str, float] = json.loads(file.metadata()["state"])
        there = set(file.keys())
        for name, value in parameters.items():
            value.copy_(scattered(file.get_tensor(f"weight.{name}"), value))
            moments = [part for part in MOMENTS if f"{part}.{name}" in there]  # none where no gradient came
            optimizer.state[value] = {part: _moment(file.get_tensor(f"{part}.{name}"), value) for part in moments}
    return state


def _moment(tensor: Tensor, weight: Tensor) -> Tensor:
    """As the optimizer wants it: the number of the step everywhere, the others in shards where the weight is."""
    return scattered(tensor, weight) if tensor.shape == weight.shape else tensor.to(weight.device)
