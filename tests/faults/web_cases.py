"""Bad visitors: markup, formulas, other people's runs, deep links, and what only a script would send."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from typing import Any

from tests.faults.scene import Case, Ends, Scene
from tests.faults.served import FORMULA, MARKUP
from tests.faults.visitor import JSON, Visitor

CLOSE = {"connection": "close"}  # what is refused half read ends its connection
Look = Callable[[Scene, Visitor], str]


def web(name: str, ends: Ends, says: str) -> Callable[[Look], Case]:
    """Makes a case of a function that returns the line."""
    return lambda look: Case(f"web: {name}", ends, says, act=lambda scene, place, patch: _safe(scene, look))


def _safe(scene: Scene, look: Look) -> str:
    """The line of a visitor's act; afterwards the page still answers and Ben's run is as it was."""
    said = look(scene, scene.page.visitor)
    assert scene.page.visitor.http.get("/healthz").json() == {"status": "ok"}
    assert scene.page.runs(scene.page.his.owner) == [scene.page.his]
    assert scene.page.runs(scene.page.hers.owner) == [scene.page.hers]
    return said


def one(answer: tuple[dict[str, Any], list[str]]) -> str:
    """The only line in the corner; what Gradio itself does not take has none."""
    if not answer[1] and not answer[0]["success"]:
        return "not taken by Gradio"
    (line,) = answer[1]
    return line


def arriving(visitor: Visitor, **query: str) -> str:
    """The line that a deep link gives."""
    return one(load(visitor, **query))


def load(visitor: Visitor, **query: str) -> tuple[dict[str, Any], list[str]]:
    """What a page asks for that was opened with these words in its address, once it knows that they matter."""
    shown = visitor.component("mq-model" if "recipe" in query else "mq-summary")
    fills = (d for d in visitor.config["dependencies"] if shown in d["outputs"] and not d["inputs"])
    address = f"/gradio_api/queue/join?{urllib.parse.urlencode(query)}"
    return visitor.call(next(fills)["id"], [], address=address)


def pages(visitor: Visitor, path: str) -> str:
    """A status and what is said, in one line."""
    answer = visitor.http.get(path, follow_redirects=False, headers=CLOSE)
    assert "Traceback" not in answer.text
    assert "root:" not in answer.text
    return f"{answer.status_code} {answer.text[:200]}".replace("\n", " ")


def posts(visitor: Visitor, path: str, **request: Any) -> str:
    answer = visitor.http.post(path, **{**request, "headers": {**request.get("headers", {}), **CLOSE}})
    assert "Traceback" not in answer.text
    return f"{answer.status_code}"


def run_both(visitor: Visitor, prompt: object) -> str:
    """Press Run on the Compare tab with a prompt."""
    wanted = visitor.handler("mq-run-both", "click")
    handler = next(each for each in visitor.config["dependencies"] if each["id"] == wanted)
    load(visitor)  # which tells Gradio what the pickers offer
    shown = {int(each["id"]): each["props"].get("value") for each in visitor.config["components"]}
    pickers = [int(each["id"]) for each in visitor.config["components"] if each["type"] == "dropdown"]
    first = [each for each in pickers if each in handler["inputs"]][:2]
    shown |= dict.fromkeys(first, "stored:0") | {visitor.component("mq-prompt"): prompt}
    data = [shown[each] for each in handler["inputs"]]
    return one(visitor.call(handler["id"], data))


@web("markup in names, phases and logs", "handled", "&lt;script&gt;")
def markup(scene: Scene, visitor: Visitor) -> str:
    message, lines = visitor.call(
        visitor.handler("mq-runs", "select"), ["", None], event_data={"run": scene.page.hers.id}
    )
    assert lines == []
    body = json.dumps(message["output"]["data"])
    assert MARKUP not in body
    assert scene.page.hers.id in body
    return "&lt;script&gt;" if "&lt;script&gt;" in body else body


@web("formulas in a CSV", "handled", f"'{FORMULA}")
def formulas(scene: Scene, visitor: Visitor) -> str:
    rows = visitor.http.get(f"/runs/{scene.page.hers.id}/measurements.csv").text.splitlines()
    assert not any(row.startswith(("=", "@", "+", "-")) for row in rows)
    return next(row for row in rows if FORMULA in row)


@web("markup in a report", "handled", "`script>`")  # in Markdown what stands between backticks is text
def report(scene: Scene, visitor: Visitor) -> str:
    answer = visitor.http.get(f"/runs/{scene.page.hers.id}/report.md")
    assert answer.headers["content-type"].startswith("text/markdown")
    assert answer.headers["x-content-type-options"] == "nosniff"
    return next(row for row in answer.text.splitlines() if "script" in row)


@web("another visitor's run, selected", "refused", "Unknown run")
def selected(scene: Scene, visitor: Visitor) -> str:
    return one(visitor.call(visitor.handler("mq-runs", "select"), ["", None], event_data={"run": scene.page.his.id}))


@web("another visitor's run, picked", "refused", "not taken")
def picked(scene: Scene, visitor: Visitor) -> str:
    return one(visitor.call(visitor.handler("mq-picks", "input"), [[scene.page.his.id, scene.page.hers.id]]))


@web("another visitor's run, in a link", "refused", "Unknown run")
def linked(scene: Scene, visitor: Visitor) -> str:
    return arriving(visitor, compare=f"{scene.page.his.id},{scene.page.hers.id}")


@web("another visitor's run, downloaded", "refused", "404 Not found.")
def downloaded(scene: Scene, visitor: Visitor) -> str:
    return pages(visitor, f"/runs/{scene.page.his.id}/report.md")


@web("another visitor's run, cancelled through the button", "handled", "")
def cancelled(scene: Scene, visitor: Visitor) -> str:
    _, lines = visitor.call(visitor.handler("mq-cancel-now", "click"), [])
    return " ".join(lines)


@web("a run id like a path", "refused", "Unknown run")
def path_id(scene: Scene, visitor: Visitor) -> str:
    return one(visitor.call(visitor.handler("mq-runs", "select"), ["", None], event_data={"run": "../../etc/passwd"}))


@web("a run id of a megabyte", "refused", "Unknown run")
def long_id(scene: Scene, visitor: Visitor) -> str:
    return one(visitor.call(visitor.handler("mq-runs", "select"), ["", None], event_data={"run": "a" * (1 << 20)}))


@web("a link with a recipe that is none", "refused", "Unknown key")
def bad_link(scene: Scene, visitor: Visitor) -> str:
    return arriving(visitor, recipe="zeal: 1")


@web("a link with a recipe without end", "refused", "too long")
def long_link(scene: Scene, visitor: Visitor) -> str:
    return arriving(visitor, recipe="# " + "x" * 30_000)


@web("a link to a comparison of markup", "refused", "Pick two to four results")
def markup_link(scene: Scene, visitor: Visitor) -> str:
    return arriving(visitor, compare=MARKUP)


@web("a link to nothing but commas", "refused", "Pick two to four results")
def comma_link(scene: Scene, visitor: Visitor) -> str:
    return arriving(visitor, compare="," * 500)


@web("an empty prompt", "refused", "The prompt is empty")
def empty_prompt(scene: Scene, visitor: Visitor) -> str:
    return run_both(visitor, "  \n")


@web("a prompt above the limit", "refused", "the limit is")
def long_prompt(scene: Scene, visitor: Visitor) -> str:
    return run_both(visitor, "x" * 100_000)


@web("a preset that is not offered", "refused", "not taken")
def preset(scene: Scene, visitor: Visitor) -> str:
    return one(visitor.call(visitor.handler("mq-preset", "input"), ["__proto__", None, None]))


@web("a file of the machine", "refused", "40")
def file_route(scene: Scene, visitor: Visitor) -> str:
    return pages(visitor, "/gradio_api/file=/etc/passwd")


@web("the run store as a file", "refused", "40")
def store_route(scene: Scene, visitor: Visitor) -> str:
    return pages(visitor, f"/gradio_api/file={scene.page.home}/maquette.db")


@web("a download outside of the run", "refused", "404")
def traversal(scene: Scene, visitor: Visitor) -> str:
    return pages(visitor, f"/runs/{scene.page.hers.id}/..%2f..%2f..%2fmaquette.db")


@web("a proxy into the network", "refused", "4")
def proxy(scene: Scene, visitor: Visitor) -> str:
    return pages(visitor, "/gradio_api/proxy=http://127.0.0.1:22/")


@web("a handler that does not exist", "refused", "500")  # Gradio's own answer, without a word of our code
def no_handler(scene: Scene, visitor: Visitor) -> str:
    return posts(visitor, "/gradio_api/run/predict", json={"fn_index": 99_999, "data": [], "session_hash": "x"})


@web("a body that is no JSON", "refused", "4")
def no_json(scene: Scene, visitor: Visitor) -> str:
    return posts(visitor, "/gradio_api/queue/join", content=b"{", headers=JSON)


@web("data that is a word", "refused", "4")
def no_list(scene: Scene, visitor: Visitor) -> str:
    return posts(visitor, "/gradio_api/queue/join", content=b'{"fn_index": 1, "data": "x"}', headers=JSON)


@web("an upload above the limit", "refused", "4")
def upload(scene: Scene, visitor: Visitor) -> str:
    return posts(visitor, "/gradio_api/upload", files={"files": ("a.bin", b"x" * (3 << 20))})


CASES = [
    markup, formulas, report, selected, picked, linked, downloaded, cancelled, path_id, long_id, bad_link, long_link,
    markup_link, comma_link, empty_prompt, long_prompt, preset, file_route, store_route, traversal, proxy, no_handler,
    no_json, no_list, upload,
]  # fmt: skip
