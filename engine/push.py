"""Push an artifact to a visitor's repository on the hub, with the visitor's own token.

    for kind, data in push(files, "me/small", token, stop=stop): ...

The upload runs in a process of its own, `python -m engine.uploader`, which gets the token over a pipe: it stands on no
command line, in no environment, in no file and in no log, and is gone with the process.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import JsonValue

from engine import bundle
from engine.errors import BadParams, Cancelled, RunError, short
from engine.runners.local import environment, signal_group

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
TOKEN = re.compile(r"[\x21-\x7e]{4,400}")
LONGEST = 6 * 3600.0  # seconds
POLL = 0.1
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")  # of the server, which no visitor may use

Event = tuple[str, dict[str, JsonValue]]


def push(
    files: Mapping[str, Path | bytes], repo: str, token: str, *, private: bool = True,
    stop: threading.Event | None = None, scratch: Path | None = None,
) -> Iterator[Event]:  # fmt: skip
    """Make the repository where there is none and upload; yields `creating`, `uploading` and `done`, each with data.

    `uploading` comes once a second with `seconds`, `bytes` and `files`; `done` has the `url`. scratch: where the upload
    puts things aside, by default where the system does.

    Raises:
        BadParams: no name of a repository, or nothing that can be a token.
        Cancelled: `stop` was set.
        RunError: the hub refused it or could not be reached; the line says what to do.
    """
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".ipynb")):
        raise BadParams(f"{short(repr(repo))} is no name of a repository. Write it as your-name/model-name.")
    if not TOKEN.fullmatch(token):
        raise BadParams("That is no token. Make one with write access in the hub's settings and paste it whole.")
    return _push(files, repo, token, private, stop or threading.Event(), scratch)


def _push(
    files: Mapping[str, Path | bytes], repo: str, token: str, private: bool, stop: threading.Event,
    scratch: Path | None,
) -> Iterator[Event]:  # fmt: skip
    listed = {
        name: base64.b64encode(file).decode() if isinstance(file, bytes) else None for name, file in files.items()
    }
    paths = {name: str(file) for name, file in files.items() if isinstance(file, Path)}
    request = json.dumps({"repo": repo, "token": token, "private": private, "bytes": listed, "paths": paths})
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="maquette-push-", dir=scratch) as home:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.uploader"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd=home, env=_environment(home), start_new_session=True,
        )  # fmt: skip
        try:
            yield from _follow(process, request, stop, bundle.size(files), len(files))
        finally:
            if process.poll() is None:
                signal_group(process.pid)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()


def _environment(home: str) -> dict[str, str]:
    """That of a worker, but online, without the server's own secrets and with a home that is deleted."""
    kept = {key: value for key, value in environment("cpu", 1).items() if key not in SECRETS}
    return kept | {
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE") or "0",  # as the server is, and no worker
        "HOME": home, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }  # fmt: skip


def _follow(
    process: subprocess.Popen[str], request: str, stop: threading.Event, size: int, count: int
) -> Iterator[Event]:
    """What the process says, and how long it has been at it."""
    assert process.stdin is not None
    assert process.stdout is not None
    replies: queue.Queue[str | None] = queue.Queue()

    def listen(lines: Iterator[str]) -> None:
        for line in lines:
            replies.put(line)
        replies.put(None)

    with suppress(OSError):  # it has died: its end says so
        process.stdin.write(request)
        process.stdin.close()
    threading.Thread(target=listen, args=(iter(process.stdout),), daemon=True).start()
    began = said = time.monotonic()
    uploading = False
    while True:
        if stop.is_set():
            raise Cancelled("Stopped; what was uploaded so far is no commit.")
        now = time.monotonic()
        if now - began > LONGEST:
            raise RunError(
                "The upload took too long and was ended. Try again: files that are there are not sent twice."
            )
        if uploading and now - said >= 1:
            said = now
            yield "uploading", {"seconds": now - began, "bytes": size, "files": count}
        try:
            line = replies.get(timeout=POLL)
        except queue.Empty:
            continue
        if line is None:
            raise RunError("The upload ended without a word. Try again.")
        reply = json.loads(line)
        if reply["event"] == "error":
            raise RunError(str(reply["text"]))
        if reply["event"] == "done":
            yield "done", {"url": str(reply["url"])}
            return
        uploading = reply["event"] == "uploading"
        yield str(reply["event"]), {"seconds": now - began, "bytes": size, "files": count}
