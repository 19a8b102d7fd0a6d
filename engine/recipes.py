"""Recipes as YAML: read with one-line errors, written in the short form people type."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

import yaml
from pydantic import BaseModel, ValidationError

from engine.errors import BadRecipe, UnknownName, short
from engine.methods import check
from engine.records import MEASURES, Model, Recipe, Step

MAX_BYTES = 100_000
DEEPEST = 32  # brackets and indents in one another
OPENING = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken,
           yaml.BlockMappingStartToken)  # fmt: skip
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def load_recipe(text: str, most: int = MAX_BYTES) -> Recipe:
    """The recipe that a YAML text of at most so many characters describes, checked down to each method's settings.

    Raises:
        BadRecipe: no YAML, no mapping, or a value of the wrong kind.
        UnknownName: a key, method, setting or measurement that does not exist.
        BadParams: a setting out of its bounds.
    """
    if len(text) > most:
        raise BadRecipe(f"The recipe has {len(text):,} characters; the limit is {most:,}.")
    try:
        _check_tokens(text)
        body = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise BadRecipe(f"The recipe is not valid YAML: {_where(error)}.") from None
    except (ValueError, RecursionError) as error:  # a date that does not exist; brackets without end
        raise BadRecipe(f"The recipe is not valid YAML: {short(error)}.") from None
    if not isinstance(body, dict):
        raise BadRecipe("The recipe must be a mapping such as `model: demo`, with keys " + ", ".join(_keys()) + ".")
    recipe = parse_recipe(body)
    check(recipe)
    return recipe


# YAML 1.2 has 1e-4 for a number, as everybody does; PyYAML, which is older, wants 1.0e-4.
FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")


class _Dumper(yaml.SafeDumper):
    """Puts a text that reads as a number into quotes."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML's readers keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        found: dict[Hashable, object] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [str(key.value) for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), keys[0])
            raise BadRecipe(f"The recipe has {short(repr(twice))} twice in one place. Keep one.")
        return found


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def _check_tokens(text: str) -> None:
    """Refuse what costs more to read than it says: ten lines of aliases can mean gigabytes, brackets minutes."""
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise BadRecipe("A recipe may not use YAML aliases (`*name`): write the value out.")
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > DEEPEST:
            raise BadRecipe(f"The recipe is not valid YAML: it is nested more than {DEEPEST} deep.")


def parse_recipe(body: dict[object, object]) -> Recipe:
    """The recipe in a decoded YAML or JSON mapping; methods and their settings are not looked up here.

    Raises:
        UnknownName: a key that no recipe has.
        BadRecipe: a value of the wrong kind; the message names it.
    """
    _known("key", body, _keys())
    if isinstance(model := body.get("model"), dict):
        _known("key of model", model, Model.model_fields)
    steps = body.get("steps")
    if steps is None:
        body = {key: value for key, value in body.items() if key != "steps"}
    elif not isinstance(steps, list):
        raise BadRecipe("steps must be a list such as `- quantize/rtn: {bits: 4}`.")
    for step in steps or ():
        _check_step(step)
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        raise BadRecipe(_first(error)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML in the short form; `load_recipe` reads it back to an equal recipe."""
    readable = (
        recipe.model_dump_json().isprintable()
    )  # PyYAML leaves some unprintable characters bare, and misreads them
    body: dict[str, object] = {
        "model": _short_model(recipe.model),
        "steps": [_short_step(step) for step in recipe.steps],
        "measure": list(recipe.measure),
        "seed": recipe.seed,
        "calibration": recipe.calibration,
        "device": recipe.device,
    }
    if recipe.device == Recipe.model_fields["device"].default:
        del body["device"]
    return "".join(
        yaml.dump(
            {key: value}, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=readable,
            default_flow_style=None if isinstance(value, list | dict) else False,
        )
        for key, value in body.items()
    )  # fmt: skip


def choose_measures(names: Iterable[str]) -> tuple[str, ...]:
    """Measures as typed on a command line; a result's own name (`memory.peak`, `kl`) means the measure it is of.

    Raises:
        UnknownName: no measure and no result has that name.
    """
    chosen = []
    for name in names:
        first = name.split(".")[0]
        measure = RESULTS.get(first, first)
        if measure not in MEASURES:
            raise UnknownName("measurement", name, [*MEASURES, *(n for n in RESULTS if n not in MEASURES)])
        chosen.append(measure)
    return tuple(dict.fromkeys(chosen))


# Which measure gives a result of this name (or of this first part of a dotted name).
RESULTS = {
    "throughput": "latency",
    "bits_per_byte": "perplexity",
    "kl": "divergence",
    "top1_agreement": "divergence",
    "flips": "divergence",
}


def _short_model(model: Model) -> object:
    """One text where it says everything, else a mapping of what is not the default."""
    text = f"{model.source}@{model.revision}" if model.revision else model.source
    if Model.model_validate(text) == model:
        return text
    body = model.model_dump(mode="json")
    return {key: value for key, value in body.items() if value or key == "source"}


def _short_step(step: Step) -> object:
    return {step.method: step.params} if step.params else step.method


def _check_step(step: object) -> None:
    if isinstance(step, str):
        return
    if not isinstance(step, dict) or not step:
        raise BadRecipe(f"A step must be `method: {{settings}}`, got {short(repr(step))}.")
    if "method" in step:
        _known("key of a step", step, Step.model_fields)
        params = step.get("params", {})
    elif len(step) == 1:
        (params,) = step.values()
    else:
        names = ", ".join(short(key, 30) for key in step)
        raise BadRecipe(f"A step names one method, got {names}; indent the settings or put them in braces.")
    if params is not None and not isinstance(params, dict):
        raise BadRecipe(f"The settings of {short(next(iter(step)))} must be a mapping, got {short(repr(params))}.")


def _keys() -> list[str]:
    return list(Recipe.model_fields)


def _known(kind: str, body: dict[object, object], fields: Iterable[str]) -> None:
    names = list(fields)
    for key in body:
        if key not in names:
            raise UnknownName(kind, str(key), names)


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"] if part != "float")  # which JSON value it was read as
    got = problem["input"]
    shown = "" if isinstance(got, dict | list | BaseModel) else f", got {short(repr(got))}"
    return f"{where or 'recipe'}: {problem['msg']}{shown}."


def _where(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem or 'unreadable'} in line {mark.line + 1}, column {mark.column + 1}"
    return short(" ".join(str(error).split()), 120)
