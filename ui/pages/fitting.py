"""The fit meter of the Compress tab, and the button that takes the way out where a recipe does not fit."""

from __future__ import annotations

from functools import partial

import gradio as gr
from markupsafe import Markup

from engine import preflight, speeds
from engine.hub import Hub
from engine.methods import check
from engine.records import Recipe
from engine.ways import Way
from ui import markup, meter
from ui.desk import Desk
from ui.pages import models


def look(
    desk: Desk, recipe: Recipe, owner: str = "", token: str = "", hub: Hub | None = None
) -> tuple[Markup, Way | None]:  # fmt: skip
    """What is known of the model, the meter with the speeds that the visitor's runs found, and what to change.

    Raises:
        MaquetteError: the recipe cannot work; one helpful line.
    """
    check(recipe)
    desk.check_sources(recipe)
    hub = hub or desk.scheduler.hub
    spare, room = desk.scheduler.spare(recipe), partial(desk.scheduler.room, recipe)
    estimate = preflight.estimate(recipe, hub, token, speeds.learned(desk.store, desk.runs(owner)), spare, room)
    way = None if estimate.fits else preflight.way_out(recipe, estimate, hub, token, spare)
    if estimate.fits:
        preflight.check(recipe, hub, token, spare, room)
    return markup.join((models.facts(desk, recipe.model, token, hub), meter.fit_meter(estimate, way))), way


def button(way: Way | None) -> object:
    """The button as it is to be: what the change needs, or out of sight."""
    return gr.update(visible=way is not None, value=meter.way_label(way) if way else "")


def changed(desk: Desk, recipe: Recipe, token: str = "", hub: Hub | None = None) -> Recipe:
    """The recipe with the change that makes it fit, or take least; found again, for the visitor's word is not taken.

    Raises:
        InputError: the recipe or its model cannot be used.
    """
    desk.check_sources(recipe)
    hub = hub or desk.scheduler.hub
    spare = desk.scheduler.spare(recipe)
    estimate = preflight.estimate(recipe, hub, token, spare=spare, room=partial(desk.scheduler.room, recipe))
    way = None if estimate.fits else preflight.way_out(recipe, estimate, hub, token, spare)
    return recipe if way is None else way.recipe
