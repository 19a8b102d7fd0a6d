"""How much each neuron, attention unit and channel of a model matters, by activation or by first-order Taylor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional

from engine import anatomy, influence, scores, training
from engine.anatomy import Anatomy, Axis
from engine.calibration import token_rows
from engine.flow import capture
from engine.methods import Context
from engine.models import LoadedModel, blocks

By = Literal["activation", "taylor"]
VERSION = 1  # of what is kept; raise it when the measuring changes


@dataclass(frozen=True)
class Importance:
    """A score for each unit: neurons and heads by block, channels for the model; empty along an axis that is fixed."""

    neurons: list[list[float]]
    heads: list[list[float]]
    channels: list[float]

    def of(self, axis: Axis) -> list[list[float]]:
        """The scores along an axis, by block or for the model in a list of one."""
        return {"neurons": self.neurons, "heads": self.heads, "channels": [self.channels]}[axis]


class Sums:
    """Sums by unit, in float64: one row for each block, one for the model along channels."""

    def __init__(self, body: Anatomy, device: torch.device) -> None:
        self.body = body
        self._of = {
            axis: torch.zeros(
                1 if axis == "channels" else body.blocks, body.size(axis), dtype=torch.float64, device=device
            )
            for axis in anatomy.AXES
            if axis not in body.fixed
        }

    def add(self, axis: Axis, block: int | None, units: Tensor, values: Tensor) -> None:
        """Add `values` (places,) to the units that stand at those places."""
        if axis in self._of:
            units = units.to(values.device)
            own = units >= 0
            row = 0 if axis == "channels" else block
            assert row is not None
            self._of[axis][row].index_add_(0, units[own], values[own].double())

    def add_squares_of(self, other: Sums) -> None:
        """Add the square of each sum of `other`."""
        for axis, sums in other._of.items():
            self._of[axis] += sums.square()

    def roots(self, count: int = 1) -> Importance:
        """The root of each sum over `count`."""
        found = {axis: (sums / count).sqrt().tolist() for axis, sums in self._of.items()}
        return Importance(found.get("neurons", []), found.get("heads", []), (found.get("channels") or [[]])[0])


def by_activation(model: LoadedModel, rows: Tensor, context: Context) -> Importance:
    """L2 norms over the tokens of rows (count, length): what neurons and heads give, and norms in each channel.

    Neurons and heads at the inputs of the linear that leads back to the channels, a unit's heads together; channels at
    the outputs of all norms (Muralidharan et al., 2024).
    """
    sums = Sums(anatomy.of(model.network.config), model.device)
    prefix, modules = blocks(model.network)
    beside = [name for name, _ in model.network.named_modules() if block_of(name, prefix) is None]
    with _watching(model, sums, beside) as before:
        flow = capture(model, influence.batches(rows), context.folder)
    for number, module in enumerate(modules):
        context.check_cancelled()
        block = f"{prefix}.{number}"
        with model.opened(block), _watching(model, sums, [name for name, _ in module.named_modules(prefix=block)]):
            if number + 1 < len(modules):
                model.prefetch(f"{prefix}.{number + 1}")
            flow.through(number, module)
        context.progress(number + 1, len(modules), "blocks")
    with _watching(model, sums, [name for name in beside if name not in before]):
        flow.to_the_head(model)
    flow.states.close()
    return sums.roots()


@contextlib.contextmanager
def _watching(model: LoadedModel, sums: Sums, names: Sequence[str]) -> Iterator[set[str]]:
    """Of these modules, linears that lead back to the channels and norms over them add what they see to the sums.

    Yields the names of those that have computed.
    """
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        for name in names:
            if (hook := _watch(model, sums, name, seen)) is not None:
                stack.callback(hook.remove)
        yield seen


def _watch(
    model: LoadedModel, sums: Sums, name: str, seen: set[str]
) -> torch.utils.hooks.RemovableHandle | None:  # fmt: skip
    module, body = model.network.get_submodule(name), sums.body
    weight, block = module._parameters.get("weight"), block_of(name, blocks(model.network)[0])
    if weight is None:
        return None
    entries = anatomy.units(body, f"{name}.weight", tuple(weight.shape))

    def see(axis: Axis, units: Tensor, values: Tensor) -> None:
        seen.add(name)
        sums.add(axis, block, units, values.flatten(0, -2).float().square().sum(0))

    if anatomy.ends(name, anatomy.ATTENTION_OUT + anatomy.NARROWING):
        entry = next((entry for entry in entries if entry is not None and entry[0] != "channels"), None)
        if entry is None:  # an expert's, which stays as it is
            return None
        axis, units = entry
        return module.register_forward_pre_hook(lambda _, args: see(axis, units, args[0]))
    if anatomy.is_norm(f"{name}.weight", tuple(weight.shape)) and entries[0] is not None:
        of_norm = entries[0][1]
        return module.register_forward_hook(lambda _, args, out: see("channels", of_norm, out))
    return None


def block_of(name: str, prefix: str) -> int | None:
    """The number of the block that a module or tensor is in."""
    return int(name.removeprefix(f"{prefix}.").split(".")[0]) if name.startswith(f"{prefix}.") else None


def by_taylor(model: LoadedModel, rows: Tensor, context: Context) -> Importance:
    """|sum of w dL/dw| over all weights of a unit: what the loss changes, to first order, per share they are scaled by.

    The loss is the mean over the tokens of a batch; its gradients are float32. Several batches give the root of the
    mean of squares, for in the sum over a text that the model was trained on the gradients cancel (Molchanov et al.,
    2019).
    """
    body = anatomy.of(model.network.config)
    total = Sums(body, model.device)
    prefix, _ = blocks(model.network)
    parts = influence.batches(rows)
    with _in_float32(model.network):
        for number, ids in enumerate(parts):
            context.check_cancelled()
            logits = model.network(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            total.add_squares_of(_products(model.network, body, prefix))
            model.network.zero_grad(set_to_none=True)
            context.progress(number + 1, len(parts), "batches")
    return total.roots(len(parts))


@torch.no_grad()
def _products(network: nn.Module, body: Anatomy, prefix: str) -> Sums:
    """w dL/dw summed over the weights of each unit."""
    sums = Sums(body, next(network.parameters()).device)
    for name, weight in network.named_parameters():
        if weight.grad is None:  # an expert that no token reached
            continue
        product = weight * weight.grad
        for dim, entry in enumerate(anatomy.units(body, name, tuple(weight.shape))):
            if entry is not None:
                others = [other for other in range(weight.dim()) if other != dim]
                sums.add(entry[0], block_of(name, prefix), entry[1], product.sum(others) if others else product)
    return sums


@contextlib.contextmanager
def _in_float32(network: nn.Module) -> Iterator[None]:
    """Parameters in float32 with gradients meanwhile; back in their dtype afterwards, which loses nothing."""
    dtype = next(network.parameters()).dtype
    training.cast(network.parameters(), torch.float32)
    network.requires_grad_(True)
    # Torch gives the padding token no gradient; here it may be the one that ends documents.
    padded = {module: module.padding_idx for module in network.modules() if isinstance(module, nn.Embedding)}
    for module in padded:
        module.padding_idx = None
    try:
        with torch.enable_grad():
            yield
    finally:
        network.zero_grad(set_to_none=True)
        network.requires_grad_(False)
        training.cast(network.parameters(), dtype)
        for module, padding in padded.items():
            module.padding_idx = padding


MEASURES: dict[By, Callable[[LoadedModel, Tensor, Context], Importance]] = {
    "activation": by_activation,
    "taylor": by_taylor,
}


def measure(model: LoadedModel, by: By, samples: int, length: int, context: Context) -> Importance:
    """The importance of everything by so many calibration sequences of `length` tokens; later steps find it kept."""
    about: dict[str, JsonValue] = {"version": VERSION, "samples": samples, "sequence_length": length}

    def look(_: scores.Pieces) -> JsonValue:
        rows = token_rows(model.tokenizer, context.calibration, length, samples)
        context.log(f"calibrating on {rows.shape[0]} sequences of {rows.shape[1]} tokens")
        return asdict(MEASURES[by](model, rows.to(model.device), context))

    found = scores.measured(model, context, f"width by {by}", about, look)
    return Importance(**cast(dict[str, Any], found))


def largest(values: list[float], count: int) -> list[int]:
    """The places of the `count` largest values, in order; of equal ones the first."""
    order = torch.argsort(torch.tensor(values, dtype=torch.float64), descending=True, stable=True)
    return sorted(order[:count].tolist())
