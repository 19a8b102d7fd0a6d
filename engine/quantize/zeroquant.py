"""Weights in groups, 8-bit activations for each token, and where asked for each block taught by its original.

ZeroQuant (Yao et al., 2022, "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale
Transformers", arXiv 2206.01861). Fine grains make simple rounding good enough: a scale for each group of weights, and
for each token's inputs a scale found as it comes. Where bits are few, *layer-by-layer knowledge distillation* helps
(`distill_steps`, none unless asked for): one block at a time, the weights are trained so that the rounded block gives
what the original block gives for the same inputs, those that the rounded blocks before it leave,

    min |block(x; Q(W)) - block(x; W0)|²

with the gradient passed straight through the rounding, of inputs too. Only one block's weights, gradients and moments
are in memory, and no labels are needed, only the calibration text; what the original gave stands in files where it is
much. A block keeps its weights where training did not help.

Products of grouped weights with 8-bit inputs have no kernel of their own here: the inputs are rounded, then the kernels
of packed weights compute. With one scale a row or matrix, symmetric weights of 5 to 8 bits multiply as integers, as
SmoothQuant's do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from engine import sizes
from engine.flow import Batches, States, batch_size
from engine.headers import Shape
from engine.methods import Calibrated, Context
from engine.models import LoadedModel
from engine.observing import Block
from engine.orientation import turned
from engine.packing import InputGrid
from engine.quantize._grid import Bits, GridParams, round_to_nearest
from engine.quantize._place import place, walk
from engine.quantize.smoothquant import with_inputs

TITLE = "ZeroQuant"
CHANGES = ("disk", "memory", "latency")
INPUTS = InputGrid()
LEARNED, ROUNDED = 1200.0, 600.0  # operations that take as long as a weight's step of Adam with rounding; as rounding


class Params(GridParams, Calibrated):
    """Settings of ZeroQuant: the grid, the calibration and the distillation."""

    bits: Bits = Field(8, description="Bits of each integer code.")
    distill_steps: int = Field(0, ge=0, le=100_000, description="Optimizer steps for each block; 0: rounding alone.")
    learning_rate: float = Field(1e-4, gt=0.0, le=1.0, description="Of the distillation (Adam).")

    def rounds_inputs(self) -> bool:
        return True

    def work(self, shape: Shape) -> float:
        """The distillation: a batch forward and back in each step; before and after them all text thrice."""
        if not self.distill_steps:
            return super().work(shape)
        together, heads = batch_size(self.sequence_length), sizes.head_of(shape)
        weights = sum(size[0] * size[1] for name, size in sizes.chosen(shape, self).items() if name not in heads)
        tokens = min(self.samples, together) * self.sequence_length
        learning = self.distill_steps * (6.0 * tokens + LEARNED)
        judging = 6.0 * self.samples * self.sequence_length + 2 * math.ceil(self.samples / together) * ROUNDED
        return super().work(shape) + weights * (learning + judging)

    def unfit_for_experts(self) -> str:
        return "files cannot say that the inputs of experts are rounded."


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Distill each block where that was asked for, then round its weights and, from then on, their inputs."""
    for block in walk(model, context, params, "norm"):
        if params.distill_steps and not isinstance(block.module, nn.Linear):  # the head makes up for nothing
            before, after = distill(block, params, context)
            context.log(f"{block.name}: distance to the original {before:.4g} before, {after:.4g} after distillation")
        for linear in block.linears:
            context.check_cancelled()
            rounded = round_to_nearest(linear.weight, params, linear.name, linear.weight.dtype)
            place(model, linear, with_inputs(rounded, INPUTS), context, "" if linear.tokens else "no token reached it")
    return model


def distill(block: Block, params: Params, context: Context) -> tuple[float, float]:
    """Train the block's weights in place; the relative squared distance to its original before and after."""
    assert isinstance(block.batches, Batches)
    student, targets = _Student(block, params), block.batches.states.like("targets")
    try:
        for number in range(len(targets)):
            targets[number] = student.original(number)
        before = student.distance(targets)
        optimizer = torch.optim.Adam(student.weights.values(), lr=params.learning_rate)
        for step in range(params.distill_steps):
            context.check_cancelled()
            number = step % len(targets)
            with torch.enable_grad():
                loss = student.loss(number, targets[number])
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            context.sample("loss", float(loss.detach()), "1")
        after = student.distance(targets)
    finally:
        targets.close()
    if after < before:
        student.keep()
    return before, min(before, after)


class _Student:
    """The block with float32 weights that learn, rounded whenever they are used."""

    def __init__(self, block: Block, params: Params) -> None:
        self._block, self._params = block, params
        self.weights = {linear.name: linear.weight.float().clone().requires_grad_() for linear in block.linears}

    def original(self, number: int) -> Tensor:
        """What the block gives for a batch with the weights that it has."""
        with torch.no_grad():
            return self._run(number, {})

    def loss(self, number: int, target: Tensor) -> Tensor:
        """The relative squared distance on one batch."""
        rounded: dict[str, Tensor] = {}
        for linear in self._block.linears:
            weight = self.weights[linear.name]
            nearest = round_to_nearest(weight.detach(), self._params, linear.name, linear.weight.dtype).dequantize()
            straight = weight + (nearest.float() - weight).detach()
            path = linear.name.removeprefix(f"{self._block.name}.")
            rounded[f"{path}.weight"] = turned(linear.module, straight).to(linear.weight.dtype)
        handles = [linear.module.register_forward_pre_hook(_round_straight) for linear in self._block.linears]
        try:
            output = self._run(number, rounded).float()
        finally:
            for handle in handles:
                handle.remove()
        residual = target.float() - self._block.batches[number][0].float()
        return (output - target.float()).square().mean() / residual.square().mean().clamp(min=1e-12)

    def distance(self, targets: States) -> float:
        """The mean loss over all batches."""
        count = len(targets)
        with torch.no_grad():
            return sum(float(self.loss(number, targets[number])) for number in range(count)) / count

    def keep(self) -> None:
        """Give the block the weights that were learned."""
        for linear in self._block.linears:
            linear.weight.copy_(self.weights[linear.name].detach())

    def _run(self, number: int, weights: Mapping[str, Tensor]) -> Tensor:
        states, call = self._block.batches[number]
        result = functional_call(self._block.module, dict(weights), (states, *call.args), call.kwargs)
        output = result[0] if isinstance(result, tuple) else result
        assert isinstance(output, Tensor)
        return output


def _round_straight(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs rounded to 8 bits, with the gradient passed straight through."""
    x = args[0]
    return (x + (INPUTS.fake(x) - x).detach(), *args[1:])
