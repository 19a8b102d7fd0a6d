"""Where a block's activations can be scaled without changing what the block computes.

A linear's input may be divided by a vector s, channel by channel, and the linear's columns multiplied by it.
The division costs nothing where the operation before can carry it: a norm's weight and bias, or the rows of the
linear before when nothing but an element-wise product or a weighted sum over tokens stands between (v before o;
up before down; fc1 before fc2 behind a ReLU).

Which modules read a norm's output is found by running the block, not from a list of families; in a mixture they are
its router and every expert's first linears, whichever tokens these get. Every fold is then tried: the block must
compute the same with it, else it is dropped (a residual that reads the norm's output too, an activation that does not
commute with scaling).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.experts import Experts
from engine.flow import Call, run_block
from engine.models import Linear
from engine.observing import Block, BlockLinear, stretches
from engine.orientation import turned

# The linear before, of how many equal parts of its rows the last is read, and the linear that reads it.
LINEAR_PAIRS = (
    ("v_proj", 1, "o_proj"), ("v_proj", 1, "out_proj"), ("v_proj", 1, "dense"), ("qkv_proj", 0, "o_proj"),
    ("up_proj", 1, "down_proj"), ("w3", 1, "w2"), ("gate_up_proj", 2, "down_proj"), ("fc1", 1, "fc2"),
)  # fmt: skip
Place = tuple[int, int]  # of a tensor in memory, and how many numbers it has
AGREEMENT = 0.02  # relative distance of bfloat16 outputs that differ in rounding only


@dataclass(frozen=True)
class Fold:
    """One place: `size` channels can be scaled where `source` makes them and `readers` read them.

    rows: which of a linear source's outputs; None for a norm. repeats: how many of a reader's inputs in a row of
    heads come from one channel (grouped-query attention). head: channels of one head, 0 where there are none.
    offset: what is added to a norm's weight before it is used (1 in Gemma).
    """

    source: nn.Module
    readers: tuple[BlockLinear, ...]
    size: int
    rows: slice | None = None
    repeats: int = 1
    head: int = 0
    offset: float = 0.0

    def spread(self, scale: Tensor) -> Tensor:
        """The scale (size,) for each input of the readers (size * repeats,)."""
        if self.repeats == 1:
            return scale
        return scale.view(-1, 1, self.head).expand(-1, self.repeats, -1).reshape(-1)

    def gather(self, values: Tensor) -> Tensor:
        """Values of the readers' inputs (size * repeats,) averaged for each channel (size,)."""
        if self.repeats == 1:
            return values
        return values.view(-1, self.repeats, self.head).mean(1).reshape(-1)

    def apply(self, scale: Tensor) -> Tensor:
        """Divide the source's channels by `scale` (size,) and multiply the readers' columns by it.

        A norm's weights round as they are stored, near minus the offset by much; what they came out as is what the
        readers are multiplied by. Returns that scale; 1 for a channel that would have been rounded away.
        """
        weight = self.source.get_parameter("weight").data
        bias = self.source._parameters.get("bias")
        if self.rows is None:
            before = weight.float() + self.offset
            weight.copy_(before / scale - self.offset)
            after = weight.float() + self.offset
            gone = (after == 0) & (before != 0)
            weight.copy_(torch.where(gone, before - self.offset, weight.float()))
            scale = torch.where(after == 0, torch.where(gone, 1.0, scale), before / after)
        else:
            rows = turned(self.source, weight)[self.rows]
            rows.copy_(rows.float() / scale[:, None])
        if bias is not None:
            part = bias.data if self.rows is None else bias.data[self.rows]
            part.copy_(part.float() / scale)
        for reader in self.readers:
            spread = self.spread(scale)
            for some in stretches(reader.weight):
                reader.weight[some] = (reader.weight[some].float() * spread).to(reader.weight.dtype)
        return scale


def folds(block: Block, states: Tensor, call: Call) -> list[Fold]:
    """The folds of a block that keep what it computes, tried on `states` (B, T, hidden), in the order of the block.

    None for the output head: what is before it stands elsewhere.
    """
    if isinstance(block.module, nn.Linear):
        return []
    before = run_block(block.module, states, call).float()
    found: list[Fold] = []
    settled: set[nn.Module] = set()  # what one reads is made in one place
    for fold in _candidates(block, states, call):
        modules = {reader.module for reader in fold.readers}
        if modules.isdisjoint(settled) and _holds(fold, block, states, call, before):
            found.append(fold)
            settled |= modules
    return found


def _candidates(block: Block, states: Tensor, call: Call) -> Iterator[Fold]:
    # Tensors by their place, so that a view is what it is a view of; they are kept, so that no place is used twice.
    made: dict[Place, tuple[Tensor, nn.Module]] = {}
    readers: dict[Place, tuple[Tensor, list[BlockLinear]]] = {}
    named: dict[str, Linear] = {
        path: module for path, module in block.module.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    known = {linear.name: linear for linear in block.linears}
    everything = {
        path: known.get(f"{block.name}.{path}", BlockLinear(f"{block.name}.{path}", module))
        for path, module in named.items()
    }

    def note_made(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            made[_place(output)] = (output, module)

    def note_read(found: Sequence[BlockLinear], inputs: Tensor) -> None:
        readers.setdefault(_place(inputs), (inputs, []))[1].extend(found)

    reading: dict[nn.Module, list[BlockLinear]] = {linear.module: [linear] for linear in everything.values()}
    for path, module in block.module.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, Experts):
            reading[module] = [reading[first][0] for first in module.readers]
        elif module not in reading and weight is not None and weight.dim() == 2:  # a router
            reading[module] = [BlockLinear(f"{block.name}.{path}", module)]

    with contextlib.ExitStack() as stack:
        for module in block.module.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 1:
                stack.callback(module.register_forward_hook(note_made).remove)
        for module, found in reading.items():
            hook = module.register_forward_pre_hook(lambda _, args, found=found: note_read(found, args[0]))
            stack.callback(hook.remove)
        run_block(block.module, states, call)
    for place, (_, found) in readers.items():
        if place in made:
            norm = made[place][1]
            size = norm.get_parameter("weight").shape[0]
            for offset in (0.0, 1.0):
                yield Fold(norm, tuple(found), size, offset=offset)
    for path, reader in everything.items():
        yield from _linear_pairs(path, reader, named)


def _place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tensor.numel()


def _linear_pairs(path: str, reader: BlockLinear, named: dict[str, Linear]) -> Iterator[Fold]:
    parent, _, leaf = path.rpartition(".")
    inputs = reader.weight.shape[1]
    for before, parts, after in LINEAR_PAIRS:
        source = named.get(f"{parent}.{before}" if parent else before)
        if leaf != after or source is None:
            continue
        outputs = BlockLinear(before, source).weight.shape[0]
        # A fused projection has the queries, as many as o has inputs, then keys and values of one size each.
        size = outputs // parts if parts else (outputs - inputs) // 2
        if size <= 0 or inputs % size:
            continue
        repeats = inputs // size
        heads = [head for head in (256, 192, 128, 96, 80, 64, 32, 16, 8) if size % head == 0] if repeats > 1 else [0]
        for head in heads:  # which one is right shows when it is tried
            yield Fold(source, (reader,), size, slice(outputs - size, outputs), repeats, head)


@torch.no_grad()
def _holds(fold: Fold, block: Block, states: Tensor, call: Call, before: Tensor) -> bool:
    """Whether the block computes what it did `before` with scales that are powers of two, which round nothing."""
    tensors = [fold.source.get_parameter("weight"), *(reader.module.weight for reader in fold.readers)]
    if (bias := fold.source._parameters.get("bias")) is not None:
        tensors.append(bias)
    kept = [tensor.detach().clone() for tensor in tensors]
    dice = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randint(-2, 3, (fold.size,), generator=dice).float()).to(states.device)
    try:
        fold.apply(scale)
        after = run_block(block.module, states, call).float()
    finally:
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.data.copy_(old)
    change = before - states.float()  # the residual itself would hide a difference
    distance = (after - before).norm() / change.norm().clamp(min=1e-12)
    return bool(distance < AGREEMENT)
