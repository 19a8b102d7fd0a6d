"""Latency of generation: time to the first token, time per token after it, tokens per second at a batch size.

Prefill reads the whole prompt at once and is bound by arithmetic; decoding reads all weights for each token and
is bound by memory. So the first token (TTFT) and the others (TPOT) are told apart, as distributions: on a
machine that does other work the median is the model's, and the tail is the machine's. The kernels that
computed are named. One generation warms up and is not counted.

The details of TTFT and TPOT: `count` values, the `largest` of them, and those nearest to the percentiles p50, p95 and
p99, also where they are too few for these (`significance.tells`): whoever shows them has to ask.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence

import torch
from pydantic import JsonValue

from engine import hardware
from engine.generate import cache_label, decode
from engine.methods import Emit
from engine.models import LoadedModel, linears
from engine.records import Measurement

NEW_TOKENS = 32
REPETITIONS = 5
BATCHES = (1, 8)
MORE = (4, 16)  # besides: their keys and values are shorter than the texts that the estimate of memory counts
PATIENCE = 30.0  # seconds for one batch size, after which two repetitions are enough


def measure(
    model: LoadedModel,
    prompt: list[int],
    *,
    emit: Emit | None = None,
    new_tokens: int = NEW_TOKENS,
    repetitions: int = REPETITIONS,
    batches: Sequence[int] = BATCHES,
) -> list[Measurement]:
    """TTFT and TPOT at batch 1 in seconds, and throughput in tokens per second for each of `batches`.

    `emit` hears every repetition's time per token as a sample, for live charts.

    Raises:
        ValueError: fewer than 2 new tokens or no repetition, or an empty prompt.
    """
    if new_tokens < 2 or repetitions < 1:
        raise ValueError("latency needs at least 2 new tokens and 1 repetition")
    about = _about(model, prompt, new_tokens)
    found: list[Measurement] = []
    for batch in batches:
        times = _repeat(model, prompt, new_tokens, batch, repetitions, emit)
        details = about | {"batch": batch, "repetitions": len(times)}
        if batch == 1:
            found.append(_duration("latency.ttft", [row[:1] for row in times], details))
            found.append(_duration("latency.tpot", [row[1:] for row in times], details))
        found.append(_throughput(batch, times, details))
    return found


def warm_up(model: LoadedModel, prompt: list[int], batches: Sequence[int] = BATCHES) -> None:
    """Do once, at every batch size, what the first generation of a process does more than the others."""
    for batch in batches:
        _generate(model, prompt, 3, batch)


def kernels(model: LoadedModel, tokens: int = 1) -> str:
    """Which kernels compute the model's linears, and how many: `int4pack-cpu x 28, dense bfloat16 x 1`.

    Where keys and values are packed, also how they are read in a text of `tokens` tokens.
    """
    dense = f"dense {str(model.network.dtype).removeprefix('torch.')}"
    names = Counter(model.kernels.values())
    names[dense] += sum(name not in model.kernels for name, _ in linears(model.network))
    found = [f"{name} x {count}" for name, count in names.most_common() if count]
    label = cache_label(model, tokens)
    return ", ".join(found + ([label] if label else []))


def _repeat(
    model: LoadedModel, prompt: list[int], new_tokens: int, batch: int, repetitions: int, emit: Emit | None
) -> list[list[float]]:
    """Seconds to the first token and between the others, a row for each repetition."""
    warm_up(model, prompt, (batch,))
    rows: list[list[float]] = []
    began = time.perf_counter()
    while len(rows) < repetitions and (len(rows) < 2 or time.perf_counter() - began < PATIENCE):
        rows.append(_generate(model, prompt, new_tokens, batch))
        if emit is not None:
            middle = statistics.median(rows[-1][1:])
            emit("sample", {"series": f"latency.tpot.b{batch}", "value": middle, "unit": "s"})
    return rows


def _generate(model: LoadedModel, prompt: list[int], new_tokens: int, batch: int) -> list[float]:
    times = []
    last = _now(model.device)
    for _ in decode(model.network, prompt, new_tokens, batch=batch, kv_cache=model.kv_cache):
        now = _now(model.device)
        times.append(now - last)
        last = now
    return times


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _about(model: LoadedModel, prompt: list[int], new_tokens: int) -> dict[str, JsonValue]:
    return {
        "device": str(model.device),
        "machine": hardware.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.network.dtype).removeprefix("torch."),
        "kernels": kernels(model, len(prompt) + new_tokens),
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
    }


def _duration(name: str, rows: list[list[float]], details: dict[str, JsonValue]) -> Measurement:
    """The median of all seconds in `rows`; its error from how much the repetitions' own medians differ."""
    values = sorted(value for row in rows for value in row)
    spread: dict[str, JsonValue] = {f"p{p}": values[round((len(values) - 1) * p / 100)] for p in (50, 95, 99)}
    spread |= {"count": len(values), "largest": values[-1]}
    return Measurement(
        name=name, value=statistics.median(values), error=_standard_error([statistics.median(row) for row in rows]),
        unit="s", higher_is_better=False,
        details=details | spread | {"values": [statistics.median(row) for row in rows], "protocol": "median"},
    )  # fmt: skip


def _throughput(batch: int, rows: list[list[float]], details: dict[str, JsonValue]) -> Measurement:
    """Tokens of a step, one for every text of the batch, over its median time: a stall of the machine is no step's."""
    medians = [statistics.median(row[1:]) for row in rows]
    step, error = statistics.median(medians), _standard_error(medians)
    about: dict[str, JsonValue] = {
        "values": [batch / seconds for seconds in medians], "tpot": step, "tpot_error": error,
        "protocol": "tokens of a step over its median time",
    }  # fmt: skip
    return Measurement(
        name=f"throughput.b{batch}", value=batch / step, error=None if error is None else batch / step * error / step,
        unit="1/s", higher_is_better=True, details=details | about,
    )  # fmt: skip


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
