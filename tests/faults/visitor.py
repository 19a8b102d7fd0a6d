"""A visitor without a browser: the page's HTTP API as a browser, or a script, speaks it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

import httpx

Answer = dict[str, Any]


class Visitor:
    """One cookie and one Gradio session at the address of a running page."""

    def __init__(self, address: str, cookie: str | None = None) -> None:
        self.name = cookie or f"visitor-{secrets.token_hex(12)}"
        self.session = secrets.token_hex(6)
        self.http = httpx.Client(base_url=address, cookies={"maquette_visitor": self.name}, timeout=60)
        self.config: Answer = self.http.get("/config").json()

    def close(self) -> None:
        self.http.close()

    def component(self, name: str) -> int:
        """The id of the component with an `elem_id`."""
        return next(int(c["id"]) for c in self.config["components"] if c["props"].get("elem_id") == name)

    def handler(self, trigger: str, event: str) -> int:
        """The index of the handler of a component's event."""
        wanted = [self.component(trigger), event]
        return next(d["id"] for d in self.config["dependencies"] if wanted in [list(t) for t in d["targets"]])

    def reading(self, name: str) -> int:
        """The index of the first handler that reads a component."""
        wanted = self.component(name)
        return next(d["id"] for d in self.config["dependencies"] if wanted in d["inputs"])

    def call(
        self, handler: int, data: Sequence[object], address: str = "/gradio_api/queue/join", **more: object
    ) -> tuple[Answer, list[str]]:
        """Send an event as the page does, through the queue; the last message, and the lines shown in the corner."""
        body = {"fn_index": handler, "data": list(data), "session_hash": self.session, **more}
        joined = self.http.post(address, content=json.dumps(body), headers=JSON)
        if joined.status_code != 200:
            return {"success": False, "output": joined.json()}, [str(joined.json().get("detail"))]
        event = joined.json()["event_id"]
        lines: list[str] = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line.removeprefix("data:"))
                if message.get("event_id") != event:
                    continue
                if message["msg"] == "log":
                    lines.append(str(message["log"]))
                if message["msg"] == "process_completed":
                    return message, lines
        return {"success": False, "output": {}}, lines

    def start(self, recipe: str) -> list[str]:
        """Paste a recipe and press Start where the page took it; the lines in the corner."""
        paste, start = self.reading("mq-paste"), self.handler("mq-start", "click")
        _, lines = self.call(paste, [recipe, *[None] * (self.inputs(paste) - 1)])
        return lines or self.call(start, [None, False, *[""] * (self.inputs(start) - 2)])[1]

    def inputs(self, handler: int) -> int:
        """How many values a handler takes."""
        return len(next(d for d in self.config["dependencies"] if d["id"] == handler)["inputs"])


JSON = {"content-type": "application/json"}
