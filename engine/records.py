"""The nouns of Maquette as frozen records: what is asked (Recipe), what happens (Event), what came out.

Plain data: no side effects, JSON in and out. Times are seconds since the epoch (UTC), sizes bytes,
durations seconds; units stand in the record.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

AT_REVISION = re.compile(r"(\w[\w.-]*(?:/[\w.-]+)?)@([\w.+/-]+)", re.ASCII)  # a repo with its revision
Device = Literal["auto", "cpu", "cuda"]

USUAL_MEASURES = ("size", "memory", "latency", "perplexity", "accuracy", "divergence", "outputs")
MEASURES = (*USUAL_MEASURES, "sensitivity")  # the last before choosing what to do, of dense models


class Record(BaseModel):
    """A frozen record that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(Record):
    """A causal language model and the dtype it is loaded in: the bundled `demo`, a folder, or a repo of the hub.

    `owner/name@revision` is short for a repo at a revision; which of the three a text is, `engine.sources` says.
    """

    source: str = Field(
        "demo", min_length=1, max_length=4096, description="`demo`, owner/name of the hub, or a folder."
    )
    revision: str = Field("", max_length=255, description="Branch, tag or commit of a repo; empty: main.")
    dtype: Literal["bfloat16", "float32", "float16"] = Field("bfloat16", description="Dtype of the weights.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        body = {"source": value} if isinstance(value, str) else value
        if isinstance(body, dict) and isinstance(text := body.get("source"), str) and not body.get("revision"):
            found = AT_REVISION.fullmatch(text.strip())
            return {**body, "source": found[1], "revision": found[2]} if found else body
        return body

    @property
    def label(self) -> str:
        """As people write it: with the revision where it has one, of a commit the first digits."""
        shown = self.revision[:7] if re.fullmatch("[0-9a-f]{40}", self.revision) else self.revision
        return f"{self.source}@{shown}" if shown else self.source


class Step(Record):
    """A method with its params: `{"method": "quantize/rtn", "params": {...}}` or `{"quantize/rtn": {...}}`."""

    method: str
    params: dict[str, JsonValue] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: object) -> object:
        if isinstance(value, str):
            return {"method": value}
        if isinstance(value, dict) and len(value) == 1 and "method" not in value:
            ((method, params),) = value.items()
            return {"method": method, "params": params or {}}
        return value


class Recipe(Record):
    """A model and ordered steps, the measurements to take, a seed. No steps = the baseline."""

    model: Model = Model.model_validate("demo")
    steps: Annotated[tuple[Step, ...], Field(max_length=16)] = ()
    measure: tuple[str, ...] = USUAL_MEASURES
    seed: int = Field(0, ge=0, lt=2**31)
    calibration: str = Field("demo", min_length=1, max_length=4096, description="`demo` or a text / JSONL file.")
    device: Device = "auto"

    def title(self) -> str:
        """A short name: the methods with the settings that matter, or `original`."""
        if not self.steps and self.measure == ("sensitivity",):
            return "what each block can bear"
        return " → ".join(_step_title(step) for step in self.steps) or "original"


class Status(StrEnum):
    """Where a run stands. The last five are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    REFUSED = "refused"

    @property
    def final(self) -> bool:
        return self not in (Status.QUEUED, Status.RUNNING)


class Run(Record):
    """One execution of a recipe. `attempt` counts starts; `artifact` is a folder once it is published.

    shared: the owner lets the rest of the team look. expired: when its files were deleted to give the disk back.
    """

    id: str
    recipe: Recipe
    owner: str = ""
    status: Status = Status.QUEUED
    attempt: int = 0
    created: float
    started: float | None = None
    finished: float | None = None
    reason: str = ""
    artifact: str | None = None
    shared: bool = False
    expired: float | None = None


EventKind = Literal[
    "estimate",
    "phase",
    "progress",
    "sample",
    "log",
    "linear",
    "kept",
    "budget",
    "measurement",
    "output",
    "artifact",
    "diverged",
    "took",
    "finished",
]


class Event(Record):
    """One thing a worker said. `data` by kind:

    estimate {"memory" (B), "seconds"; "probed", "rates" once one block was measured} · phase {"name"} ·
    progress {"done", "total", "unit"; "eta" (s) where the worker knows better} ·
    sample {"series", "value", "unit"} · log {"text"} ·
    linear {"name", "bits", "error", ...}, as `quantize._place` makes it ·
    budget {"points", "uniform", "chosen"} as `quantize.mixed` makes it ·
    measurement (a Measurement) · output (an Output) · artifact {"path"} ·
    diverged (a Divergence without its attempt) · took {"method", "seconds", "rate": times what `engine.pace` thought}
    of a step that was done whole · finished {"status", "reason"}
    """

    run: str
    attempt: int
    number: int
    time: float
    kind: EventKind
    data: dict[str, JsonValue]


class Divergence(Record):
    """A training that diverged: in which attempt and step of the recipe (from 0), in which step of its own, and why.

    kept: how many steps its last good checkpoint has; 0: it has none.
    """

    attempt: int
    number: int
    step: int
    kept: int
    why: str


class Measurement(Record):
    """What was measured: value in `unit`, its standard error, how to read it, and the protocol in `details`."""

    name: str
    value: float
    error: float | None = None
    unit: str
    higher_is_better: bool | None = None
    details: dict[str, JsonValue] = {}


class Token(Record):
    """One token as a model saw it.

    `probability` is the model's own for this token; `top` its five likeliest (text, probability);
    `kl` the divergence of its prediction from the baseline's in nats, where the baseline is known.
    """

    text: str
    probability: float
    top: tuple[tuple[str, float], ...] = ()
    kl: float | None = None


class Output(Record):
    """What a model wrote after a fixed prompt (`tokens`, greedy), and how it saw the baseline's own text.

    `forced` are the baseline's tokens with this model's probabilities and KL (teacher-forced).
    """

    prompt: str
    tokens: tuple[Token, ...]
    forced: tuple[Token, ...] = ()


RUN_ID = re.compile(r"[0-9a-z]{4,32}(?:-[0-9a-z]{1,32})*")


NAMES = {  # of methods in titles, where they are not those of their files: one word each
    "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "gptq": "GPTQ", "hqq": "HQQ", "kv_cache": "KV-cache",
    "logits": "Distilled", "low_rank": "Low-rank", "on_policy": "On-policy", "rtn": "RTN",
    "smoothquant": "SmoothQuant", "sparsegpt": "SparseGPT", "zeroquant": "ZeroQuant",
}  # fmt: skip


def _step_title(step: Step) -> str:
    name = step.method.rsplit("/", 1)[-1]
    params = step.params
    shown = []
    if "bits" in params:
        shown.append(f"{params['bits']} bit")
    if isinstance(budget := params.get("budget"), int | float):
        unit = {"mib": "MiB", "memory": "MiB of memory"}.get(str(params.get("unit")), "bit")
        shown.append(f"{budget:g} {unit}")
    if "scheme" in params:
        shown.append(str(params["scheme"]))
    if (pattern := params.get("pattern", "unstructured")) != "unstructured":
        shown.append(str(pattern))
    elif isinstance(sparsity := params.get("sparsity"), int | float):
        shown.append(f"{sparsity:.0%}")
    if name == "depth" and isinstance(count := params.get("count"), int) and count:
        shown.append(f"{count} blocks")
    elif name == "depth" and isinstance(part := params.get("share"), int | float):
        shown.append(f"{part:.0%} of blocks")
    if name == "width":
        shares = {axis: params.get(axis) for axis in ("neurons", "heads", "channels")}
        shown += [
            f"{value:.0%} of {axis}" for axis, value in shares.items() if isinstance(value, int | float) and value
        ]
    if "keep_every" in params and params.get("student", "blocks") == "blocks":
        shown.append(f"1/{params['keep_every']} blocks")
    return " ".join([NAMES.get(name, name.capitalize()), *shown])
