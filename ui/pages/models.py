"""The model picker: search of the hub as one types, models used before, the token for a gated one, what was found.

The token is a value of the page alone: it comes along with a call that needs it and is kept nowhere on the server but
in the memory of a run that waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gradio as gr
from markupsafe import Markup

from engine import headers, places
from engine.errors import BadModel, MaquetteError
from engine.hub import Hub, RepoOrigin
from engine.records import Model
from engine.repos import Found, check_token
from engine.sources import BUNDLED, Bundled, Folder, Repo, classify
from ui import markup, wording
from ui.desk import Desk
from ui.edge import edge, line, visitor
from ui.wiring import on
from ui.wording import say

SHORTEST, LONGEST = 2, 96  # characters of a search
RECENT = 6


@dataclass(frozen=True)
class Picker:
    """The components that others on the page reach for."""

    source: gr.Textbox
    token: gr.Textbox


def build(desk: Desk, opened: Callable[..., object]) -> Picker:
    """Lay the picker out and wire it; when it is `opened` it says what was used before."""
    source = gr.Textbox(
        "demo", label=say("compress.model"), max_lines=1, max_length=4096, elem_id="mq-model",
        info=say("compress.model.info" if desk.local else "models.info.shared"),
    )  # fmt: skip
    with gr.Accordion(say("models.find"), open=False, elem_id="mq-find"):
        needle = gr.Textbox(
            label=say("models.search"), placeholder=say("models.search.hint"), max_lines=1, max_length=LONGEST,
            elem_id="mq-search",
        )  # fmt: skip
        state = gr.HTML(elem_id="mq-search-state")
        hits = gr.Radio([], label=say("models.hits"), visible=False, elem_id="mq-hits")
        recents = gr.Radio([], label=say("models.recents"), visible=False, elem_id="mq-recents")
        token = gr.Textbox(
            "", type="password", label=say("models.token"), info=say("models.token.info"), max_lines=1,
            max_length=500, elem_id="mq-token",
        )  # fmt: skip

    @edge
    def hunt(text: str, token: str, request: gr.Request) -> Iterator[object]:
        yield from search(desk, text, token, desk.hub(request))

    @edge
    def choose(name: str) -> object:
        if not isinstance(classify(Model.model_validate(str(name)), folders=False), Repo):
            return gr.skip()
        return str(name)

    @edge
    def remember(request: gr.Request) -> object:
        names = used(desk, visitor(request))
        return gr.update(choices=names, value=None, visible=bool(names))

    # A textbox's `input` is of keys alone: a name that is pasted only changes it.
    on([needle.change], hunt, [needle, token], [state, hits], trigger_mode="always_last")
    on([hits.input], choose, [hits], [source])
    on([recents.input], choose, [recents], [source])
    on([opened], remember, [], [recents])
    return Picker(source, token)


def search(desk: Desk, text: object, token: object, hub: Hub | None = None) -> Iterator[list[object]]:
    """What is said of a search and the hits to choose from: at once that it goes on, then what came."""
    wanted = str(text or "").strip()[:LONGEST]
    if len(wanted) < SHORTEST:
        yield [Markup(""), gr.update(choices=[], value=None, visible=False)]
        return
    yield [markup.notice(say("models.searching")), gr.skip()]
    try:
        found = (hub or desk.scheduler.hub).search(wanted, clean(token))
    except MaquetteError as error:
        yield [markup.notice(line(error), "warn"), gr.update(choices=[], value=None, visible=False)]
        return
    none = "" if found else say("models.none", text=wanted)
    choices = [(label(each), each.name) for each in found]
    yield [markup.notice(none), gr.update(choices=choices, value=None, visible=bool(found))]


def clean(token: object) -> str:
    """A token as it came from the page.

    Raises:
        BadModel: it can be none.
    """
    return check_token(str(token or "").strip())


def label(found: Found) -> str:
    """One hit as a line: name, downloads, bytes of its weights, whether it is gated."""
    size = "" if found.size is None else wording.size(found.size)
    downloads = say("models.downloads", count=f"{found.downloads:,}")
    gated = say("models.gated") if found.gated else ""
    return " · ".join(part for part in (found.name, downloads, size, gated) if part)


def used(desk: Desk, owner: str) -> list[str]:
    """Repos that the visitor's runs have used, the latest first; on a page of one's own also what the cache holds."""
    names = []
    for run in desk.runs(owner):
        try:
            found = classify(run.recipe.model, folders=False)
        except BadModel:  # a folder
            continue
        if isinstance(found, Repo):
            names.append(found.name)
    return list(dict.fromkeys([*names, *(desk.scheduler.hub.here.recents() if desk.local else ())]))[:RECENT]


def written(model: Model) -> str:
    """A model as it stands in the box: with its revision behind an @."""
    return f"{model.source}@{model.revision}" if model.revision else model.source


def is_remote(desk: Desk, model: Model) -> bool:
    """Whether the hub has to be asked before anything can be said of a model."""
    return isinstance(classify(model, folders=desk.local), Repo)


def known(desk: Desk, model: Model) -> Model:
    """The model with the commit that its revision was when it was last asked for; nobody is asked now."""
    try:
        found = classify(model, folders=desk.local)
    except BadModel:
        return model
    if not isinstance(found, Repo) or found.pinned:
        return model
    commit = desk.scheduler.hub.here.remembered(found)
    return model.model_copy(update={"source": found.name, "revision": commit}) if commit else model


def facts(desk: Desk, model: Model, token: str, hub: Hub) -> Markup:
    """What the headers of a model say: architecture, parameters, bytes, licence.

    Raises:
        MaquetteError: it cannot be used, or the hub does not answer.
    """
    origin = places.open_model(model, hub, token)
    shape = headers.inspect(origin)
    pairs: dict[str, str] = {}
    named = classify(model, folders=desk.local)
    if not isinstance(named, Folder):
        pairs[say("model")] = BUNDLED if isinstance(named, Bundled) else origin.name
    pairs[say("models.architecture")] = str(shape.config.get("model_type"))
    pairs[say("models.parameters")] = f"{shape.parameters:,}"
    pairs[say("models.size")] = wording.size(shape.bytes)
    if isinstance(origin, RepoOrigin):
        missing = hub.missing(hub.pin(model, token), origin)
        pairs[say("models.download")] = wording.size(missing)
        pairs[say("models.revision")] = origin.listing.commit[:12]
        pairs[say("models.licence")] = origin.listing.licence or say("models.licence.unknown")
    return markup.facts(pairs)
