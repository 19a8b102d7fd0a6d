"""What repair learns beside a network, and how it becomes part of it.

`Adapter` is a product of two thin matrices that is added to a dense weight. Weights on a grid stay on it:

    w = (codes - zero) * scale,   codes = round(v / scale) + zero within 0 .. 2^bits - 1

`Scales` learns the scale alone and keeps every code; `Codes` learns v, which the codes are made of in every product
anew, and the scale with it. Rounding passes gradients as if it were not there (straight-through, Bengio et al., 2013,
arXiv 1308.3432), so the scale's are those of LSQ (Esser et al., 2020, arXiv 1902.08153). What is stored is what was
computed with. `Shift` is for vectors: norms and biases.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine import wide
from engine.models import Linear, LoadedModel, blocks, linears
from engine.orientation import turned
from engine.packing import LARGEST_FLOAT8, QuantizedWeight

# Of the grid that a number of B moves weights by. On the demo model in 3 bits by RTN, 100 steps of healing lead from KL
# .053 to .027; numbers as for dense weights lead to .034, and 12 steps to .030.
STEPS = 4.0


class Added(nn.Module, ABC):
    """Something that is learned beside the network and made part of it at the end."""

    @abstractmethod
    def attach(self) -> None:
        """Let the network compute with it."""

    @abstractmethod
    def detach(self) -> None:
        """Let the network compute as it did."""

    @abstractmethod
    def merge(self, model: LoadedModel, name: str) -> None:
        """Make what was learned part of the model."""


class InsteadOfWeight(Added):
    """A weight that a linear computes with in the place of its own.

    It is made for each product, forward and backward, so that never those of two linears exist at once.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = [linear]  # in a list, so that it is not part of this module

    @property
    def linear(self) -> Linear:
        return self._linear[0]

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight (out, in) to compute with."""

    def product(self, x: Tensor) -> Tensor:
        """The linear's output (..., N) for x (..., K), without its bias."""
        y: Tensor = _MadeAgain.apply(x, self.weight, *self.parameters())  # type: ignore[no-untyped-call]
        return y

    def attach(self) -> None:
        def forward(x: Tensor) -> Tensor:
            y = self.product(x)
            return y if self.linear.bias is None else y + self.linear.bias.to(y.dtype)

        self.linear.forward = forward  # type: ignore[method-assign]

    def detach(self) -> None:
        del self.linear.forward


class _MadeAgain(torch.autograd.Function):
    """x (..., K) times a weight (N, K) that `make` makes of the parameters, again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[], Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.make, ctx.trained = make, parameters
        ctx.save_for_backward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight = make()
        return wide.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_y = gradients[0].flatten(0, -2)
        with torch.enable_grad():
            weight = ctx.make()
        of_weight = wide.linear(of_y.t(), x.flatten(0, -2).t().to(of_y.dtype)).to(weight.dtype)
        of_parameters = torch.autograd.grad(weight, ctx.trained, of_weight)
        of_x = wide.linear(of_y, weight.detach().t().to(of_y.dtype)).to(x.dtype).view(x.shape)
        return of_x if ctx.needs_input_grad[0] else None, None, *of_parameters


class Adapter(InsteadOfWeight):
    """W + B A with A (rank, in) at random and B (out, rank) zero at first; where `mask` is given, only there.

    Without a mask x Aᵀ Bᵀ is added to x Wᵀ, and no product is as large as the weight.
    """

    def __init__(self, linear: Linear, rank: int, mask: Tensor | None) -> None:
        super().__init__(linear)
        self.down, self.up = thin(linear, rank)
        self._mask = mask

    def weight(self) -> Tensor:
        product = self.up @ self.down
        return matrix(self.linear) + (product if self._mask is None else product * self._mask)

    def product(self, x: Tensor) -> Tensor:
        if self._mask is not None:
            return super().product(x)
        thin = wide.linear(x, self.down.to(x.dtype))
        return wide.linear(x, matrix(self.linear)) + wide.linear(thin, self.up.to(thin.dtype))

    def merge(self, model: LoadedModel, name: str) -> None:
        matrix(self.linear).copy_(self.weight())


class Scales(InsteadOfWeight):
    """(codes - zero) * scale with the scale (N, G) learned, rounded to its dtype as it will be stored.

    What is learned is the relative change, so that a step means as much for small scales as for large ones.
    """

    def __init__(self, linear: Linear, weight: QuantizedWeight) -> None:
        super().__init__(linear)
        self._weight = weight
        self.change = nn.Parameter(torch.zeros(weight.scale.shape, device=weight.scale.device))

    def scale(self) -> Tensor:
        """In float32."""
        return self._weight.scale.float() * (1 + self.change)

    def stored(self) -> Tensor:
        """The scale as a file holds it, never zero or of another sign."""
        about = torch.finfo(self._weight.scale.dtype)
        smallest = about.tiny * about.eps  # that the dtype holds: scales of small weights in float16 are below `tiny`
        return self.scale().detach().clamp_min(smallest).to(self._weight.scale.dtype)

    def steps(self, scale: Tensor) -> Tensor:
        """Codes less their zero (N, G, group_size), or the 8-bit floats, in float32, for a scale (N, G)."""
        return self.given()

    def given(self) -> Tensor:
        """As `steps`, of the codes that were there."""
        codes = self._weight.codes
        if self._weight.kind == "float":
            return self._grouped(codes.view(torch.float8_e4m3fn).float())
        return self._grouped(codes.float()) - self._weight.zero.float().unsqueeze(-1)

    def weight(self) -> Tensor:
        exact = self.scale()
        scale = exact + (self.stored().float() - exact).detach()
        return self._of(self.steps(scale), scale)

    def merge(self, model: LoadedModel, name: str) -> None:
        model.quantized[name] = self.quantized()
        matrix(self.linear).copy_(model.quantized[name].dequantize())

    def quantized(self) -> QuantizedWeight:
        """The weight with what was learned."""
        return replace(self._weight, scale=self.stored())

    def _grouped(self, weight: Tensor) -> Tensor:
        """Of (N, K), the groups that share a scale, (N, G, group_size)."""
        return weight.view(weight.shape[0], self._weight.scale.shape[1], -1)

    def _of(self, steps: Tensor, scale: Tensor) -> Tensor:
        """The weight (N, K) of steps (N, G, group_size) of a scale (N, G)."""
        return (steps * scale.unsqueeze(-1)).view(self._weight.codes.shape)


class Codes(Scales):
    """A weight (N, K) in float32 that learns and is rounded to its grid for each product, and the grid's scale.

    It begins at what the codes stand for exactly; the dense weight is that in bfloat16, which may be nearer to another
    of 256 codes. With `rank` it learns a product of two thin matrices that is added to that, in units of the scale:
    what is far less than a step of the grid changes no code. Where `mask` is given, it is zero elsewhere.
    """

    def __init__(self, linear: Linear, weight: QuantizedWeight, mask: Tensor | None, rank: int = 0) -> None:
        super().__init__(linear, weight)
        self._mask = mask
        self.free: nn.Parameter | None = None
        if rank:
            self.down, self.up = thin(linear, rank, STEPS)
        else:
            self.free = nn.Parameter(self._of(self.given(), weight.scale.float()))

    def exact(self) -> Tensor:
        """The weight before it is rounded."""
        weight = self._moved() if self.free is None else self.free
        return weight if self._mask is None else weight * self._mask

    def _moved(self) -> Tensor:
        """What the codes stood for and the product beside it."""
        return self._of(self.given() + self._grouped(self.up @ self.down), self._weight.scale.float())

    def steps(self, scale: Tensor) -> Tensor:
        steps = self._grouped(self.exact()) / scale.unsqueeze(-1)
        if self._weight.kind == "float":
            within = steps.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8)
            return within + (within.detach().to(torch.float8_e4m3fn).float() - within.detach())
        zero = self._weight.zero.float().unsqueeze(-1)
        within = torch.clamp(steps, -zero, 2**self._weight.bits - 1 - zero)
        return within + (within.detach().round() - within.detach())

    def quantized(self) -> QuantizedWeight:
        stored = self.stored()
        steps = self.steps(stored.float()).detach()
        if self._weight.kind == "float":
            codes = steps.to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            codes = (steps + self._weight.zero.float().unsqueeze(-1)).round().to(torch.uint8)
        return replace(self._weight, codes=codes.view(self._weight.codes.shape), scale=stored)


class Shift(Added):
    """A vector of a module (of a norm, a bias) and what is learned to be added, in units of its own numbers' size."""

    def __init__(self, module: nn.Module, leaf: str) -> None:
        super().__init__()
        self._module, self._leaf = [module], leaf
        own = module.get_parameter(leaf)
        self._own, self._kept = own.detach().float(), own
        size = self._own.abs()
        self._unit = size.clamp_min(max(0.1 * float(size.square().mean().sqrt()), 1e-3))
        self.change = nn.Parameter(torch.zeros_like(self._own))
        self._stop: Callable[[], None] = lambda: None

    def value(self) -> Tensor:
        """The vector, in float32."""
        return self._own + self._unit * self.change

    def attach(self) -> None:
        module, leaf, dtype = self._module[0], self._leaf, self._kept.dtype
        del module._parameters[leaf]

        def before(module: nn.Module, args: tuple[object, ...]) -> None:
            entering = args[0].dtype if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else dtype
            module.__dict__[leaf] = self.value().to(entering)  # a norm wants both of one kind

        self._stop = module.register_forward_pre_hook(before).remove

    def detach(self) -> None:
        self._stop()
        self._module[0].__dict__.pop(self._leaf, None)
        self._module[0]._parameters[self._leaf] = self._kept

    def merge(self, model: LoadedModel, name: str) -> None:
        self._kept.copy_(self.value())


def matrix(linear: Linear) -> Tensor:
    """The weight (out, in), also of GPT-2's transposed `Conv1D`."""
    return turned(linear, linear.weight.data)


def thin(linear: Linear, rank: int, size: float = 0.0) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) at random and B (out, rank), zero, whose product is as large as a linear's weight.

    A's numbers are of that `size`, or such that an input of size 1 gives one of size 1.
    """
    out, into = matrix(linear).shape
    rank = min(rank, out, into)
    device = linear.weight.device
    down = torch.randn(rank, into, device=device) * (size or 1 / math.sqrt(into))
    return nn.Parameter(down), nn.Parameter(torch.zeros(out, rank, device=device))


def adapters(model: LoadedModel, rank: int) -> dict[str, Added]:
    """One for each linear of the blocks, by its name; those on a grid stay on it."""
    prefix, modules = blocks(model.network)
    found: dict[str, Added] = {}
    for number, block in enumerate(modules):
        for path, linear in linears(block):
            name = f"{prefix}.{number}.{path}"
            weight = model.quantized.get(name)
            if weight is None:
                found[name] = Adapter(linear, rank, _kept(model, name, linear))
            else:
                found[name] = Codes(linear, weight.to(model.device), _kept(model, name, linear), rank)
    return found


def codes(model: LoadedModel) -> dict[str, Added]:
    """One for each quantized linear of the blocks, by its name; head and embeddings keep their codes."""
    return {name: Codes(linear, weight, _kept(model, name, linear)) for name, linear, weight in _on_grids(model)}


def scales(model: LoadedModel) -> dict[str, Added]:
    """As `codes`, of their scales alone."""
    return {name: Scales(linear, weight) for name, linear, weight in _on_grids(model)}


def _on_grids(model: LoadedModel) -> Iterator[tuple[str, Linear, QuantizedWeight]]:
    prefix, _ = blocks(model.network)
    for name, weight in sorted(model.quantized.items()):
        module = model.network.get_submodule(name)
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(f"{prefix}."):
            yield name, module, weight.to(model.device)


def _kept(model: LoadedModel, name: str, linear: Linear) -> Tensor | None:
    """Where a linear's weight may be other than zero; None: everywhere."""
    return matrix(linear) != 0 if name in model.pruned else None


def shifts(model: LoadedModel) -> dict[str, Added]:
    """One for each vector among the parameters, by its name: norms' weights and all biases but the head's.

    The loss takes the gradients of the head's own parameters piece by piece, and would not see what stands beside them.
    """
    found: dict[str, Added] = {}
    head = model.network.get_output_embeddings()  # type: ignore[no-untyped-call]
    for name, each in model.network.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = model.network.get_submodule(path)
        if each.dim() == 1 and owner is not head:
            found[name] = Shift(owner, leaf)
    return found
