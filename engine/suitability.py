"""Whether the steps of a recipe suit a model, by its config and headers alone: what does not is refused by name."""

from __future__ import annotations

from dataclasses import replace

from engine import headers, patterns
from engine.errors import BadModel, BadParams, short
from engine.experts import NAMES
from engine.headers import HEADS, Shape
from engine.methods import Calibrated, Method, Params, Selection, calibrates
from engine.records import Recipe
from engine.sizes import counted_parameters, head_of, longest_text

LEAST_POSITIONS = 128  # a prompt, byte by byte at worst, and what is written after it


def check_steps(steps: list[tuple[Method, Params]], shape: Shape, width: int = 16) -> None:
    """Refuse settings that cannot work on a model of this shape, each on what the steps before it leave.

    width: bits of a weight as it is loaded.

    Raises:
        InputError: one line that names the method and what would work.
    """
    if steps:
        _check_experts(steps, shape)
    becoming = shape
    for method, params in steps:
        _check_shapes(method, params, becoming, width)
        _check_length(method, params, becoming)
        config, tensors = params.reshaped(becoming.config, becoming.tensors)
        becoming = replace(becoming, config=config, tensors=tensors)


def check_measures(recipe: Recipe, shape: Shape) -> None:
    """Refuse to let a model write that has no positions for what is measured."""
    longest = longest_text(shape.config)
    if set(recipe.measure) - {"size"} and 0 < longest < LEAST_POSITIONS:
        raise BadModel(
            f"The model reads {longest} tokens, and measuring takes up to {LEAST_POSITIONS}. Measure its size alone."
        )


def _check_length(method: Method, params: Params, shape: Shape) -> None:
    """Refuse sequences that are longer than the model has positions for."""
    if isinstance(params, Calibrated) and not calibrates(params):
        return  # no text is read
    length, longest = getattr(params, "sequence_length", 0), longest_text(shape.config)
    if length > longest > 0:
        raise BadParams(
            f"{method.name}: sequence_length {length:,} is more than the {longest:,} tokens that the model reads. "
            f"Use {longest} or less."
        )


def _check_experts(steps: list[tuple[Method, Params]], shape: Shape) -> None:
    """Refuse mixtures whose layout is not known, and what a file cannot say of experts, which share one scheme."""
    count = headers.experts(shape.config)
    kind = str(shape.config["model_type"])
    if count < 2:
        return
    if kind not in NAMES:
        raise BadModel(
            f"{short(shape.folder.name)} is a mixture of {count} experts of the type {kind}; Maquette can compress "
            f"those of {', '.join(NAMES)}."
        )
    linears = [name for name in shape.linears if ".experts." in name]
    for method, params in steps:
        if method.family != "quantize" or params.cache_grid() is not None:
            continue
        chosen = sum(params.selects(name) for name in linears) if isinstance(params, Selection) else len(linears)
        ours = params.leaves_codes()
        if ours and chosen < len(linears):
            raise BadParams(
                f"{method.name}: {chosen} of {len(linears)} linears of experts are selected; `transformers` reads a "
                "mixture's packed linears only where all of these are packed, too. Select them all."
            )
        if chosen and (reason := params.unfit_for_experts()):
            if ours:
                raise BadParams(f"{method.name}: {reason} Choose other settings, or use another method.")
            raise BadParams(f"{method.name}: {reason} Choose other settings, or ignore `*.experts.*`.")


def _check_shapes(method: Method, params: Params, shape: Shape, width: int) -> None:
    linears = shape.linears  # made anew each time it is asked for
    names = [name for name in linears if not isinstance(params, Selection) or params.selects(name)]
    if not names and linears and isinstance(params, Selection):
        raise BadParams(
            f"{method.name}: no linear is left by targets {short(params.targets)!r} and ignore "
            f"{short(params.ignore)!r}. Names are as in {next(iter(linears))}."
        )
    beyond = head_of(shape) if params.beyond_blocks()[0] else {}
    for key, some in params.patterns().items():
        for pattern in some:
            if linears and not any(patterns.matches(pattern, name) for name in (*names, *beyond)):
                raise BadParams(
                    f"{method.name}: {short(pattern)!r} of {key} fits no linear that is chosen. Names are as in "
                    f"{next(iter(linears))}."
                )
    _check_beyond_blocks(method, params, shape)
    try:
        params.check_config(shape.config)
        chosen = {name: linears[name] for name in names} | beyond
        params.check_model(chosen, counted_parameters(shape, params, width), width)
    except BadParams as error:
        raise BadParams(f"{method.name}: {error}") from None


def _check_beyond_blocks(method: Method, params: Params, shape: Shape) -> None:
    """Refuse embeddings of their own kind, and to part a head from its embeddings where that makes the model larger."""
    head, embeddings = params.beyond_blocks()
    if embeddings and str(shape.config.get("model_type")).startswith("gemma3"):
        raise BadParams(f"{method.name}: Gemma 3 has embeddings of its own kind, which can only stay as they are.")
    tied = not any(name.endswith(HEADS) for name in shape.tensors)
    if tied and head and "embeddings" not in type(params).model_fields:
        raise BadParams(
            f"{method.name}: the head of {short(shape.folder.name)} is its embeddings, which stay as they are here. "
            "Turn head off."
        )
    if tied and head != embeddings:
        raise BadParams(
            f"{method.name}: the head of {short(shape.folder.name)} is its embeddings; quantized apart, they would be "
            "larger. Choose both, head and embeddings, or neither."
        )
