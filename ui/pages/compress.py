"""Compress: choose a model, stack steps into a recipe, see whether it fits, start.

The recipe is one value; the cards, the YAML, the command line and the link are views of it. Every change
goes through the same checks as a recipe from a file.
"""

from __future__ import annotations

import json
import shlex
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gradio as gr
from markupsafe import Markup
from pydantic import JsonValue, ValidationError

from engine import places
from engine.errors import BadParams, BadRecipe, MaquetteError
from engine.fields import counts
from engine.hub import Hub
from engine.methods import Method, check, get, methods
from engine.presets import PRESETS
from engine.presets import preset as preset_named
from engine.recipes import dump_recipe, load_recipe
from engine.records import Recipe
from ui import form, hosting, markup, sensitivity
from ui.desk import FIRST, Desk, is_original
from ui.edge import edge, line, visitor
from ui.messages import translate
from ui.pages import advice, fitting, models
from ui.wiring import on
from ui.wording import say

STEP_LIMIT = 8
LONGEST = 20_000  # characters of a recipe that is pasted or linked to: reading them takes some half a second
BESIDE = "~/maquette-runs"  # a data folder has one writer, and the page's is the page
Draft = dict[str, JsonValue]


@dataclass(frozen=True)
class CompressPage:
    """The components that others on the page reach for."""

    draft: gr.State
    shape: gr.State
    source: gr.Textbox
    token: gr.Textbox
    preset: gr.Radio
    start: gr.Button
    original: gr.Checkbox
    look: gr.Button


def build(desk: Desk, opened: Callable[..., object]) -> CompressPage:
    """Lay the tab out and wire it. Nothing is asked for before it is opened: most who come look at Compare first."""
    draft = gr.State(as_draft(FIRST))
    shape = gr.State(0)  # counts changes of the list of steps: only these rebuild the cards
    gr.HTML(markup.heading(say("compress.title"), say("compress.about")))
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            picker = models.build(desk, opened)
            source, token = picker.source, picker.token
            names = [(say(f"preset.{name}"), name) for name in PRESETS]
            preset = gr.Radio(names, value="gptq4", label=say("compress.preset"), elem_id="mq-preset")
            with gr.Accordion(say("advice.title"), open=False, elem_id="mq-advice"):
                advice.build(desk, draft, shape, token, as_recipe)
            with gr.Accordion(say("sensitivity.title"), open=False, elem_id="mq-sensitivity"):
                blocks = gr.HTML()
                look = gr.Button(say("sensitivity.measure"), size="sm", elem_id="mq-look")
            with gr.Accordion(say("compress.steps"), open=False, elem_id="mq-steps"):
                cards(draft, shape)
                with gr.Row():
                    offered = [(f"{translate(m.title)} · {m.name}", m.name) for m in methods().values()]
                    method = gr.Dropdown(
                        offered, value=offered[0][1] if offered else None, label=say("compress.add_what"), min_width=220
                    )
                    add = gr.Button(say("compress.add"), min_width=120)
            with gr.Accordion(say("compress.yaml"), open=False):
                text = gr.Textbox(label=say("compress.paste"), lines=5, max_length=LONGEST, elem_id="mq-paste")
                read = gr.Button(say("compress.read"), size="sm")
        with gr.Column(scale=2, min_width=320):
            meter = gr.HTML(elem_id="mq-fit")
            mend = gr.Button(visible=False, size="sm", elem_id="mq-mend")
            original = gr.Checkbox(True, label=say("compress.original"), info=say("compress.original.info"))
            start = gr.Button(say("compress.start"), variant="primary", elem_id="mq-start")
            gr.HTML(hosting.limits_line(desk.mode, desk.limits), elem_id="mq-limits", visible=not desk.local)
            written = gr.HTML(elem_id="mq-recipe")

    @edge
    def choose(name: str, draft: Draft, shape: int) -> object:
        return [{**draft, "steps": [step.model_dump(mode="json") for step in preset_named(name)]}, shape + 1]

    @edge
    def append(name: str, draft: Draft, shape: int) -> object:
        steps = _steps(draft)
        if len(steps) >= STEP_LIMIT:
            raise BadParams(say("error.steps", limit=STEP_LIMIT))
        steps.append({"method": get(name).name, "params": {}})
        return [{**draft, "steps": steps}, shape + 1]

    @edge
    def paste(text: str, shape: int) -> object:
        recipe = load_recipe(str(text or ""), LONGEST)
        desk.check_sources(recipe)
        return [as_draft(recipe), shape + 1, models.written(recipe.model)]

    @edge
    def model(source: str, draft: Draft) -> object:
        text = str(source).strip() or "demo"
        return {**draft, "model": {**_object(draft.get("model")), "source": text, "revision": ""}}

    @edge
    def follow(draft: Draft, token: str, request: gr.Request) -> Iterator[object]:
        beside = [describe(draft), bearing(desk, draft, request), preset_of(draft)]
        if asks_hub(desk, draft):
            yield [markup.notice(say("models.asking")), gr.update(visible=False), *beside]
        yield [*_assess(desk, draft, visitor(request), token, desk.hub(request)), *beside]

    @edge
    def begin(shape: int) -> object:
        return shape or 1

    @edge
    def take_way(draft: Draft, shape: int, token: str, request: gr.Request) -> object:
        changed = fitting.changed(desk, as_recipe(draft), models.clean(token), desk.hub(request))
        return [as_draft(changed), shape + 1]

    on([preset.input], choose, [preset, draft, shape], [draft, shape])
    on([add.click], append, [method, draft, shape], [draft, shape])
    on([read.click], paste, [text, shape], [draft, shape, source])
    on([source.change], model, [source, draft], [draft])
    on(
        [draft.change, opened, token.blur],
        follow,
        [draft, token],
        [meter, mend, written, blocks, preset],
        trigger_mode="always_last",
    )
    on([opened], begin, [shape], [shape])
    on([mend.click], take_way, [draft, shape, token], [draft, shape])
    return CompressPage(draft, shape, source, token, preset, start, original, look)


def cards(draft: gr.State, shape: gr.State) -> None:
    """A card for each step: its settings, and buttons that move and remove it; rebuilt when `shape` changes."""

    @edge
    def draw(value: Draft, generation: int) -> None:
        steps = _steps(value)
        for index, step in enumerate(steps):
            card(index, step, len(steps), draft, shape)

    gr.render(inputs=[draft, shape], triggers=[shape.change])(draw)


def card(
    index: int, step: dict[str, JsonValue], count: int, draft: gr.State, shape: gr.State
) -> None:  # fmt: skip
    """One step: a heading, the form made from its Params, and three buttons."""
    method = get(str(step["method"]))
    with gr.Column(elem_classes="mq-step"):
        gr.HTML(markup.heading(f"{index + 1} · {translate(method.title)}", translate(method.summary), level=3))
        made = form.inputs(method, _object(step.get("params")))
        for name, component in made.items():
            on([component.change], setting(index, name), [component, draft], [draft])
        for name, others in form.deciding(method).items():
            on([made[name].change], revealing(method, name, others), [made[name]], [made[other] for other in others])
        with gr.Row():
            for kind, able in (("up", index > 0), ("down", index < count - 1), ("remove", True)):
                button = gr.Button(say(f"step.{kind}"), size="sm", interactive=able, min_width=80)
                on([button.click], moving(index, kind), [draft, shape], [draft, shape])


def revealing(method: Method, name: str, others: list[str]) -> Callable[[object], object]:
    """The handler of an input that decides which others count: only these are shown."""

    @edge
    def reveal(value: object) -> object:
        fields = method.params.model_fields
        shown = [gr.update(visible=counts(fields[other], {name: value})) for other in others]
        return shown if len(shown) > 1 else shown[0]

    return reveal


def setting(index: int, name: str) -> Callable[[object, Draft], object]:
    """The handler of one input: put its value into the draft."""

    @edge
    def change(value: object, draft: Draft) -> object:
        steps = _steps(draft)
        if index >= len(steps):
            return gr.skip()
        method = get(str(steps[index]["method"]))
        if name not in form.defaults(method):  # the card has become another step's meanwhile
            return gr.skip()
        params = {**_object(steps[index].get("params")), name: form.read(method, name, value)}
        if params[name] == form.defaults(method)[name]:
            del params[name]
        steps[index] = {**steps[index], "params": params}
        return {**draft, "steps": steps}

    return change


def moving(index: int, kind: str) -> Callable[[Draft, int], object]:
    """The handler of a card's button."""

    @edge
    def move(draft: Draft, shape: int) -> object:
        steps = _steps(draft)
        if index >= len(steps):
            return gr.skip()
        step = steps.pop(index)
        if kind != "remove":
            steps.insert(index + (1 if kind == "down" else -1), step)
        return [{**draft, "steps": steps}, shape + 1]

    return move


def as_draft(recipe: Recipe) -> Draft:
    """A recipe as the plain JSON that the form edits."""
    found: Draft = recipe.model_dump(mode="json")
    return found


def preset_of(draft: Draft) -> str | None:
    """The preset whose steps a draft has; None for steps of one's own."""
    try:
        steps = as_recipe(draft).steps
    except ValidationError:
        return None
    return next((name for name, wanted in PRESETS.items() if wanted == steps), None)


def as_recipe(draft: Draft) -> Recipe:
    """The recipe that a draft says.

    Raises:
        ValidationError: a value of the wrong kind.
    """
    return Recipe.model_validate_json(json.dumps(draft))


def asks_hub(desk: Desk, draft: Draft) -> bool:
    """Whether the hub has to be asked about a draft's models."""
    try:
        return any(models.is_remote(desk, model) for model in places.models(as_recipe(draft)))
    except (MaquetteError, ValidationError):  # `judge` says what is wrong with it
        return False


def judge(desk: Desk, draft: Draft, token: str = "") -> Markup:
    """What is known of the model and the fit meter, or in one line why the recipe cannot work. Reads headers only."""
    return _assess(desk, draft, "", token)[0]


def _assess(
    desk: Desk, draft: Draft, owner: str, token: str = "", hub: Hub | None = None
) -> tuple[Markup, object]:  # fmt: skip
    """The meter, and the button that changes a recipe that does not fit."""
    try:
        shown, way = fitting.look(desk, as_recipe(draft), owner, models.clean(token), hub)
    except Exception as error:
        return markup.notice(line(error), "bad"), fitting.button(None)
    return shown, fitting.button(way)


def describe(draft: Draft) -> Markup:
    """The recipe as YAML, as a command line and as a link."""
    try:
        text = dump_recipe(as_recipe(draft))
    except Exception as error:
        return markup.notice(line(error), "bad")
    command = f"printf %s {shlex.quote(text)} > recipe.yaml && python -m engine run recipe.yaml --home {BESIDE}"
    address = f"./?recipe={urllib.parse.quote(text)}"
    return markup.join(
        (
            markup.code(text, "recipe.yaml"),
            markup.details(
                say("compress.command"),
                markup.tag("p", say("compress.command.about"), class_="mq-sub"),
                markup.code(command, say("compress.shell")),
            ),
            markup.tag("p", markup.link(say("compress.link"), address), class_="mq-sub"),
        )
    )


def submit(desk: Desk, draft: Draft, original: bool, request: gr.Request, token: str = "") -> str:
    """Queue the recipe, before it its original where that was never measured here; returns the run's id.

    Raises:
        InputError: the recipe cannot work or the visitor has too many runs waiting.
    """
    owner = desk.enter(request, "start")
    recipe = as_recipe(draft)
    check(recipe)  # before its original is queued
    desk.check_sources(recipe)
    token = models.clean(token)
    pinned = recipe.model_copy(update={"model": places.pin(recipe.model, desk.scheduler.hub, token)})
    if original and recipe.steps and not _has_original(desk, pinned, owner):
        bare = recipe.model_copy(update={"steps": ()})
        desk.scheduler.submit(bare, owner, token)
    return desk.scheduler.submit(recipe, owner, token).id


def bearing(desk: Desk, draft: Draft, request: gr.Request) -> Markup:
    """What each block of the draft's model can bear, where that was measured."""
    try:
        return sensitivity.table(
            sensitivity.newest(desk.entries(visitor(request)), models.known(desk, as_recipe(draft).model))
        )
    except Exception as error:
        return markup.notice(line(error), "bad")


def submit_look(desk: Desk, draft: Draft, request: gr.Request, token: str = "") -> str:
    """Queue the measuring of each block of the draft's model; returns the run's id.

    Raises:
        InputError: the model cannot be used, or the visitor has too many runs waiting.
    """
    recipe = as_recipe(draft)
    asked = sensitivity.recipe(recipe.model, recipe.calibration)
    desk.check_sources(asked)
    return desk.scheduler.submit(asked, desk.enter(request, "start"), models.clean(token)).id


def recipe_from_link(desk: Desk, text: str) -> Recipe:
    """The recipe of a `?recipe=` address, judged as any other input.

    Raises:
        InputError: it is none.
    """
    if len(text) > LONGEST:
        raise BadRecipe(say("error.long_link"))
    recipe = load_recipe(text)
    desk.check_sources(recipe)
    return recipe


def _has_original(desk: Desk, recipe: Recipe, owner: str) -> bool:
    return any(
        run.recipe.model == recipe.model and is_original(run) and (not run.status.final or run.artifact)
        for run in desk.runs(owner)
    )


def _steps(draft: Draft) -> list[dict[str, JsonValue]]:
    found = draft.get("steps")
    return [dict(step) for step in found if isinstance(step, dict)] if isinstance(found, list) else []


def _object(value: JsonValue) -> dict[str, JsonValue]:
    return dict(value) if isinstance(value, dict) else {}
