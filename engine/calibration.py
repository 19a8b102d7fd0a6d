"""Calibration text to batches, and the walk over a model's blocks that every calibrated method takes.

`walk_blocks` runs the blocks one by one: the inputs of block i+1 are the outputs of block i *after* a method changed
it, so that later blocks see, and can make up for, the error of earlier ones (`engine.flow`).

A block that is finished is written to `context.folder` as it will stand in the artifact; a run that resumes reads it
instead.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import weakref
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engine import hardware, headers, shards, sizes
from engine.errors import BadModel, BadParams, short
from engine.experts import Experts
from engine.fields import RARE
from engine.fit import STRETCH
from engine.flow import Batches, Call, Flow, batch_size, capture, run_block
from engine.headers import Shape
from engine.methods import Calibrated, Context, Params, Selection, calibrates
from engine.models import Linear, LoadedModel, blocks, embeddings, head, is_large, linears
from engine.orientation import rows_and_columns, turned
from engine.rows import packed_rows
from engine.runtime.native.moments import add_second_moments
from engine.wide import is_plain

Collect = Literal["nothing", "norm", "hessian", "directions"]
Listeners = Literal["routed", "all"]  # to which tokens an expert listens
SAMPLE = 64  # tokens
TOKENS = 256  # that are squared at once
STRIP = 512  # rows of a Hessian that are computed at once


class Observed(Calibrated):
    """Settings of a method that weighs weights by statistics of each linear's inputs.

    With `all`, each expert of a mixture computes all tokens while the statistics are gathered; its block gives what its
    router makes of it as ever. All gates and ups then read one tensor and share their statistics. That is what other
    tools offer, and no better where it was measured, for experts are then fitted to tokens that they never get: GPTQ of
    two small mixtures, trained on the demo's text, is at a KL of .0044 (routed) and .0053 (all) with 2 bits, .0008 and
    .0009 with 3, where 4 of 32 experts are asked; where 2 of 8 are, .0065 and .0080, .0013 and .0015. With so little
    text (512 tokens) that hardly an expert had enough, the two were equal within their errors. So were, five times of
    eight, routed and all tokens for just those experts that saw few; once that was better, twice worse.
    """

    experts: Annotated[Listeners, RARE] = Field(
        "routed", description="Of a mixture, what calibrates an expert: the tokens that its router sends it, or all."
    )

    def notes(self, shape: Shape, device: str) -> Sequence[str]:
        """What it takes that every expert computes every token."""
        said = super().notes(shape, device)
        if self.experts != "all":
            return said
        count, chosen = headers.experts(shape.config), headers.integer(shape.config.get("num_experts_per_tok"))
        if count < 2 or not chosen:
            return [*said, "The model has no experts: whose tokens calibrate them changes nothing."]
        return [*said, f"Each expert calibrates on {count / chosen:g} times the tokens that it gets on average."]

    def asked(self) -> dict[str, JsonValue]:
        """What determines which tokens the statistics are of, for what is kept of them."""
        found: dict[str, JsonValue] = {"samples": self.samples, "sequence_length": self.sequence_length}
        return found if self.experts == "routed" else found | {"experts": self.experts}


class Moments(Observed):
    """Settings of a scheme that weighs errors by the second moments of each linear's inputs."""

    samples: Annotated[int, RARE] = Field(128, ge=1, le=4096, description="Calibration sequences that are read.")
    equal_tokens: Annotated[bool, RARE] = Field(
        True, description="Every token counts alike, also where activations are huge."
    )

    @property
    def collect(self) -> Collect:
        """What `walk_blocks` is to gather."""
        return "directions" if self.equal_tokens else "hessian"

    def work(self, shape: Shape) -> float:
        """Column by column: each weight is corrected by all columns before it."""
        solving = sum(float(outputs) * inputs * inputs for outputs, inputs in sizes.chosen(shape, self).values())
        return super().work(shape) + solving


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


def token_rows(tokenizer: PreTrainedTokenizerBase, path: Path, length: int, count: int | None = None) -> Tensor:
    """Packed token ids (rows, length) of a text's documents, in order; `count` rows at most.

    Raises:
        BadText: the text is shorter than one row.
    """
    return packed_rows(tokenizer, path, length, count).ids.long()


def check_ids(model: LoadedModel, rows: Tensor) -> None:
    """Refuse a tokenizer that gives tokens for which the model has no embeddings.

    Raises:
        BadModel: one line with both numbers.
    """
    _, module = embeddings(model.network)
    count, highest = module.get_parameter("weight").shape[0], int(rows.max())
    if highest >= count:
        raise BadModel(
            f"{short(model.source.name)} has {count:,} embeddings, and its tokenizer gives the token {highest:,}: the "
            "two are not of one model. Copy the tokenizer from the model it was made of."
        )


def walk_blocks(
    model: LoadedModel, context: Context, params: Params, collect: Collect = "nothing", *, keep_blocks: bool = True,
    known: Container[str] = (), original: bool = False,
) -> Iterator[Block]:  # fmt: skip
    """Yield the model's blocks in order; what the caller changes in one is kept, and seen by the next.

    A block has the linears that `params` selects. With `Calibrated` params, calibration text flows through the
    blocks and each linear comes with what `collect` asks for: `norm`, and the largest; `hessian`; or
    `directions`, a Hessian of inputs scaled to length 1. Finished blocks are stored and, in a resumed run, read back
    and not yielded again; without `keep_blocks` this walk only looks, and the caller changes nothing. Linears that are
    `known`, by name, are left out. With `original` a block sees what the original's gave before it, whatever became of
    them: calibration text has passed a block when it is yielded, without `batches`.
    """
    name, modules = blocks(model.network)
    stations = [Block(number, f"{name}.{number}", module, []) for number, module in enumerate(modules)]
    if params.beyond_blocks()[0]:
        stations.append(Block(len(modules), *head(model.network), []))
    files = [context.folder / f"block-{station.number:04d}.safetensors" for station in stations]
    flow: Flow | None = None
    if calibrates(params) and not (keep_blocks and all(file.exists() for file in files)):  # else text tells nobody
        rows = token_rows(model.tokenizer, context.calibration, params.sequence_length, params.samples)
        check_ids(model, rows)
        context.log(f"calibrating on {rows.shape[0]} sequences of {rows.shape[1]} tokens")
        if len(rows) < params.samples:
            context.log(f"warning: the text is short, it has {len(rows)} of the {params.samples} sequences asked for")
        flow = capture(model, torch.split(rows.to(model.device), batch_size(rows.shape[1])), context.folder)
    _say_what_is_left(stations, params, context)
    reused = 0
    context.progress(0, len(stations), "blocks")
    for block, following, saved in itertools.zip_longest(stations, stations[1:], files):
        context.check_cancelled()
        done = keep_blocks and saved.exists()
        if done:
            reused += 1
            context.log(f"reused {reused} finished blocks")
        if done and not original:
            _adopt(model, block, saved)
        if not done or (flow is not None and following is not None):
            with model.opened(block.name):
                if following is not None:
                    model.prefetch(following.name)
                if not done:
                    if keep_blocks:
                        model.untie(block.name)
                    _look(block, params, flow, collect, known)
                if original:
                    _pass(model, flow, block, following)
                    block.batches = ()
                if not done:
                    yield block
                    if keep_blocks:
                        shards.write(model, [block.name], saved)
                        shards.place(model, block.name, saved)
                if not original:
                    _pass(model, flow, block, following)
        if done and original:
            _adopt(model, block, saved)
        # Else what one block took stands beside what the next one takes.
        hardware.give_back_memory(collect=is_large(block.module))
        context.progress(block.number + 1, len(stations), "blocks")
    if flow is not None:
        flow.states.close()


def _say_what_is_left(stations: Sequence[Block], params: Params, context: Context) -> None:
    """Name the linears of the blocks that `params` does not select.

    Raises:
        BadParams: these are all.
    """
    named = [f"{station.name}.{path}" for station in stations for path, _ in linears(station.module) if path]
    left = [name for name in named if isinstance(params, Selection) and not params.selects(name)]
    if named and len(left) == len(named):
        raise BadParams(f"no linear is left by targets and ignore. Names are as in {named[0]}.")
    if left:
        context.log(f"left as they are: {', '.join(left)}")


def _adopt(model: LoadedModel, block: Block, saved: Path) -> None:
    """Take a block as it was finished."""
    model.untie(block.name)
    shards.adopt(model, block.name, saved)


def _pass(model: LoadedModel, flow: Flow | None, block: Block, following: Block | None) -> None:
    """Let what enters the block become what enters the following one."""
    if flow is None or following is None:
        return
    flow.through(block.number, block.module)
    if isinstance(following.module, nn.Linear):
        flow.to_the_head(model)


def _look(block: Block, params: Params, flow: Flow | None, collect: Collect, known: Container[str]) -> None:
    """Give the block its linears, with what their inputs were."""
    if isinstance(block.module, nn.Linear):
        block.linears = [BlockLinear(block.name, block.module)]
    else:
        named = [BlockLinear(f"{block.name}.{path}", linear) for path, linear in linears(block.module)]
        chosen = [each for each in named if not isinstance(params, Selection) or params.selects(each.name)]
        block.linears = [each for each in chosen if each.name not in known]
    if flow is not None:
        block.batches = Batches(flow.states, flow.calls[block.number])
        if collect != "nothing":
            observe(block, collect, params.experts if isinstance(params, Observed) else "routed")
            hardware.give_back_memory(collect=False)  # what computed makes room for what solves


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
