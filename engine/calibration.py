"""Calibration text to batches, and the walk over a model's blocks that every calibrated method takes.

`walk_blocks` holds the inputs of one block at a time. It first lets the model run once over each batch
and notes, with hooks, the arguments that every block really receives (masks, rotary embeddings, ...),
which differ between families and, in some, between the blocks of one model. Then it replays the blocks
one by one: the inputs of block i+1 are the outputs of block i *after* a method changed it, so that
later blocks see, and can make up for, the error of earlier ones.

A block that is finished is written to `context.folder`; a run that resumes reads it instead.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from engine.errors import BadText, short
from engine.files import publish
from engine.methods import Calibrated, Context, Params, Selection
from engine.models import Linear, LoadedModel, blocks, linears, quantize_inputs
from engine.packing import InputGrid, QuantizedWeight

log = logging.getLogger(__name__)

Collect = Literal["nothing", "norm", "hessian", "directions"]
SAMPLE = 64  # tokens
STRIP = 2048  # rows of a Hessian that are computed at once
LONGEST_TEXT = 64 << 20  # bytes that are read of a text file


@dataclass
class BlockLinear:
    """A linear of the block at hand, and what calibration saw at its input.

    weight: (out_features, in_features), also for GPT-2's transposed `Conv1D`; changes to it in place
        change the model.
    hessian: float32 (in, in), mean of 2 x xᵀ over the tokens, where it was asked for.
    input_norm: float32 (in,), the L2 norm of each input over the tokens, where it was asked for.
    input_max: float32 (in,), the largest magnitude of each input over the tokens, with the norm.
    sample: float32 (at most SAMPLE, in), some of the inputs.
    """

    name: str
    module: Linear
    tokens: int = 0
    hessian: Tensor | None = None
    input_norm: Tensor | None = None
    input_max: Tensor | None = None
    sample: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight.data
        return weight.t() if isinstance(self.module, Conv1D) else weight


@dataclass
class Call:
    """The arguments one block received for one batch, but for the hidden states."""

    args: tuple[object, ...]
    kwargs: dict[str, object]


@dataclass
class Block:
    """One decoder block with its linears; `number` counts from 0.

    batches: hidden states (B, T, hidden) that enter the block and its other arguments, where text was asked for.
    """

    number: int
    name: str
    module: nn.Module
    linears: list[BlockLinear]
    batches: list[tuple[Tensor, Call]] = field(default_factory=list)


class Accumulator:
    """Gathers second moments of a linear's inputs, in float32, one batch after another."""

    def __init__(self, linear: BlockLinear, collect: Collect) -> None:
        self.linear, self.collect = linear, collect

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].detach().reshape(-1, args[0].shape[-1]).float()  # (tokens, in)
        linear = self.linear
        if self.collect in ("hessian", "directions"):
            if linear.hessian is None:
                linear.hessian = make_empty_hessian(inputs.shape[1], inputs.device)
            weighted = nn.functional.normalize(inputs) if self.collect == "directions" else inputs
            linear.hessian = accumulate_hessian(linear.hessian, linear.tokens, weighted)
        if linear.sample is None:
            linear.sample = inputs[:: max(1, inputs.shape[0] // SAMPLE)][:SAMPLE].clone()
        largest = inputs.abs().amax(0)
        linear.input_max = largest if linear.input_max is None else torch.maximum(linear.input_max, largest)
        squares = inputs.square().sum(0)
        before = torch.zeros_like(squares) if linear.input_norm is None else linear.input_norm.square()
        linear.input_norm = (before + squares).sqrt()
        linear.tokens += inputs.shape[0]


def make_empty_hessian(size: int, device: torch.device) -> Tensor:
    """Zeros (size, size) in float32."""
    return torch.zeros(size, size, device=device)


def accumulate_hessian(hessian: Tensor, seen: int, inputs: Tensor) -> Tensor:
    """The mean of 2 x xᵀ after `inputs` (tokens, in), given that over the `seen` tokens before.

    A large one is computed strip by strip from the diagonal to the right and mirrored, which is half the work.
    """
    total, size = seen + inputs.shape[0], hessian.shape[0]
    for start in range(0, size, STRIP):
        stop = min(start + STRIP, size)
        strip = hessian[start:stop, start:]
        strip.mul_(seen / total).addmm_(inputs[:, start:stop].t(), inputs[:, start:], alpha=2 / total)
        hessian[stop:, start:stop] = strip[:, stop - start :].t()
    return hessian


def read_documents(path: Path) -> list[str]:
    """The documents of a text file (one a line) or a JSONL file (its `text` fields).

    Raises:
        BadText: not there, not UTF-8 text, empty, or a JSONL line without `text`.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST_TEXT)
    except OSError as error:
        raise BadText(f"The text {short(path)} cannot be read: {error.strerror}.") from None
    if b"\0" in raw[:65536]:
        raise BadText(f"{short(path)} is a binary file; a text or JSONL file in UTF-8 is needed.")
    text = raw.decode("utf-8", errors="ignore" if len(raw) == LONGEST_TEXT else "replace")
    if text.count("\ufffd") > len(text) // 100:
        raise BadText(f"{short(path)} is not UTF-8 text.")
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_json_text(line, number, path) for number, line in enumerate(lines, 1)]
    if not lines:
        raise BadText(f"The text {short(path)} is empty.")
    return lines


def _json_text(line: str, number: int, path: Path) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise BadText(f'{short(path)}, line {number}: a JSON object with a "text" is needed.') from None


def token_rows(tokenizer: PreTrainedTokenizerBase, path: Path, length: int, count: int | None = None) -> Tensor:
    """Packed token ids (rows, length) of a text's documents, in order; `count` rows at most.

    Raises:
        BadText: the text is shorter than one row.
    """
    ids: list[int] = []
    end = tokenizer.eos_token_id
    for document in read_documents(path):
        row = tokenizer(document, truncation=False, verbose=False).input_ids
        if end is not None and (not row or row[0] != end):
            row = [*row, end]
        ids += row
        if count is not None and len(ids) >= count * length:
            break
    rows = len(ids) // length
    if rows == 0:
        raise BadText(
            f"The text {short(path)} has {len(ids)} tokens, one sequence needs {length}. "
            "Give a longer text or a smaller sequence_length."
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)[:count]


def walk_blocks(
    model: LoadedModel, context: Context, params: Params, collect: Collect = "nothing", *, keep_blocks: bool = True
) -> Iterator[Block]:
    """Yield the model's blocks in order; what the caller changes in one is kept and seen by the next.

    A block has the linears that `params` selects. With `Calibrated` params, calibration text flows through the
    blocks and each linear comes with what `collect` asks for: `norm`; `hessian`, which includes the norm; or
    `directions`, a Hessian of inputs scaled to length 1. Finished blocks are stored and, in a resumed run, read back
    and not yielded again; without `keep_blocks` this walk only looks.
    """
    name, modules = blocks(model.network)
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    select = params if isinstance(params, Selection) else None
    if isinstance(params, Calibrated):
        rows = token_rows(model.tokenizer, context.calibration, params.sequence_length, params.samples)
        context.log(f"calibrating on {rows.shape[0]} sequences of {rows.shape[1]} tokens")
        hidden, calls = capture(model, torch.split(rows.to(model.device), 8))
    reused = 0
    for number, module in enumerate(modules):
        context.check_cancelled()
        saved = context.folder / f"block-{number:04d}.safetensors"
        block = Block(number, f"{name}.{number}", module, [])
        if keep_blocks and saved.exists():
            restore(model, block, saved)
            reused += 1
            context.log(f"reused {reused} finished blocks")
        else:
            named = [BlockLinear(f"{block.name}.{path}", linear) for path, linear in linears(module)]
            block.linears = [linear for linear in named if select is None or select.selects(linear.name)]
            if hidden:
                block.batches = [*zip(hidden, calls[number], strict=True)]
            if collect != "nothing":
                observe(block, hidden, calls[number], collect)
            yield block
            if keep_blocks:
                keep(model, block, saved)
        if number + 1 < len(modules):
            hidden = [run_block(module, states, call) for states, call in zip(hidden, _of(calls, number), strict=True)]
        context.progress(number + 1, len(modules), "blocks")


def _of(calls: list[list[Call]], number: int) -> list[Call]:
    return calls[number] if calls else []


@torch.no_grad()
def capture(model: LoadedModel, batches: tuple[Tensor, ...]) -> tuple[list[Tensor], list[list[Call]]]:
    """The first block's inputs for each batch, and every block's other arguments: [block][batch].

    Arguments that are equal from batch to batch are kept once.
    """
    _, modules = blocks(model.network)
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in modules]

    def note(number: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        states, rest, others = _split(args, kwargs)
        if number == 0:
            hidden.append(states.clone())
        call = Call(rest, others)
        known = calls[number][0] if calls[number] else (calls[number - 1][0] if number else None)
        calls[number].append(known if known is not None and _same(known, call) else call)

    handles: list[RemovableHandle] = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: note(number, args, kwargs), with_kwargs=True
        )
        for number, module in enumerate(modules)
    ]
    try:
        for batch in batches:
            model.network(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return hidden, calls


def _split(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Tensor, tuple[object, ...], dict[str, object]]:
    """Hidden states apart from the other arguments; they come first or by name."""
    if args:
        states, rest, others = args[0], args[1:], kwargs
    else:
        others = dict(kwargs)
        states, rest = others.pop("hidden_states"), ()
    assert isinstance(states, Tensor)
    return states, rest, {key: value for key, value in others.items() if "past_key_value" not in key}


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


def observe(block: Block, hidden: list[Tensor], calls: list[Call], collect: Collect) -> None:
    """Run the block over all inputs and fill its linears' statistics.

    Linears that read the same tensor (q, k and v; gate and up) share one set of statistics.
    """
    groups = shared_inputs(block, hidden[0], calls[0])
    with contextlib.ExitStack() as stack:
        for group in groups:
            hook = group[0].module.register_forward_pre_hook(Accumulator(group[0], collect))
            stack.callback(hook.remove)
        for states, call in zip(hidden, calls, strict=True):
            run_block(block.module, states, call)
    for first, *others in groups:
        for other in others:
            other.hessian, other.input_norm, other.tokens = first.hessian, first.input_norm, first.tokens
            other.input_max, other.sample = first.input_max, first.sample


def shared_inputs(block: Block, states: Tensor, call: Call) -> list[list[BlockLinear]]:
    """The block's linears in order, those together that read the same tensor."""
    readers: dict[int, tuple[Tensor, list[BlockLinear]]] = {}  # the tensors are kept, so that no id is used twice

    def note(linear: BlockLinear, inputs: Tensor) -> None:
        readers.setdefault(id(inputs), (inputs, []))[1].append(linear)

    with contextlib.ExitStack() as stack:
        for linear in block.linears:
            hook = linear.module.register_forward_pre_hook(lambda _, args, linear=linear: note(linear, args[0]))
            stack.callback(hook.remove)
        run_block(block.module, states, call)
    found = [group for _, group in readers.values()]
    reached = {linear.name for group in found for linear in group}
    return found + [[linear] for linear in block.linears if linear.name not in reached]


def keep(model: LoadedModel, block: Block, path: Path) -> None:
    """Write a finished block: its tensors and its linears' integer codes."""
    tensors = {f"state.{key}": value.contiguous() for key, value in block.module.state_dict().items()}
    about: dict[str, Any] = {"pruned": [n for n in model.pruned if n.startswith(block.name + ".")]}
    for linear in block.linears:
        if (weight := model.quantized.get(linear.name)) is not None:
            about[linear.name] = {"bits": weight.bits, "symmetric": weight.symmetric, "kind": weight.kind}
            if weight.inputs is not None:
                about[linear.name] |= {"inputs": weight.inputs.scale}
            for part in ("codes", "scale", "zero"):
                tensors[f"{part}.{linear.name}"] = getattr(weight, part).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"about": json.dumps(about)})
    publish(temporary, path)


def restore(model: LoadedModel, block: Block, path: Path) -> None:
    """Read back what `keep` wrote."""
    from safetensors import safe_open

    tensors = load_file(path, device=str(model.device))
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    block.module.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    model.pruned.update(about.pop("pruned"))
    for name, grid in about.items():
        parts = {part: tensors[f"{part}.{name}"] for part in ("codes", "scale", "zero")}
        inputs = InputGrid(grid["inputs"], grid["kind"]) if "inputs" in grid else None
        model.quantized[name] = QuantizedWeight(
            bits=grid["bits"], symmetric=grid["symmetric"], inputs=inputs, kind=grid["kind"], **parts
        )  # fmt: skip
        if inputs is not None:
            quantize_inputs(model.network.get_submodule(name), inputs)
