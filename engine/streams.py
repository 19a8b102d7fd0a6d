"""Text from several models side by side: one warm worker process per model, merged into one stream.

A worker is lent to one reader at a time. Nobody holds one while waiting for another, so readers cannot
block one another for good.
"""

from __future__ import annotations

import json
import math
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from pydantic import JsonValue

from engine import fit, hardware, headers, sizes
from engine.errors import BadText, InputError, Interrupted, MaquetteError, RunError, TooBig
from engine.runners.local import COMMAND, environment, signal_group
from engine.sizes import Holding

Body = dict[str, JsonValue]
Reply = tuple[int, str, Body]

MOST = 4  # warm workers, and panes
IDLE = 600.0  # seconds after which an unused worker ends
POLL = 0.05  # seconds between looks at whether the reader has gone
PATIENCE = 5.0  # seconds that a worker has to heed a stop
RUNTIME = fit.RUNTIME  # bytes that a warm worker takes beside its model
LONGEST_PROMPT = 20_000  # characters
LONGEST_TEXT = 2048  # tokens
MOST_LIKELY = 1000  # the largest top-k
MOST_STOPS, LONGEST_STOP = 8, 80  # texts that end writing, and the characters of one


class Warm:
    """A worker process that holds one model; `busy` while it is lent, `loaded` once it has taken its memory."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.busy, self.used, self.ready, self.loaded = False, time.monotonic(), False, False
        self._reason = ""  # why it could not be loaded
        self.model, self.needed = model, memory_of(model)
        self.device = device = device_of_workers()
        request = folder / "request.json"
        folder.mkdir(parents=True)
        request.write_text(json.dumps({"kind": "serve", "model": str(model), "device": device}))
        with open(folder / "worker.log", "wb") as errors:
            self._process = subprocess.Popen(
                [*COMMAND, str(request)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=folder,
                start_new_session=True, env=environment(device, hardware.worker_threads()), text=True, bufsize=1,
            )  # fmt: skip
        self._replies: queue.Queue[Body | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def reserved(self) -> int:
        """Bytes that are not taken yet and will be: while it loads, all that it needs."""
        return self.needed if not self.loaded and self.alive() else 0

    def held(self) -> int:
        """Bytes of its device's memory that its end gives back."""
        if not self.loaded:
            return 0
        return _parts_of(self.model)[0] if self.device == "cuda" else hardware.own_memory(self.pid)

    def close(self) -> None:
        """End the process and its children, at once."""
        if self._process.returncode is None:
            signal_group(self.pid)
            self._process.wait()
        with suppress(OSError):  # what it did not read any more
            assert self._process.stdin is not None
            self._process.stdin.close()

    def wait_ready(self, gone: threading.Event) -> None:
        """Return when the model is loaded.

        Raises:
            RunError: it cannot be loaded.
            Interrupted: the reader has gone.
        """
        while not self.ready:
            if self._reason:
                raise RunError(self._reason)
            reply = self._next()
            if reply is not None:
                self.ready = reply["event"] == "ready"
                if not self.ready:
                    self._reason = str(reply.get("text", "The model could not be loaded."))
            elif gone.is_set():
                raise Interrupted("Stopped.")

    def ask(self, command: Body, gone: threading.Event) -> Iterator[tuple[str, Body]]:
        """Send a command and give its replies, the last one `done` or `error`; stop it when the reader has gone."""
        self._send(command)
        told: float | None = None
        while True:
            reply = self._next()
            if gone.is_set() and told is None:
                told = time.monotonic()
                self._send({"do": "stop"})
            if reply is not None:
                event = str(reply.pop("event"))
                if event == "done" and told is not None:
                    reply["stopped"] = True
                yield event, reply
                if event in ("done", "error"):
                    return
            elif told is not None and time.monotonic() - told > PATIENCE:
                self.close()

    def _send(self, command: Body) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # a dead process is noticed by its replies
            self._process.stdin.write(json.dumps(command) + "\n")

    def _next(self) -> Body | None:
        """The next reply, None where there is none yet.

        Raises:
            RunError: the process has died.
        """
        with suppress(queue.Empty):
            reply = self._replies.get(timeout=POLL)
            if reply is None:
                self._replies.put(None)
                raise RunError("The process that held the model has ended; it may have run out of memory. Try again.")
            return reply
        return None

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with suppress(ValueError):  # a library's own words
                    reply = json.loads(line)
                    if isinstance(reply, dict) and "event" in reply:
                        self.loaded = True  # also where nobody waits for it any more
                        self._replies.put(reply)
        self._replies.put(None)


def device_of_workers() -> str:
    """Where a warm worker holds its model."""
    return "cpu" if hardware.gpu() is None else "cuda"


def memory_of(model: Path) -> int:
    """Bytes that a worker with this model takes once it is loaded, and writes its longest text."""
    return RUNTIME + sum(_parts_of(model))


@lru_cache(maxsize=64)
def _parts_of(model: Path) -> tuple[int, int]:
    """Bytes of a model's weights in memory, and of what it takes while it writes."""
    try:
        shape = headers.inspect(model)
        writing = fit.serving(Holding(shape, 2, grid=shape.cache_grid), 1, LONGEST_TEXT).parts
        return sizes.loaded_bytes(model), writing.get("kv_cache", 0) + writing.get("activations", 0)
    except (MaquetteError, OSError):  # its worker will say so
        return 0, 0


class Streams:
    """The warm workers of one scheduler; what they put aside lies in `folder`, from the first of them on."""

    def __init__(self, folder: Path) -> None:
        self._warm: dict[Path, Warm] = {}
        self._guard = threading.Lock()
        self._closed = False
        self._folder = folder
        self._count = 0

    def write(
        self, models: list[Path], prompt: str, *, max_tokens: int, temperature: float, seed: int, same_text: bool,
        top_p: float = 1.0, top_k: int = 0, stop_strings: Sequence[str] = (), chat: bool = False, system: str = "",
        stop: threading.Event | None = None,
    ) -> Iterator[Reply]:  # fmt: skip
        """Yield (pane, event, data) as it happens; closing the iterator, or setting `stop`, stops the models.

        Events: `loading` while a model is not ready, `token` with a Token and its `id`, then `done` with `ttft`,
        `tpot`, `tokens` and the `stop_string` that ended it (and `stopped` where a reader did), or `error` with
        `text`. With `same_text` the first model writes and the others say how they see its text, with the KL of each
        token from the first model's prediction. With `chat` the prompt is what a user says in each model's own chat
        template, after `system` where that is not empty.

        Raises:
            InputError: no model or too many, no prompt, or a number out of its bounds.
            RunError: the streams are closed.
        """
        if self._closed:
            raise RunError("Maquette is shutting down.")
        if not 1 <= len(models) <= MOST:
            raise InputError(f"{len(models)} models were chosen; compare 1 to {MOST}.")
        if not prompt.strip() or "\0" in prompt or len(prompt) > LONGEST_PROMPT:
            raise BadText(f"The prompt has {len(prompt):,} characters; write 1 to {LONGEST_PROMPT:,}, and no NUL.")
        if not 1 <= max_tokens <= LONGEST_TEXT:
            raise InputError(f"max_tokens is {max_tokens}; it must lie in 1 to {LONGEST_TEXT}.")
        if not (math.isfinite(temperature) and 0 <= temperature <= 5) or not 0 <= seed < 2**31:
            raise InputError("The sampling temperature must lie in 0 to 5, the seed in 0 to 2147483647.")
        if not (math.isfinite(top_p) and 0 < top_p <= 1) or not 0 <= top_k <= MOST_LIKELY:
            raise InputError(f"top-p must lie above 0 and up to 1, top-k in 0 (all) to {MOST_LIKELY}.")
        if len(stop_strings) > MOST_STOPS or not all(0 < len(each) <= LONGEST_STOP for each in stop_strings):
            raise InputError(f"Give up to {MOST_STOPS} stop texts, each of 1 to {LONGEST_STOP} characters.")
        if "\0" in system or len(system) > LONGEST_PROMPT:
            raise BadText(
                f"The system prompt has {len(system):,} characters; write up to {LONGEST_PROMPT:,}, and no NUL."
            )
        generate: Body = {
            "do": "generate", "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "seed": seed,
            "top_p": top_p, "top_k": top_k,
            "stop_strings": list(stop_strings), "chat": chat, "system": system, "write": None,
        }  # fmt: skip
        return self._write(models, generate, same_text and len(models) > 1, stop)

    def pids(self) -> list[int]:
        """The warm processes."""
        with self._guard:
            return [warm.pid for warm in self._warm.values()]

    def models(self) -> list[Path]:
        """The folders of the models that are held."""
        with self._guard:
            return [*self._warm]

    def spare(self, device: str) -> int:
        """Bytes of a device's memory that `end_unused` would give back."""
        with self._guard:
            return sum(warm.held() for warm in self._warm.values() if not warm.busy and warm.device == device)

    def end_idle(self) -> None:
        """End workers that were not used for a while."""
        now = time.monotonic()
        with self._guard:
            for model, warm in list(self._warm.items()):
                if not warm.busy and now - warm.used > IDLE:
                    self._end(model)

    def end_unused(self, enough: Callable[[], bool] = lambda: False) -> bool:
        """End workers that nobody uses now, the ones used longest ago first, until it is enough; whether any ended."""
        with self._guard:
            found = False
            while not enough() and self._make_room():
                found = True
            return found

    def close(self) -> None:
        """End all workers; streams that are being read end with an error."""
        with self._guard:
            self._closed = True
            for model in list(self._warm):
                self._end(model)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(
        self, models: list[Path], generate: Body, same_text: bool, stop: threading.Event | None
    ) -> Iterator[Reply]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as folder:
            stream = _Stream(_Gone(stop))
            file = str(Path(folder, "logprobs.safetensors")) if same_text else None
            for pane, model in enumerate(models):
                if same_text and pane:
                    command: Body = {key: generate[key] for key in ("prompt", "chat", "system")}
                    command |= {"do": "score", "read": file}
                else:
                    command = {**generate, "write": file}
                threading.Thread(target=self._pane, args=(pane, model, command, stream), daemon=True).start()
            try:
                panes = len(models)
                while panes:
                    reply = stream.inbox.get()
                    panes -= reply[1] in ("done", "error")
                    yield reply
            finally:
                stream.gone.set()

    def _pane(self, pane: int, model: Path, command: Body, stream: _Stream) -> None:
        """One model's part of a stream."""
        ids: list[JsonValue] = []
        last: tuple[str, Body] = ("error", {"text": "The text ended early. Try again."})
        try:
            if command["do"] == "score":
                with self._borrow(pane, model, stream):
                    pass  # load while the first model writes, but hold nothing while waiting for it
                command = {**command, "token_ids": stream.wait_text()}
            with self._borrow(pane, model, stream) as warm:
                for event, data in warm.ask(command, stream.gone):
                    if event == "token":
                        ids.append(data["id"])
                        stream.inbox.put((pane, event, data))
                    else:
                        last = (event, data)
        except MaquetteError as error:
            last = ("error", {"text": str(error)})
        finally:
            if command["do"] == "generate":
                stream.text.put(ids if last[0] == "done" else None)
            stream.inbox.put((pane, *last))

    @contextmanager
    def _borrow(self, pane: int, model: Path, stream: _Stream) -> Iterator[Warm]:
        """Hold the model's worker, started where there is none; the reader hears `loading` when that takes time."""
        said = False
        while (warm := self._try_borrow(model)) is None:
            if not said:
                stream.inbox.put((pane, "loading", {}))
                said = True
            if stream.gone.wait(POLL):
                raise Interrupted("Stopped.")
        try:
            if not warm.ready and not said:
                stream.inbox.put((pane, "loading", {}))
            warm.wait_ready(stream.gone)
            yield warm
        finally:
            with self._guard:
                warm.busy, warm.used = False, time.monotonic()

    def _try_borrow(self, model: Path) -> Warm | None:
        with self._guard:
            if self._closed:
                raise Interrupted("Maquette is shutting down.")
            warm = self._warm.get(model)
            if warm is not None and not warm.alive():
                self._end(model)
                warm = None
            if warm is None and self._has_room(model):
                self._count += 1
                warm = self._warm[model] = Warm(model, self._folder / f"warm-{self._count}")
            if warm is None or warm.busy:
                return None
            warm.busy = True
            return warm

    def _has_room(self, model: Path) -> bool:
        """Whether one more model may be held, after those that nobody uses have gone where they must.

        Raises:
            TooBig: it does not fit beside those that write, which none of them waits for.
        """
        needed = memory_of(model)
        device = device_of_workers()
        while len(self._warm) >= MOST or hardware.free_on(device) < needed + self._reserved():
            if self._make_room():
                continue
            if not self._warm:
                raise TooBig(
                    f"This model needs {needed / 2**30:.1f} GiB to write, and "
                    f"{hardware.free_on(device) / 2**30:.1f} GiB are free. Wait until a run has ended, or compare a "
                    "smaller one."
                )
            return False
        return True

    def _reserved(self) -> int:
        return sum(warm.reserved() for warm in self._warm.values())

    def _make_room(self) -> bool:
        unused = [model for model, warm in self._warm.items() if not warm.busy]
        if unused:
            self._end(min(unused, key=lambda model: self._warm[model].used))
        return bool(unused)

    def _end(self, model: Path) -> None:
        self._warm.pop(model).close()


class _Gone(threading.Event):
    """Set when the reader has left a stream, or asked it to stop; the reader's own event is only looked at."""

    def __init__(self, stop: threading.Event | None) -> None:
        super().__init__()
        self._asked = stop

    def is_set(self) -> bool:
        return super().is_set() or (self._asked is not None and self._asked.is_set())

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set() or super().wait(timeout) or self.is_set()


class _Stream:
    """What the panes of one stream share: their replies, whether the reader has gone, the first model's text."""

    def __init__(self, gone: threading.Event) -> None:
        self.inbox: queue.Queue[Reply] = queue.Queue()
        self.gone = gone
        self.text: queue.Queue[list[JsonValue] | None] = queue.Queue()

    def wait_text(self) -> list[JsonValue]:
        """The token ids that the first model wrote; left in place for the next pane.

        Raises:
            RunError: it failed.
            Interrupted: the reader has gone.
        """
        while not self.gone.is_set():
            with suppress(queue.Empty):
                ids = self.text.get(timeout=POLL)
                self.text.put(ids)
                if ids is None:
                    raise RunError("The first model wrote no text that could be compared.")
                return ids
        raise Interrupted("Stopped.")
