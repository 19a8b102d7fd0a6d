"""What a recipe will need: memory as a sum of named parts, for compressing, measuring and serving apart; and seconds.

A run is a row of situations, one after the other: each step, saving, reading the artifact back, measuring. In each
some parts stand in memory together; the largest sum counts. Nothing is loaded: a model is known by its `Shape`.
`python -m benchmarks.fit` holds these sums against what the processes took.

On a CPU all processes of a run count, as resident memory; on CUDA the GPU's memory, where computing happens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine import pace, sizes
from engine.headers import Shape, experts, integer
from engine.methods import Calibrated, Method, Params, calibrates
from engine.pace import Rates
from engine.records import Recipe
from engine.sizes import Holding

Situation = Literal["probe", "compress", "save", "verify", "measure", "serve"]
PARTS = (
    "weights", "codes", "kv_cache", "activations", "calibration", "solver", "gradients", "optimizer", "teacher",
    "original", "runtime",
)  # fmt: skip
MiB = 1 << 20
RUNTIME = 350 * MiB  # resident bytes of one of our processes before it holds a model: Python, torch, transformers
COMPUTING = 25 * MiB  # more of one that computes: buffers of libraries, stacks of threads
LEARNING = 90 * MiB  # and of one that trains
LIBRARY = 50 * MiB  # and of one that has bitsandbytes in it
CONTEXT = 550 * MiB  # of a GPU that a process takes before it holds anything: CUDA's context and libraries
LATER = 60 * MiB  # that a process does not give back between two situations
PROBED_FROM = 60.0  # seconds: what is expected to take less is not probed
PROBED_BLOCKS = 8  # and so many blocks: one of few takes much of the time that it tells
HELD = 1 << 30  # bytes of hidden states that calibration keeps in memory; more go to a file
PREDICTED = 1 << 24  # logits of branches of hidden states (`engine.branches`) that are looked at at a time
BRANCHED = 22  # bytes of one: in 16 bit, in float32, its logarithm, the original's, and the divergence
SAVED_TOGETHER = 1 << 28  # bytes of small parts that are written together
ROOM = 4  # times the dense weights' bytes must be free before an artifact is read back whole
STRETCH = 1 << 20  # weights that are rounded and looked at at a time: copies of them stay in the cache
SOLVED, SPAN = 1 << 24, 512  # weights that are solved at a time, and columns for which those before count at once
FLOW_TOKENS, FLOW_ROWS = 2048, 8  # tokens and sequences of calibration that pass a block at a time
LOGIT_TOKENS = 4096  # tokens whose predictions are measured at a time
SMALL = 50_000_000  # parameters up to which the whole held-out text and every question is measured on
DOCUMENTS, DOCUMENT_TOKENS = 600, 45  # of the held-out text
LOGITS, PAIR = (
    10,
    20,
)  # bytes of a logit: 16 bit, float32 and its logarithm; with those of the original, and both at work
LOGITS_CPU, LOGITS_CUDA, FEWEST = 1 << 20, 1 << 27, 128  # that exist at once in training; of so many tokens at least
WRITTEN = 64  # tokens of each of sixteen sequences, prompt included, when latency is measured
BATCHES, LENGTHS = (1, 4, 16, 64), (1024, 4096, 16_384, 65_536)  # for which serving is estimated
LARGE = "Larger than memory: one block at a time."
IN_BFLOAT16 = "Kernels compute on packed weights in bfloat16: in another dtype they are small in files, not in memory."
ROUNDED = 40  # bytes of a weight while it is rounded and its error told: the float, the code, the level, the histogram
ROUNDED_STRAIGHT = 13  # and while a block learns: the code, the level, what it is off, and the weight that learns
TOGETHER = 13  # where the whole matrix has one scale
MADE = 16  # and where it is made of what is learned beside it, for a product: itself, its gradient, copies in 16 bit
MADE_OF_CODES = 40  # where it is rounded to its grid besides: in steps, within bounds, rounded, passed straight
LOOKED_AT = 5  # bytes of a number while a tensor is looked at for NaN: its magnitude, and three comparisons
MOVED = 9  # and while it is moved into large pages, too
PLACED = 4  # of a number in 16 bit: as it was read, and as it is moved
REPACKED = 8  # of a 4-bit weight of a library's while it is repacked, or unpacked, for its first product
UNPACKED = 20  # of a packed weight while it is ordered as kernels want it
STATISTICS = ("hessian", "directions")


@dataclass(frozen=True)
class Machine:
    """Where a run would work: bytes that are free there; `wide`, where all that is trained computes in float32."""

    free: int
    device: Literal["cpu", "cuda"] = "cpu"
    wide: bool = False
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True)
class Need:
    """The parts that stand in memory together in a situation, bytes by the names in `PARTS`; `title` of a step."""

    situation: Situation
    parts: Mapping[str, int]
    title: str = ""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """What a recipe will take: bytes by situation and part, bytes that are free, seconds by part, notes for the reader.

    serving: of one warm process with what the recipe makes, one sequence of the model's length, 4,096 tokens at most.
    loads: bytes of such a process that writes for so many sequences of so many tokens, (batch, tokens).
    download: bytes that have to come from the hub first.
    """

    needs: tuple[Need, ...]
    serving: Need
    available: int
    times: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    device: str = "cpu"
    download: int = 0
    loads: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def largest(self) -> Need:
        """The situation that counts."""
        return max(self.needs, key=lambda need: need.total)

    @property
    def total(self) -> int:
        return self.largest.total

    @property
    def after(self) -> int:
        """The most that is needed once the steps are done."""
        return max((need.total for need in self.needs if need.situation not in ("probe", "compress")), default=0)

    @property
    def probed(self) -> bool:
        """Whether one block is worked on first, to know better."""
        return any(need.situation == "probe" for need in self.needs)

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def seconds(self) -> float:
        return sum(self.times.values())

    @property
    def working(self) -> float:
        """The seconds of the steps, among all seconds."""
        return self.times.get("steps", 0.0)


def estimate(
    recipe: Recipe, shape: Shape, steps: Sequence[tuple[Method, Params]], machine: Machine, *, download: int = 0
) -> Estimate:
    """What a recipe with these checked steps takes for a model of this shape, of which `download` bytes come first."""
    first = Holding.of(shape, recipe.model.dtype)
    held, needs = first, list[Need]()
    streamed, library = bool(steps), 0
    for method, params in steps:
        loaded, streamed = not streamed, streamed and not params.whole()
        needs += compressing(held, method, params, first, streamed, machine, loaded=loaded)
        held = held.after(params)
        library = library if params.leaves_codes() else LIBRARY
    if not steps:
        needs.append(
            Need("compress", _parts(weights=first.dense, activations=LOOKED_AT * first.largest, runtime=RUNTIME))
        )
    times = pace.seconds(first, held, steps, recipe.measure, machine.rates, download)
    telling = any(params.told_by_a_block() for _, params in steps)
    long = sum(times.values()) > PROBED_FROM and sizes.blocks_of(shape.config) >= PROBED_BLOCKS
    if streamed and telling and long:
        needs.insert(0, probing(needs))
    needs.append(saving(held, streamed, needs[-1], library))
    needs.append(verifying(held, streamed, machine.free, library))
    if wanted := set(recipe.measure) - {"size"}:
        needs.append(measuring(held, first if steps else None, wanted))
    if machine.device == "cuda":
        needs = [_on_gpu(need) for need in needs]
    large = streamed and not wanted and first.dense > machine.free
    unpacked = not held.packs and any(bits.dense is None for bits in held.bits.values())
    longest = sizes.context_length(held.shape.config)

    def serve(batch: int, tokens: int) -> Need:
        need = serving(held, batch, tokens)
        return _on_gpu(need) if machine.device == "cuda" else need

    lengths = sorted({*(tokens for tokens in LENGTHS if tokens < longest), longest})
    loads = {(batch, tokens): serve(batch, tokens).total for batch in BATCHES for tokens in lengths}
    return Estimate(
        tuple(needs),
        serve(1, min(4096, longest)),
        machine.free,
        times,
        (LARGE,) * large + (IN_BFLOAT16,) * unpacked,
        machine.device,
        download,
        loads,
    )


def compressing(
    held: Holding, method: Method, params: Params, first: Holding, streamed: bool, machine: Machine, *,
    loaded: bool = False,
) -> list[Need]:  # fmt: skip
    """What a step needs on a model, of which one part at a time is in memory where it is `streamed`.

    loaded: whether an earlier step has taken it into memory.
    """
    if integer(getattr(params, "steps", 0)):
        return _training(held, method, params, first, machine, loaded)
    if calibrates(params) and getattr(params, "by", "") == "taylor":
        return [Need("compress", _differentiating(held, params), method.title)]
    params, (largest, beside) = params.on(held.shape, held.width), held.parts()
    weights, others = (held.width * size if streamed else held.dense for size in (largest, beside))
    chosen, codes, earlier = params.stored_bits(1024, 1024), 0, 0
    if chosen is not None:
        ours = params.leaves_codes()  # a library's are written as they are found, and take the weight's place
        codes = round(largest * (ours + chosen.stored / 8))  # as found, and as written
        earlier = max(0, sum(_linear_sizes(held.shape)) - largest) if ours and not streamed else 0  # of blocks before
    rounding = {
        "weights": weights, "codes": earlier + codes,
        "solver": 0 if chosen is None and not calibrates(params) else _rounding(held.shape, params),
    }  # fmt: skip
    phases = [rounding]
    if calibrates(params):
        observing = {"weights": weights, "codes": earlier}
        phases = _calibrating(held, params, observing, rounding)
        if survey := params.survey(held.shape, held.width):
            gathered = phases[0]["calibration"]
            phases.append({"weights": weights, "calibration": gathered, "solver": survey.weighing})
            phases.append({"weights": max(weights, others), "activations": survey.reading})
        phases.append({"weights": others, "calibration": _states(held, params)})
        if integer(getattr(params, "distill_steps", 0)):
            phases.append(_distilling(held, params, observing))
    if any(params.beyond_blocks()):
        phases.append({**rounding, "weights": others})
    most = max(phases, key=lambda phase: sum(phase.values()))
    runtime = RUNTIME + COMPUTING + (0 if params.leaves_codes() else LIBRARY)
    return [Need("compress", _parts(**most, runtime=runtime), method.title)]


def _calibrating(
    held: Holding, params: Calibrated, observing: dict[str, int], rounding: dict[str, int]
) -> list[dict[str, int]]:
    """Hidden states with the statistics of each input of a block, as it computes; and with those of its last linear.

    What computed is gone by then, and what `rounding` takes is there.
    """
    shape, states = held.shape, _states(held, params)
    together = getattr(params, "experts", "") == "all"
    hidden, inputs = sizes.hidden_size(shape.config), sizes.readers(shape, together) or [0]
    # Of the widest input: itself in float32 and its lengths' copy; and what the block computes beside it.
    active = _at_once(params) * (12 * inputs[0] + 4 * held.width * hidden)
    if str(getattr(params, "collect", "norm")) not in STATISTICS:
        return [{**rounding, "calibration": states + 8 * sum(inputs), "activations": active}]
    largest = _largest(shape)
    # Of the weights solved at a time what was missed; the codes of all, twice; three pieces of the factor.
    solver = rounding["solver"] + 4 * min(SOLVED, largest) + 2 * largest + 12 * SPAN * inputs[0]
    last = {**rounding, "calibration": states + 4 * inputs[0] ** 2, "solver": solver}
    if rounding["codes"] and not experts(shape.config):
        last["weights"] -= held.width * (held.parts()[0] - largest)  # the block's others are put aside by then
    gathered = states + 4 * sum(size * size for size in inputs)
    return [{**observing, "calibration": gathered, "activations": active}, last]


def branching(shape: Shape, width: int, rows: int, length: int, count: int) -> int:
    """Bytes of so many branches of the states of rows of text (`engine.branches`), and of what they predict."""
    states = width * rows * length * sizes.hidden_size(shape.config)
    vocabulary = sizes.vocabulary_size(shape)
    return (
        min(HELD, count * states) + 3 * states + BRANCHED * min(rows * length * vocabulary, max(PREDICTED, vocabulary))
    )


def _distilling(held: Holding, params: Calibrated, observing: dict[str, int]) -> dict[str, int]:
    """A block that learns from its original: its weights in float32, and rounded; what enters it, and what it gave."""
    largest, _ = held.parts()
    read = sum(inputs for _, inputs in sizes.first_block(held.shape))  # each linear rounds its own copy of its input
    return {
        **observing, "weights": observing["weights"] + (4 + held.width) * largest, "gradients": 4 * largest,
        "optimizer": 8 * largest, "calibration": 2 * _states(held, params),
        "activations": _at_once(params) * (_remembered(held, params.sequence_length) + held.width * read),
        "solver": ROUNDED_STRAIGHT * _largest(held.shape),
    }  # fmt: skip


def _differentiating(held: Holding, params: Calibrated) -> dict[str, int]:
    """All weights in float32 with their gradients, and what the backward pass needs of each token, in float32 too.

    Of a block: 15 times its hidden state (norms, queries, keys, values, their rotation), 4 times its widest input; of
    the logits themselves, their logarithm, and the gradient.
    """
    config = held.shape.config
    hidden, vocabulary = sizes.hidden_size(config), sizes.vocabulary_size(held.shape)
    each = sizes.blocks_of(config) * (60 * hidden + 16 * _widest(held.shape)) + 12 * vocabulary
    weights = 4 * held.shape.parameters
    return _parts(
        weights=weights, gradients=weights, activations=_at_once(params) * each, runtime=RUNTIME + LEARNING
    )  # fmt: skip


def _at_once(params: Calibrated) -> int:
    """Tokens of calibration that pass a block, or the model, at a time."""
    return min(params.samples * params.sequence_length, FLOW_TOKENS, FLOW_ROWS * params.sequence_length)


def _states(held: Holding, params: Calibrated) -> int:
    """The hidden states of all sequences; what is more stands in a file."""
    tokens = params.samples * params.sequence_length
    return min(tokens * sizes.hidden_size(held.shape.config) * held.width, HELD)


def _rounding(shape: Shape, params: Params) -> int:
    """Copies of as many weights as are rounded, and looked at for the audit, at a time: all that share one scale."""
    largest = _largest(shape)
    whole = TOGETHER * largest if getattr(params, "granularity", "") == "tensor" else 0
    return whole + ROUNDED * min(STRETCH, largest)


def _linear_sizes(shape: Shape) -> list[int]:
    return [outputs * inputs for outputs, inputs in shape.linears.values()]


def _largest(shape: Shape) -> int:
    """Weights of the largest linear."""
    return max(_linear_sizes(shape), default=0)


def _widest(shape: Shape) -> int:
    """Inputs of the widest linear of a block."""
    return max((inputs for _, inputs in sizes.first_block(shape)), default=4 * sizes.hidden_size(shape.config))


def _training(
    held: Holding, method: Method, params: Params, first: Holding, machine: Machine, loaded: bool
) -> list[Need]:
    """A student in float32 with its gradients and two moments; before, where it is asked once, its teacher.

    Of assistants and student, which are trained one after the other, the largest counts. While assistants are trained,
    what earlier steps have taken into memory waits there.
    """
    chain = held.trained(params, first.shape)
    student = max(chain, key=lambda each: each.parameters)
    waiting = held.dense if len(chain) > 1 and loaded else 0
    vocabulary, parameters = sizes.vocabulary_size(student.shape), student.parameters
    scope = str(getattr(params, "scope", "all"))
    trained = parameters if scope == "all" else _adapters(student.shape, integer(getattr(params, "rank", 8)), scope)
    batch, length = integer(getattr(params, "batch", 16)), integer(getattr(params, "sequence_length", 128))
    together = min(batch, integer(getattr(params, "micro_batch", 0)) or batch)
    again = bool(getattr(params, "gradient_checkpointing", False))
    width = 4 if machine.wide else first.width
    teachers = sum(Holding(each, width).dense for each in (first.shape, *params.beside()))
    teaches = hasattr(params, "teachers")
    live = teaches and getattr(params, "teacher_logits", "live") == "live" and method.name != "distill/sequence"
    found = []
    if teaches and not live:
        asked = _logits(min(2048, batch * length), vocabulary, machine)
        found.append(
            Need("compress", _parts(
                weights=waiting + student.width * parameters, teacher=teachers,
                activations=4 * PAIR * asked, runtime=RUNTIME + COMPUTING,
            ), method.title)
        )  # fmt: skip
    codes = sum(out * into for name, (out, into) in student.shape.linears.items() if name in student.bits)
    dense = parameters - trained + (codes if scope == "all" else 0)  # what codes stand for stays beside what they learn
    frozen = (4 if machine.wide else student.width) * dense
    made = MADE_OF_CODES if codes and scope != "norms and scales" else MADE
    remembered = _learning(student, together, length, trained, wide=machine.wide, again=again)
    training = _parts(
        weights=waiting + frozen + 4 * trained, gradients=4 * trained, optimizer=8 * trained,
        activations=remembered + 12 * _logits(together * length, vocabulary, machine),
        codes=codes, solver=_largest(student.shape) * (0 if scope == "all" and not codes else made),
        teacher=teachers if live else 0, runtime=RUNTIME + LEARNING,
    )  # fmt: skip
    return [*found, Need("compress", training, method.title)]


def _learning(student: Holding, batch: int, length: int, trained: int, *, wide: bool, again: bool) -> int:
    """What the backward pass needs of all blocks, and 16-bit weights; twice, where all is 32-bit.

    Where blocks are computed `again` it needs what entered each, and all of one.
    """
    config, remembered = student.shape.config, _remembered(student, length)
    blocks = sizes.blocks_of(config)
    each = 4 * blocks * sizes.hidden_size(config) + remembered if again else blocks * remembered
    states = batch * length * each * (2 if wide else 1)
    return states + (0 if wide else 2 * trained)


def _logits(tokens: int, vocabulary: int, machine: Machine) -> int:
    """Logits of so many tokens that exist at once: as many as a piece of `engine.losses` has."""
    most = LOGITS_CUDA if machine.device == "cuda" else LOGITS_CPU
    return min(tokens * vocabulary, max(most, FEWEST * vocabulary))


def _remembered(held: Holding, length: int) -> int:
    """What the backward pass needs of the forward one: of a token of rows of that length its states in a block."""
    config = held.shape.config
    # Attention's weights, which the backward pass needs in closed form, of short rows; of shorter ones plainly, too.
    maps = sizes.query_heads(config) * length * (8 if length <= 256 else 2 if length <= 512 else 0)
    return 24 * sizes.hidden_size(config) + 12 * _widest(held.shape) + maps


def _adapters(shape: Shape, rank: int, scope: str) -> int:
    """Weights that are trained where few are."""
    if scope == "lora":
        return sum(rank * (outputs + inputs) for outputs, inputs in shape.linears.values())
    return shape.parameters // 50


def probing(steps: Sequence[Need]) -> Need:
    """One block is worked on in a process of its own, while the run's waits."""
    largest = max(steps, key=lambda need: need.total)
    return Need("probe", {**largest.parts, "runtime": largest.parts["runtime"] + RUNTIME})


def saving(held: Holding, streamed: bool, last: Need, library: int = 0) -> Need:
    """Parts beside the blocks are written together; then every part computes once more.

    Of the `last` step half of what solved is still with the process; `library`: bytes of one that computes.
    """
    _, beside = held.parts()
    runtime = RUNTIME + LATER + library
    if not streamed:
        return Need("save", _parts(weights=held.dense, runtime=runtime))
    small = min(held.width * held.embeddings, max(SAVED_TOGETHER, held.width * beside))
    parts = {"weights": small, "solver": last.parts.get("solver", 0) // 2}
    if library and (repacked := _repacked(held)) > sum(parts.values()):
        parts = {"activations": repacked}
    return Need("save", _parts(**parts, runtime=runtime))


def _repacked(held: Holding) -> int:
    """What the largest of a library's 4-bit linears takes beside its weight when it computes for the first time."""
    sizes_of = {name.removesuffix(".weight"): math.prod(shape) for name, shape in held.shape.tensors.items()}
    four = [sizes_of.get(name, 0) for name, bits in held.bits.items() if bits.code <= 4]
    return REPACKED * max(four, default=0)


def verifying(held: Holding, streamed: bool, free: int, library: int = 0) -> Need:
    """Stock `transformers` reads the artifact whole and unpacks it, or one part at a time where memory is short."""
    block, beside = held.parts()
    if streamed and ROOM * held.dense > free:
        active = _repacked(held) if library else 0
        runtime = 2 * RUNTIME + LATER + 2 * library
        return Need("verify", _parts(weights=2 * held.width * max(block, beside), activations=active, runtime=runtime))
    packed = held.file_bytes() if held.bits else 0
    return Need("verify", _parts(
        weights=held.dense, activations=max(packed, LOOKED_AT * held.largest),
        runtime=2 * (RUNTIME + library) + LATER,
    ))  # fmt: skip


def measuring(held: Holding, original: Holding | None, wanted: set[str]) -> Need:
    """The packed model in a process of its own; logits of many tokens; beside it the original, where both are read."""
    parameters, vocabulary = (original or held).shape.parameters, sizes.vocabulary_size(held.shape)
    width = held.width
    cache = sizes.cache_bytes(held.shape.config, held.grid, width, 16, WRITTEN)
    both = original is not None and bool(wanted & {"accuracy", "divergence", "outputs"})
    tokens = LOGIT_TOKENS if "accuracy" in wanted else min(LOGIT_TOKENS, share(parameters, DOCUMENTS) * DOCUMENT_TOKENS)
    reads = bool(wanted & {"perplexity", "accuracy", "divergence"})
    forward = width * (3 * _widest(held.shape) + 4 * sizes.hidden_size(held.shape.config))
    logits = (PAIR if both and "divergence" in wanted else LOGITS) * vocabulary
    active = max(tokens * (logits + forward) if reads else 0, MOVED * held.largest)
    return Need("measure", _parts(
        weights=held.packed(), kv_cache=cache * sizes.cache_copies(held.shape.config, held.grid), activations=active,
        original=original.dense if both and original is not None else 0, runtime=2 * RUNTIME + COMPUTING + LATER,
    ))  # fmt: skip


def share(parameters: int, count: int) -> int:
    """How many of `count` documents or questions are measured; fewer for large models, 32 at least."""
    return count if parameters <= SMALL else max(min(count, 32), round(count * SMALL / parameters))


def serving(held: Holding, batch: int, tokens: int) -> Need:
    """A warm process that writes for `batch` sequences of `tokens` tokens."""
    config = held.shape.config
    copies = sizes.cache_copies(config, held.grid)
    active = batch * (min(tokens, 512) * 4 * _widest(held.shape) * held.width + 12 * sizes.vocabulary_size(held.shape))
    loading = LOOKED_AT * held.largest
    if held.bits:
        loading = PLACED * held.largest + UNPACKED * _largest(held.shape)
    active = max(active, loading)  # what loading took, the process keeps for what comes
    return Need("serve", _parts(
        weights=held.packed(), kv_cache=copies * sizes.cache_bytes(config, held.grid, held.width, batch, tokens),
        activations=active, runtime=RUNTIME + COMPUTING,
    ))  # fmt: skip


def _on_gpu(need: Need) -> Need:
    """On the GPU the runtime is CUDA's, of each process that has one."""
    processes = 2 if need.situation in ("probe", "verify", "measure") else 1
    return Need(need.situation, {**need.parts, "runtime": processes * CONTEXT}, need.title)


def _parts(**bytes_: int) -> dict[str, int]:
    """Those that are not zero, in the order in which they are shown."""
    return {name: round(bytes_[name]) for name in PARTS if bytes_.get(name)}
