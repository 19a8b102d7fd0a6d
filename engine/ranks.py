"""A step that trains a whole network, in a process for each GPU.

The run's process writes the model to a folder, starts the processes and waits; they apply the step together, as
`engine.distributed` says, and the first writes what came of it, which the run reads back and goes on with.

The processes are `python -m engine.worker` with the variables of `torchrun`, which can start them as well. It is not
what starts them here, for it gives each a session of its own: what stops a run, or bounds its memory, knows its
process group. MAQUETTE_PROCESSES says how many, also on a CPU; without it there is one for each GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch
from pydantic import JsonValue

from engine import artifacts, distributed, hardware, intermediate, methods
from engine.children import event_kind, lines
from engine.errors import InputError, RunError, short
from engine.experts import Experts
from engine.methods import Context, Emit, Method, Params
from engine.models import LoadedModel
from engine.records import EventKind, Recipe

Request = dict[str, JsonValue]
VARIABLE = "MAQUETTE_PROCESSES"


def wanted(params: Params, model: LoadedModel, context: Context) -> int:
    """How many processes are to train; 1 where the step or the model cannot be shared among several.

    Raises:
        InputError: the environment asks for what cannot be.
    """
    gpus = torch.cuda.device_count() if context.device == "cuda" else 0
    asked = os.environ.get(VARIABLE, "").strip() or str(max(gpus, 1))
    if not asked.isascii() or not asked.isdigit() or not 1 <= int(asked) <= 1024:
        raise InputError(f"{VARIABLE} is {short(asked)!r}. Use a number from 1 to 1024, or leave it out.")
    if context.device == "cuda" and int(asked) > gpus:
        raise InputError(f"{VARIABLE} is {asked}, and torch sees {gpus} GPU{'s' * (gpus != 1)}. Use {gpus} or less.")
    found = min(int(asked), params.processes())
    if found > 1 and any(isinstance(each, Experts) for each in model.network.modules()):
        # An expert without a token has no gradient: the processes would not exchange the same.
        context.log("mixtures of experts train in one process")
        return 1
    if found > 1 and model.quantized:
        context.log("weights on a grid train in one process")  # they are learned beside the network
        return 1
    return found


def apply(
    method: Method, params: Params, model: LoadedModel, context: Context, count: int, original: bool
) -> LoadedModel:
    """The step's model, made by `count` processes; `original`: the model is still what its source holds.

    Raises:
        RunError: a process failed; the reason is its own.
    """
    source, dtype = model.source, str(model.network.dtype).removeprefix("torch.")
    begun, trained = context.folder / "begun", context.folder / "trained"
    context.folder.mkdir(parents=True, exist_ok=True)
    if not trained.exists():
        if not original and not begun.exists():
            artifacts.write(model, Recipe.model_validate({}), begun)
        model.network.to(torch.device("meta"))  # type: ignore[arg-type]  # the stub takes the method for an unbound one
        hardware.give_back_memory()
        context.log(f"training in {count} processes")
        request: Request = {
            "kind": "train", "method": method.name, "params": params.model_dump(mode="json"),
            "model": str(source if original else begun), "source": str(source), "dtype": dtype,
            "device": context.device, "seed": context.seed, "torch_seed": torch.initial_seed(),
            "folder": str(context.folder), "cache": str(context.cache), "calibration": str(context.calibration),
        }  # fmt: skip
        _train(request, count, context)
    return intermediate.read(trained, dtype, context.device, source)


def _train(request: Request, count: int, context: Context) -> None:
    """Start the processes and pass on what the first says, until all have ended; none is left, whatever happens."""
    path, place = context.folder / "train.json", context.folder / "meeting"
    path.write_text(json.dumps(request | {"place": f"file://{place.absolute()}"}))
    place.unlink(missing_ok=True)
    threads = str(max(1, torch.get_num_threads() // count))
    common = os.environ | {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": threads}
    if sys.platform == "linux":
        common.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no port that others reach
    processes: list[subprocess.Popen[bytes]] = []

    def look() -> None:
        if any(process.poll() for process in processes):
            raise RunError(
                "A process that trained was ended from outside; memory may have run out. Use a smaller batch."
            )

    with ExitStack() as stack:
        life, said = _pipe(stack), _pipe(stack)
        try:
            for number in range(count):
                own = common | {"RANK": str(number), "LOCAL_RANK": str(number)}
                command = [sys.executable, "-m", "engine.worker", str(path)]
                processes.append(subprocess.Popen(command, stdin=life[0], stdout=said[1], env=own))
            said[1].close()  # so that the pipe ends with the processes
            for line in lines(said[0], context.check_cancelled, look):
                try:
                    event = json.loads(line)
                except ValueError:  # libraries below Python write to stdout, too: NCCL, when it is asked to
                    sys.stderr.buffer.write(line + b"\n")
                    continue
                if event["kind"] != "finished":
                    context.emit(event_kind(event["kind"]), event["data"])
                elif event["data"]["status"] != "succeeded":
                    if any((process.poll() or 0) < 0 for process in processes):
                        look()  # that one was killed is the reason for what the others say
                    raise RunError(short(event["data"]["reason"], 400))
            for process in processes:
                process.wait()
            look()
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return stack.enter_context(open(read, "rb")), stack.enter_context(open(write, "wb"))


def work(request: Request, emit: Emit) -> None:
    """Apply a step in one of the processes; the first writes the model and speaks for all."""
    place = "env://"
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # which `torchrun` sets
        place = str(request["place"])
        threading.Thread(target=_end_with_the_run, daemon=True).start()
    device, folder = str(request["device"]), Path(str(request["folder"]))
    method, settings = methods.get(str(request["method"])), request["params"]
    assert isinstance(settings, dict)
    hardware.keep_memory()
    with distributed.joined(device, place):
        context = Context(
            device, int(str(request["seed"])), folder, Path(str(request["cache"])), Path(str(request["calibration"])),
            emit if distributed.rank() == 0 else _say_nothing, _go_on,
        )  # fmt: skip
        model = intermediate.read(
            Path(str(request["model"])), str(request["dtype"]), device, Path(str(request["source"]))
        )
        torch.manual_seed(int(str(request["torch_seed"])))
        with torch.no_grad():
            model = method.apply(model, method.check(settings), context)
        if distributed.rank() == 0:
            artifacts.write(model, Recipe.model_validate({}), folder / "trained")
        distributed.wait()


def _end_with_the_run() -> None:
    """Nobody writes to this pipe; it ends when the run's process does, however that came."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _say_nothing(kind: EventKind, data: dict[str, JsonValue]) -> None:
    """The first process speaks."""


def _go_on() -> None:
    """Nobody stops a process but the run that started it."""
