"""Advice on the Compress tab: a goal and a number, what it is reckoned with, and cards in the order of practice."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import gradio as gr
from markupsafe import Markup
from pydantic import JsonValue

from engine import adviser, headers, places
from engine.adviser import KINDS, Advice, Advised, Figures, Goal
from engine.assumptions import Assumptions
from engine.errors import BadParams
from engine.fields import bounds
from engine.hub import Hub
from engine.records import Measurement, Recipe
from ui import markup, wording
from ui.desk import Desk
from ui.edge import edge, visitor
from ui.markup import tag
from ui.pages import models
from ui.wiring import on
from ui.wording import say

Draft = dict[str, JsonValue]
NUMBERS = {"memory": 8.0, "latency": 0.5, "cost": None}
FACTORS = {"memory": 1e9, "latency": 1.0, "cost": 1.0}  # of the number on the page to the goal's
STAGES = ("optimise", "quantize", "train")


def build(
    desk: Desk, draft: gr.State, shape: gr.State, token: gr.Textbox, read: Callable[[Draft], Recipe]
) -> None:  # fmt: skip
    """Lay the panel out and wire it; `read` makes a recipe of a draft."""
    found, count = gr.State(None), gr.State(0)  # what was advised, and how often: only this draws the cards anew
    gr.HTML(tag("p", say("advice.about"), class_="mq-sub"))
    with gr.Row():
        names = [(say(f"advice.goal.{kind}"), kind) for kind in KINDS]
        goal = gr.Radio(names, value=KINDS[0], label=say("advice.goal"), min_width=240, elem_id="mq-goal")
        number = gr.Number(
            NUMBERS[KINDS[0]], label=say("advice.number"), info=say("advice.number.memory"), minimum=0, min_width=140,
            elem_id="mq-goal-number",
        )  # fmt: skip
    with gr.Accordion(say("advice.assumptions"), open=False):
        fields = [_field(name) for name in Assumptions.model_fields]
    ask = gr.Button(say("advice.ask"), size="sm", elem_id="mq-advise")

    @edge
    def choose(goal: str) -> object:
        if goal not in KINDS:
            raise BadParams(say("error.goal"))
        return gr.update(value=NUMBERS[goal], info=say(f"advice.number.{goal}"))

    @edge
    def answer(
        request: gr.Request, goal: str, number: object, draft: Draft, count: int, token: str, *values: object
    ) -> object:  # fmt: skip
        hub = desk.hub(request)
        return [advise(desk, read(draft), goal, number, values, visitor(request), models.clean(token), hub), count + 1]

    @edge
    def draw(advised: Advised | None) -> None:
        if advised is not None:
            cards(advised, draft, shape)

    on([goal.input], choose, [goal], [number])
    on([ask.click], answer, [goal, number, draft, count, token, *fields], [found, count])
    gr.render(inputs=[found], triggers=[count.change])(draw)


def advise(
    desk: Desk, recipe: Recipe, goal: str, number: object, values: tuple[object, ...], owner: str, token: str = "",
    hub: Hub | None = None,
) -> Advised:  # fmt: skip
    """What to do with the model of a recipe, by the visitor's own runs where some have measured it.

    Raises:
        InputError: a model that the visitor may not use, a goal or an assumption out of its bounds.
    """
    desk.check_sources(recipe)
    wanted = Goal.of(goal, _number(number) * FACTORS[goal] if goal in FACTORS and number is not None else None)
    body = dict(zip(Assumptions.model_fields, values, strict=True))
    shape = headers.inspect(places.open_model(recipe.model, hub or desk.scheduler.hub, token))
    runs = [(entry.run, _look(entry.measured)) for entry in desk.entries(owner) if not entry.stored]
    return adviser.advise(wanted, recipe.model, shape, Assumptions.model_validate(body), adviser.of_runs(runs))


def cards(advised: Advised, draft: gr.State, shape: gr.State) -> None:
    """A card for each measure, stage by stage, with a button that makes its recipe the draft; made while rendering."""
    gr.HTML(summary(advised))
    for stage in STAGES:
        some = [advice for advice in advised.advices if advice.stage == stage]
        if some:
            gr.HTML(markup.heading(say(f"advice.stage.{stage}"), say(f"advice.stage.{stage}.about"), level=3))
        for advice in (each for each in some if each.helps):
            with gr.Column(elem_classes="mq-step"):
                gr.HTML(card(advice, advised))
                if advice.recipe is not None:
                    button = gr.Button(say("advice.use"), size="sm", elem_classes="mq-use")
                    on([button.click], using(advice.recipe), [draft, shape], [draft, shape])
        idle = [say(f"advice.{advice.name}") for advice in some if not advice.helps]
        if idle:
            gr.HTML(tag("p", say("advice.idle", names=" · ".join(idle)), class_="mq-sub"))


def using(recipe: Recipe) -> Callable[[Draft, int], object]:
    """The handler of a card's button: the steps become the draft's, all else stays."""

    @edge
    def use(draft: Draft, shape: int) -> object:
        return [{**draft, "steps": [step.model_dump(mode="json") for step in recipe.steps]}, shape + 1]

    return use


def summary(advised: Advised) -> Markup:
    """What the model takes as it is, and which measure comes first."""
    first = next((advice for advice in advised.advices if advice.first), None)
    if advised.met:
        words = say("advice.met")
    else:
        words = say("advice.none") if first is None else say("advice.first", name=say(f"advice.{first.name}"))
    kind = "good" if advised.met or first is not None else "warn"
    rows = _rows(advised.now, advised.now)
    return markup.join((markup.notice(words, kind), tag("p", say("advice.now"), class_="mq-sub"), markup.facts(rows)))


def card(advice: Advice, advised: Advised) -> Markup:
    """One measure: what it brings, what it needs, what it costs, and the quality that was measured."""
    chips = [markup.chip(say("advice.reaches" if advice.reaches else "advice.helps"), "good" * advice.reaches)]
    if advice.first:
        chips.insert(0, markup.chip(say("advice.start"), "good"))
    facts: dict[str, Markup | str | None] = dict(_rows(advice.figures, advised.now))
    if advice.recipe is None:
        facts[say("advice.setting")] = say("advice.serve", batch=advice.batch, context=advice.context)
    elif advice.price:
        facts[say("advice.price")] = price(advice)
    if advice.needs:
        facts[say("advice.needs")] = " · ".join(say(f"advice.needs.{need}") for need in advice.needs)
    facts[say("advice.quality")] = quality(advice, advised.quality)
    head = markup.heading(say(f"advice.{advice.name}"), level=4)
    return tag("section", head, tag("div", *chips, class_="mq-chips"), markup.facts(facts), class_="mq-advice")


def price(advice: Advice) -> str:
    """What is paid once: the teacher's tokens, the hours of a GPU."""
    shown = {"hours": wording.digits(advice.hours), "price": _money(advice.price), "teacher": _money(advice.teacher)}
    return say("advice.price.training" if advice.teacher else "advice.price.hours", **shown)


def quality(advice: Advice, original: Mapping[str, Measurement]) -> str:
    """What runs of this machine measured of the same steps; without any, that nobody knows."""
    if advice.recipe is None:
        return say("advice.same")
    if not advice.quality:
        return say("advice.not_measured")
    parts = []
    for name, found in advice.quality.items():
        before = say("aside", text=wording.difference(original[name], found)) if name in original else ""
        parts.append(f"{wording.name(name)} {wording.shown(found)} {before}".rstrip())
    return " · ".join(parts)


def _rows(figures: Figures, now: Figures) -> dict[str, Markup | str | None]:
    times = figures.token_seconds / now.token_seconds
    return {
        say("advice.memory"): wording.size(figures.memory), say("advice.file"): wording.size(figures.file),
        say("advice.latency"): say("advice.times", ratio=wording.digits(times, 2)),
        say("advice.cost"): _money(figures.cost),
    }  # fmt: skip


def _money(amount: float) -> str:
    return say("advice.usd", amount=f"{amount:,.0f}" if amount >= 1000 else wording.digits(amount, 3))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadParams(say("error.goal_number"))
    return float(value)


def _field(name: str) -> gr.Number:
    info = Assumptions.model_fields[name]
    low, high = bounds(info)
    whole = info.annotation is int
    return gr.Number(
        info.default, label=say(f"assume.{name}"), minimum=low, maximum=high, precision=0 if whole else None,
        min_width=200,
    )  # fmt: skip


def _look(measured: Mapping[str, Measurement]) -> Callable[[], Mapping[str, Measurement]]:
    return lambda: measured
