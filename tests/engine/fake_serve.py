"""A warm worker without a model, speaking `engine.serve`'s protocol: `python fake_serve.py REQUEST`.

Its text is the numbers from 0; a model named `broken` does not load, `dies` ends while writing, `deaf` heeds no stop.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path


def reply(**body: object) -> None:
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


def main() -> None:
    name = Path(json.loads(Path(sys.argv[1]).read_text())["model"]).name
    if name == "broken":
        reply(event="error", text="weights are missing")
        return
    sys.stdout.write("a library talks\n")
    reply(event="ready", kernels=[name])
    commands: list[dict] = []
    stop = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            body = json.loads(line)
            if body["do"] == "stop":
                stop.set()
            else:
                stop.clear()
                commands.append(body)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        if commands:
            work(name, commands.pop(0), stop)
        time.sleep(0.005)


def work(name: str, command: dict, stop: threading.Event) -> None:
    if command["do"] == "score":
        found = json.loads(Path(command["read"]).read_text())
        for number in command["token_ids"]:
            reply(event="token", id=number, text=name, kl=found)
        reply(event="done", tokens=len(command["token_ids"]))
        return
    if command["write"]:
        Path(command["write"]).write_text("0.5")
    for number in range(command["max_tokens"]):
        reply(event="token", id=number, text=name)
        if name == "dies":
            os._exit(1)
        time.sleep(0.02)
        if stop.is_set() and name != "deaf":
            break
    reply(event="done", tokens=number + 1)


main()
