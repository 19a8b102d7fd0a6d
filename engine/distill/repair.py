"""Heal the model that earlier steps pruned or quantized: train it to predict as the original does.

Logit distillation of the model as it is, from the original, with three choices of what may change:

- `all`: every weight; zeros of pruned linears stay zero.
- `lora`: for each linear of the blocks a product of two thin matrices is learned beside it, W + B A (LoRA, Hu et al.,
  2021, arXiv 2106.09685), and merged at the end, masked where zeros must stay.
- `norms and scales`: the weights of norms, all biases but the head's, and of quantized linears in the blocks the
  scales.

`all` heals most and holds an optimizer state for everything; `lora` trains and keeps about a hundredth of it. `norms
and scales` may follow quantization, for it never touches an integer code: w = (code - zero) * scale, where the
gradient goes to the scale, and rounding it to its stored dtype is passed over (straight-through, Bengio et al., 2013,
arXiv 1308.3432). Inputs that are rounded are passed over likewise. Files hold the same codes with new scales.

The adapters are written here: `peft` would be one more package for these few lines. Needs training text.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine import wide
from engine.distill._settings import CacheParams
from engine.distill._teachers import teachers_of
from engine.lesson import Lesson, TrainingParams, read
from engine.methods import Context
from engine.models import Linear, LoadedModel, blocks, linears
from engine.packing import QuantizedWeight
from engine.preflight import calibration_file
from engine.teachers import shared_vocabulary

TITLE = "Self-repair"
CHANGES = ()
WHOLE = True
Scope = Literal["all", "lora", "norms and scales"]


class Params(TrainingParams, CacheParams):
    """Settings of what may change, the loss and the training."""

    scope: Scope = Field("all", description="What may change: every weight, low-rank additions, or norms and scales.")
    rank: int = Field(8, ge=1, le=512, description="With scope `lora`: rank of what is added to each linear.")
    label_weight: float = Field(0.0, ge=0.0, le=1.0, description="Weight of the true labels beside the teacher.")
    steps: int = Field(100, ge=1, le=1_000_000, description="Optimizer steps.")

    def usual_rate(self, parameters: int) -> float:
        """Ten times as high where little is trained, as is usual for LoRA."""
        return super().usual_rate(parameters) if self.scope == "all" else super().usual_rate(parameters // 100)

    def heals(self) -> bool:
        """Where nobody else teaches the model."""
        return not self.teachers

    def processes(self) -> int:
        """Each needs a row of the batch; what is learned beside the network is not in shards."""
        return self.batch if self.scope == "all" else 1

    def keeps_codes(self) -> bool:
        """Norms and scales leave codes as they are."""
        return self.scope == "norms and scales"


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Train what may change, and put it in its place."""
    model.load_all()
    folders = params.folders(model.source)
    text = read(model, params, calibration_file(params.text))
    shared = shared_vocabulary(folders, model.network.config.get_text_config().vocab_size)
    teacher, judge = teachers_of(text, folders, model, params, context, shared)
    torch.manual_seed(context.seed)
    added: Mapping[str, Added] = {}
    trainable: list[str] | None = None
    if params.scope == "lora":
        added, trainable = adapters(model, params.rank), []
    elif params.scope == "norms and scales":
        added, trainable = {**scales(model), **shifts(model)}, []
    beside = {f"{name}:{key}": value for name, each in added.items() for key, value in each.named_parameters()}
    trained = sum(value.numel() for value in beside.values())
    kept = dict(model.network.named_parameters())
    trained += sum(kept[name].numel() for name in (kept if trainable is None else trainable))
    context.log(f"{trained:,} of {model.network.num_parameters():,} parameters are trained")
    for each in added.values():
        each.attach()
    try:
        lesson = Lesson(model, text, params.objective, teacher, judge)
        lesson.teach(params, context, beside=beside, trainable=trainable)
    finally:
        for each in added.values():
            each.detach()
    with torch.no_grad():
        for name, each in added.items():
            each.merge(model, name)
    return model


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
        out, into = matrix(linear).shape
        rank = min(rank, out, into)
        device = linear.weight.device
        self.down = nn.Parameter(torch.randn(rank, into, device=device) / math.sqrt(into))
        self.up = nn.Parameter(torch.zeros(out, rank, device=device))
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
        dtype = self._weight.scale.dtype
        return self.scale().detach().clamp_min(float(torch.finfo(dtype).tiny)).to(dtype)

    def weight(self) -> Tensor:
        exact = self.scale()
        scale = exact + (self.stored().float() - exact).detach()
        rows, columns = self._weight.codes.shape
        if self._weight.kind == "float":
            return self._weight.codes.view(torch.float8_e4m3fn).float() * scale
        grouped = self._weight.codes.view(rows, scale.shape[1], -1).float()  # (N, G, group_size)
        return ((grouped - self._weight.zero.float().unsqueeze(-1)) * scale.unsqueeze(-1)).view(rows, columns)

    def merge(self, model: LoadedModel, name: str) -> None:
        model.quantized[name] = replace(self._weight, scale=self.stored())
        matrix(self.linear).copy_(model.quantized[name].dequantize())


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
    return linear.weight.data.t() if isinstance(linear, Conv1D) else linear.weight.data


def adapters(model: LoadedModel, rank: int) -> dict[str, Added]:
    """One for each linear of the blocks, by its name."""
    prefix, modules = blocks(model.network)
    found: dict[str, Added] = {}
    for number, block in enumerate(modules):
        for path, linear in linears(block):
            name = f"{prefix}.{number}.{path}"
            found[name] = Adapter(linear, rank, matrix(linear) != 0 if name in model.pruned else None)
    return found


def scales(model: LoadedModel) -> dict[str, Added]:
    """One for each quantized linear of the blocks, by its name; head and embeddings keep theirs."""
    found: dict[str, Added] = {}
    prefix, _ = blocks(model.network)
    for name, weight in sorted(model.quantized.items()):
        module = model.network.get_submodule(name)
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(f"{prefix}."):
            found[name] = Scales(module, weight.to(model.device))
    return found


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
