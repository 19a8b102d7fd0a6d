"""Calibration text on its way through a model's blocks, one block in memory at a time.

`capture` lets the model's body run over each batch, up to the last block, with stand-ins for the blocks, which note the
arguments that every block receives (masks, rotary embeddings, ...): these differ between families and, in some, between
the blocks of one model, but do not depend on what blocks compute. Then `Flow.through` lets one block after another
compute.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.fit import FLOW_ROWS, FLOW_TOKENS, HELD
from engine.models import LoadedModel, blocks, embeddings

Args = tuple[object, ...]
Kwargs = dict[str, object]


@dataclass
class Call:
    """The arguments one block received for one batch, but for the hidden states."""

    args: tuple[object, ...]
    kwargs: dict[str, object]


class States:
    """The hidden states (B, T, hidden) of all batches of `ids` (B, T): in memory, or in files where they are many.

    They are written as they come, so that what goes to files never stands in memory together.
    """

    def __init__(self, ids: Sequence[Tensor], folder: Path, most: int | None = None) -> None:
        self._ids, self._folder, self._most = ids, folder, HELD if most is None else most
        self._tokens = sum(batch.numel() for batch in ids)
        self._held: list[Tensor | torch.device] = [batch.device for batch in ids]  # those in files: where they belong

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> Tensor:
        held = self._held[number]
        if isinstance(held, Tensor):
            return held
        return load_file(self._file(number), str(held), backend="pread")["states"]

    def __setitem__(self, number: int, states: Tensor) -> None:
        if self._tokens * states.shape[-1] * states.element_size() <= self._most:
            self._held[number] = states
            return
        self._held[number] = states.device
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file({"states": states.contiguous()}, self._file(number))

    def like(self, name: str, share: int = 1) -> States:
        """Room for states of the same batches under another name, one of so many that share what may be in memory."""
        return States(self._ids, self._folder.with_name(name), self._most // share)

    def close(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:05d}.safetensors"


@dataclass
class Batches(Sequence[tuple[Tensor, Call]]):
    """What enters a block, batch by batch: hidden states (B, T, hidden) and the block's other arguments."""

    states: States
    calls: list[Call]

    def __len__(self) -> int:
        return len(self.states)

    @overload
    def __getitem__(self, number: int) -> tuple[Tensor, Call]: ...

    @overload
    def __getitem__(self, number: slice) -> list[tuple[Tensor, Call]]: ...

    def __getitem__(self, number: int | slice) -> tuple[Tensor, Call] | list[tuple[Tensor, Call]]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        return self.states[number], self.calls[number]


def batch_size(length: int) -> int:
    """Sequences that flow through a block at a time."""
    return max(1, min(FLOW_ROWS, FLOW_TOKENS // length))


@dataclass
class Flow:
    """Calibration text on its way through the blocks: what enters the next, and [block][batch] what else it gets.

    ids: the token ids (B, T) of each batch. tuples: whether this family's blocks return a tuple.
    """

    states: States
    calls: list[list[Call]]
    ids: tuple[Tensor, ...]
    tuples: bool

    def through(self, number: int, module: nn.Module) -> None:
        """Let a block compute: its outputs are what enters the next."""
        for batch in range(len(self.states)):
            self.states[batch] = run_block(module, self.states[batch], self.calls[number][batch])

    @torch.no_grad()
    def to_the_head(self, model: LoadedModel) -> None:
        """Let what follows the blocks (the final norm) compute, with the states in the place of what blocks give."""
        with model.lingering():
            for batch, ids in enumerate(self.ids):
                self.states[batch] = behind(model, model.network.base_model, ids, self.states[batch], self.tuples)[0]


@contextlib.contextmanager
def standing_in(model: LoadedModel, compute: Callable[[int, Args, Kwargs], object]) -> Iterator[list[nn.Module]]:
    """Stand-ins take the blocks' places meanwhile, and compute what a function of number and arguments says.

    Yields the blocks themselves.
    """
    _, modules = blocks(model.network)
    originals = list(modules)
    try:
        for number, module in enumerate(originals):
            modules[number] = StandIn(module, functools.partial(compute, number))
        yield originals
    finally:
        for number, module in enumerate(originals):
            modules[number] = module


def behind(model: LoadedModel, network: nn.Module, ids: Tensor, states: Tensor, tuples: bool) -> Any:
    """What the network, or its body, makes of ids (B, T) where blocks give the states (B, T, hidden).

    tuples: whether blocks return one. Embeddings that are nobody else's are not read.
    """
    with _without_embeddings(model), standing_in(model, lambda number, args, kwargs: (states,) if tuples else states):
        return network(input_ids=ids, use_cache=False)


@contextlib.contextmanager
def _without_embeddings(model: LoadedModel) -> Iterator[None]:
    """Of a streamed model, zeros stand for embeddings meanwhile, unless the head is these."""
    if model.parts is None or model.tied:
        yield
        return
    name, module = embeddings(model.network)
    like = module.get_parameter("weight")

    def compute(args: Args, kwargs: Kwargs) -> Tensor:
        (ids,) = (*args, *kwargs.values())
        assert isinstance(ids, Tensor)
        return torch.zeros(*ids.shape, like.shape[1], dtype=like.dtype, device=ids.device)

    model.network.set_submodule(name, StandIn(module, compute))
    try:
        yield
    finally:
        model.network.set_submodule(name, module)


class StandIn(nn.Module):
    """Takes the place of a block, or of embeddings, while the model's body runs; has the attributes of that."""

    def __init__(self, block: nn.Module, compute: Callable[[Args, Kwargs], object]) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is not part of this module
        self._compute = compute

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._compute(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)


@torch.no_grad()
def capture(model: LoadedModel, batches: tuple[Tensor, ...], folder: Path) -> Flow:
    """What enters the first block for each batch (B, T) of token ids, and every block's other arguments.

    Arguments that are equal from batch to batch, or from block to block, are kept once. The head gets none. What
    follows the blocks does not compute.
    """
    _, modules = blocks(model.network)
    hidden = States(batches, folder / "states")
    calls: list[list[Call]] = [[] for _ in modules]
    tuples: list[bool] = []  # seen once, from the first block

    def note(number: int, args: Args, kwargs: Kwargs) -> object:
        states, rest, others = _split(args, kwargs)
        call = Call(rest, others)
        known = calls[number][0] if calls[number] else (calls[number - 1][0] if number else None)
        calls[number].append(known if known is not None and _same(known, call) else call)
        if number == 0:
            hidden[len(calls[0]) - 1] = states.clone()
        if not tuples:
            modules[0], stand_in = originals[0], modules[0]  # in its place, where its weights will be looked for
            tuples.append(isinstance(modules[0](states, *rest, **others), tuple))
            modules[0] = stand_in
        if number == len(modules) - 1:
            raise _LastReached
        return (states,) if tuples[0] else states

    def run(batch: Tensor) -> None:
        with contextlib.suppress(_LastReached):
            model.network.base_model(input_ids=batch, use_cache=False)

    with standing_in(model, note) as originals:
        run(batches[0])  # a block computes here, alone in memory
        with model.lingering():
            for batch in batches[1:]:
                run(batch)
    of_head = [Call((), {})] * len(batches)
    return Flow(hidden, [*calls, of_head], batches, tuples[0])


class _LastReached(Exception):
    """The last block was reached."""


def _split(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Tensor, tuple[object, ...], dict[str, object]]:
    """Hidden states apart from the other arguments; they come first or by name."""
    if args:
        states, rest, others = args[0], args[1:], kwargs
    else:
        others = dict(kwargs)
        states, rest = others.pop("hidden_states"), ()
    assert isinstance(states, Tensor)
    return states, rest, {key: value for key, value in others.items() if "past_key_value" not in key and key != "cache"}


def _same(a: object, b: object) -> bool:
    """Equal in structure and values, tensors included."""
    if isinstance(a, Call) and isinstance(b, Call):
        return _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


@torch.no_grad()
def run_block(module: nn.Module, states: Tensor, call: Call) -> Tensor:
    """The hidden states after the block."""
    result = module(states, *call.args, **call.kwargs)
    output = result[0] if isinstance(result, tuple) else result
    assert isinstance(output, Tensor)
    return output
