"""Calibration text to batches, and the walk over a model's blocks that every calibrated method takes.

`walk_blocks` runs the blocks one by one: the inputs of block i+1 are the outputs of block i *after* a method changed
it, so that later blocks see, and can make up for, the error of earlier ones (`engine.flow`).

A block that is finished is written to `context.folder` as it will stand in the artifact; a run that resumes reads it
instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engine import hardware, headers, shards, sizes
from engine.errors import BadModel, BadParams, short
from engine.fields import RARE
from engine.flow import Batches, Flow, batch_size, capture
from engine.headers import Shape
from engine.methods import Calibrated, Context, Params, Selection, calibrates
from engine.models import LoadedModel, blocks, embeddings, head, is_large, linears
from engine.observing import Block, BlockLinear, Collect, Listeners, observe
from engine.rows import packed_rows


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
