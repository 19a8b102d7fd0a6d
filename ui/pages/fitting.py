"""The fit meter of the Compress tab, and the button that takes the way out where a recipe does not fit."""

from __future__ import annotations

import gradio as gr
from markupsafe import Markup

from engine import preflight, rates
from engine.errors import MaquetteError
from engine.methods import check
from engine.records import Recipe
from engine.ways import Way
from ui import markup, meter
from ui.desk import Desk
from ui.edge import line


def look(desk: Desk, recipe: Recipe, owner: str = "") -> tuple[Markup, Way | None]:
    """The meter, with the speeds that the visitor's runs found, and what to change where it does not fit."""
    try:
        check(recipe)
        desk.check_sources(recipe)
        estimate = preflight.estimate(recipe, rates.probed(desk.store, desk.runs(owner)))
        if estimate.fits:
            preflight.check(recipe)
            return meter.fit_meter(estimate), None
        way = preflight.way_out(recipe, estimate)
        return meter.fit_meter(estimate, way), way
    except MaquetteError as error:
        return markup.notice(str(error), "bad"), None
    except Exception as error:
        return markup.notice(line(error), "bad"), None


def button(way: Way | None) -> object:
    """The button as it is to be: what the change needs, or out of sight."""
    return gr.update(visible=way is not None, value=meter.way_label(way) if way else "")


def changed(desk: Desk, recipe: Recipe) -> Recipe:
    """The recipe with the change that makes it fit, or take least; found again, for the visitor's word is not taken.

    Raises:
        InputError: the recipe or its model cannot be used.
    """
    desk.check_sources(recipe)
    estimate = preflight.estimate(recipe)
    way = None if estimate.fits else preflight.way_out(recipe, estimate)
    return recipe if way is None else way.recipe
