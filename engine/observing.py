"""The linears of a block, and what calibration notes of their inputs: norms, largest numbers, second moments."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from engine.experts import Experts
from engine.fit import STRETCH
from engine.flow import Call, run_block
from engine.models import Linear
from engine.orientation import rows_and_columns, turned
from engine.runtime.native.moments import add_second_moments
from engine.wide import is_plain

Collect = Literal["nothing", "norm", "hessian", "directions"]
Listeners = Literal["routed", "all"]  # to which tokens an expert listens
SAMPLE = 64  # tokens
TOKENS = 256  # that are squared at once
STRIP = 512  # rows of a Hessian that are computed at once


@dataclass
class BlockLinear:
    """A linear of the block at hand, and what calibration saw at its input.

    weight: (out_features, in_features), also for GPT-2's transposed `Conv1D`; changes to it in place
        change the model.
    hessian: float32 (in, in), mean of 2 x xᵀ over the tokens, where it was asked for; what lies below its diagonal is
        to be overlooked until `mirror` completes it.
    input_norm: float32 (in,), the L2 norm of each input over the tokens, where it was asked for.
    input_max: float32 (in,), the largest magnitude of each input over the tokens, with the norm.
    sample: float32 (at most SAMPLE, in), some of the inputs.
    """

    name: str
    module: Linear | nn.Embedding
    tokens: int = 0
    hessian: Tensor | None = None
    input_norm: Tensor | None = None
    input_max: Tensor | None = None
    sample: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight.data
        return turned(self.module, weight)

    def put_aside(self) -> bool:
        """Free the weight's memory, until `bring_back`, where it is a linear's own; says whether it was."""
        weight = self.weight
        if not is_plain(self.module) or weight.untyped_storage().nbytes() != weight.nbytes:
            return False
        self.module.weight.data = weight.new_empty(0)
        return True

    def bring_back(self, weight: Tensor) -> None:
        """The weight that was put aside."""
        self.module.weight.data = weight


@dataclass
class Block:
    """One decoder block with its linears; `number` counts from 0. `batches` enter it, where text was asked for.

    The output head comes after the last block, as a block that is a linear itself.
    """

    number: int
    name: str
    module: nn.Module
    linears: list[BlockLinear]
    batches: Sequence[tuple[Tensor, Call]] = ()


class Accumulator:
    """Gathers second moments of a linear's inputs, in float32, one batch after another."""

    def __init__(self, linear: BlockLinear, collect: Collect) -> None:
        self.linear, self.collect = linear, collect

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].detach().reshape(-1, args[0].shape[-1])  # (tokens, in)
        linear = self.linear
        if linear.sample is None:
            linear.sample = inputs[:: max(1, inputs.shape[0] // SAMPLE)][:SAMPLE].float().clone()
        if self.collect == "norm":
            largest = torch.maximum(inputs.amax(0), -inputs.amin(0)).float()
            linear.input_max = largest if linear.input_max is None else torch.maximum(linear.input_max, largest)
            squares = [some.float().square().sum(0) for some in torch.split(inputs, TOKENS)]
            norm = torch.stack(squares).sum(0).sqrt()
            linear.input_norm = norm if linear.input_norm is None else torch.hypot(linear.input_norm, norm)
        else:
            if linear.hessian is None:
                linear.hessian = make_empty_hessian(inputs.shape[1], inputs.device)
            lengths = None
            if self.collect == "directions":
                lengths = torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32).clamp_min_(1e-12)
            accumulate_hessian(linear.hessian, linear.tokens, inputs, lengths)
        linear.tokens += inputs.shape[0]


def stretches(weight: Tensor, most: int = STRETCH) -> Iterator[slice]:
    """The rows of a weight (N, K) in stretches of `most` weights, for work that needs room for copies."""
    step = max(1, most // weight.shape[1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def make_empty_hessian(size: int, device: torch.device) -> Tensor:
    """Zeros (size, size) in float32; in main memory such that what is never written takes none."""
    if device.type != "cpu" or not size:
        return torch.zeros(size, size, device=device)
    pages = mmap.mmap(-1, 4 * size * size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # in a large page there is always something written
    return torch.frombuffer(pages, dtype=torch.float32).view(size, size)


def accumulate_hessian(hessian: Tensor, seen: int, inputs: Tensor, lengths: Tensor | None = None) -> None:
    """Make `hessian` the mean of 2 x xᵀ after `inputs` (tokens, in), given that over the `seen` tokens before.

    Each input is divided by its one of the `lengths` (tokens,). What is computed lies from the diagonal to the right,
    which is half the work and half the memory; `mirror` completes it. Our own kernel does it where it can; elsewhere
    float32 products do, strip by strip.
    """
    total, size = seen + inputs.shape[0], hessian.shape[0]
    if add_second_moments(hessian, inputs, lengths, keep=seen / total, weight=2 / total):
        return
    inputs = inputs.float() if lengths is None else inputs / lengths[:, None]
    for start in range(0, size, STRIP):
        strip = hessian[start : start + STRIP, start:]
        strip.mul_(seen / total).addmm_(inputs[:, start : start + STRIP].t(), inputs[:, start:], alpha=2 / total)


def mirror(matrix: Tensor) -> None:
    """Give a square matrix (K, K) below its diagonal what it has above."""
    for start in range(0, matrix.shape[0], STRIP):
        stop = min(start + STRIP, matrix.shape[0])
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).t())
        matrix[stop:, start:stop] = matrix[start:stop, stop:].t()


def observe(block: Block, collect: Collect, experts: Listeners = "routed") -> None:
    """Run the block over all its inputs and fill its linears' statistics.

    Linears that read the same tensor (q, k and v; gate and up; those of all experts, where these read all tokens) share
    one set of statistics: which do, the first batch shows. What the last one gives would reach no other, so from then
    on it gives zeros, which saves its product; if it is an expert's, so do those of the other experts.
    """
    if not block.linears:
        return
    with contextlib.ExitStack() as stack:
        for module in block.module.modules() if experts == "all" else ():
            if isinstance(module, Experts):
                stack.enter_context(module.reading_all())
        groups = _observe_first(block, collect)
        for group in groups:
            hook = group[0].module.register_forward_pre_hook(Accumulator(group[0], collect))
            stack.callback(hook.remove)
        if len(groups[-1]) == 1 and all(group[0].tokens for group in groups):  # else a later one may be reached yet
            for module in _unheard(block, groups[-1][0].module):
                stack.enter_context(_giving_zeros(module))
        for number in range(1, len(block.batches)):
            run_block(block.module, *block.batches[number])
    for first, *others in groups:
        for other in others:
            other.hessian, other.input_norm, other.tokens = first.hessian, first.input_norm, first.tokens
            other.input_max, other.sample = first.input_max, first.sample


def _unheard(block: Block, last: nn.Module) -> list[nn.Module]:
    """The linears that give to nobody: the last one of a block, and those whose outputs are summed with its."""
    mixtures = [module.writers for module in block.module.modules() if isinstance(module, Experts)]
    return next((writers for writers in mixtures if last in writers), [last])


@contextlib.contextmanager
def _giving_zeros(linear: nn.Module) -> Iterator[None]:
    """Meanwhile the linear's output is zero, and costs nothing; its hooks are called as ever."""
    outputs, _ = rows_and_columns(linear)
    linear.forward = lambda inputs: inputs.new_zeros(*inputs.shape[:-1], outputs)
    try:
        yield
    finally:
        del linear.forward


def _observe_first(block: Block, collect: Collect) -> list[list[BlockLinear]]:
    """Observe the first batch; the block's linears in the order of their calls, those together that read one tensor.

    The first of those that stand together has the statistics. Linears that this batch did not reach (experts) come
    first.
    """
    groups: list[tuple[weakref.ref[Tensor], list[BlockLinear]]] = []  # an id alone may be used twice

    def note(linear: BlockLinear, inputs: Tensor) -> None:
        known = next((group for tensor, group in groups if tensor() is inputs), None)
        if known is not None:
            known.append(linear)
            return
        groups.append((weakref.ref(inputs), [linear]))
        Accumulator(linear, collect)(linear.module, (inputs,))

    with contextlib.ExitStack() as stack:
        for linear in block.linears:
            hook = linear.module.register_forward_pre_hook(lambda _, args, linear=linear: note(linear, args[0]))
            stack.callback(hook.remove)
        run_block(block.module, *block.batches[0])
    reached = {linear.name for _, group in groups for linear in group}
    return [[linear] for linear in block.linears if linear.name not in reached] + [group for _, group in groups]
