"""Where the models and texts are that a recipe names: bundled, on this machine, or on the hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from engine import methods
from engine.errors import BadModel, BadText, InputError, short
from engine.hub import Hub
from engine.methods import Method, Params
from engine.origin import FolderOrigin, Origin
from engine.records import Model, Recipe
from engine.sources import BUNDLED, WAYS, Folder, Repo, classify, named, place, written

DEMO = Path(__file__).parent.parent / "assets" / "demo"


def resolve(source: str) -> Path:
    """The folder of a model that is on this machine: `demo`, or a path to a folder.

    Raises:
        BadModel: there is no such folder.
    """
    if source == "demo":
        return DEMO / "model"
    if "\0" in source or not source.strip():
        raise BadModel("The model is empty or holds a NUL character. Give `demo` or the path of a folder.")
    try:
        path = place(source)
        if path.is_dir():
            return path.resolve()
    except (OSError, RuntimeError):  # a name that is too long; a home of nobody
        pass
    raise BadModel(f"There is no model folder {short(source)!r}. {WAYS}")


def locate(model: Model, hub: Hub | None = None) -> Path:
    """The folder from which a model is loaded: the bundled one, a folder, or the downloaded snapshot of a repo.

    Raises:
        BadModel: it is not on this machine.
    """
    found = classify(model)
    if isinstance(found, Repo):
        if hub is None:
            raise BadModel(f"There is no model folder {short(model.source)!r}, and no hub is at hand. {WAYS}")
        return hub.folder_of(model)
    return resolve(model.source)


def pin(model: Model, hub: Hub | None = None, token: str = "") -> Model:
    """The model as it is stored with a run: a repo at a commit, a folder by its whole path.

    Raises:
        MaquetteError: it cannot be found.
    """
    found = classify(model)
    if isinstance(found, Repo) and hub is not None:
        return hub.pin(model, token)
    if isinstance(found, Folder) and not Path(model.source).is_absolute():
        return model.model_copy(update={"source": str(resolve(model.source))})
    return model


def settle(recipe: Recipe, hub: Hub | None = None, token: str = "") -> Recipe:
    """The recipe as it is stored with a run: its models pinned, other files and folders by their whole paths.

    Raises:
        MaquetteError: a step cannot be read, or a model not be found.
    """
    steps = []
    for step, (_, params) in zip(recipe.steps, methods.check(recipe), strict=True):
        rooted = {key: value for key, value in params.rooted().items() if key in step.params}
        pinned = params.renamed(lambda text: written(pin(named(text), hub, token)))
        steps.append(step.model_copy(update={"params": {**step.params, **rooted, **pinned}}))
    changed = {"model": pin(recipe.model, hub, token), "calibration": whole(recipe.calibration), "steps": tuple(steps)}
    return recipe.model_copy(update=changed)


def models(recipe: Recipe) -> list[Model]:
    """All models that a run of the recipe reads: its own, then those that its steps name.

    Raises:
        InputError: a step cannot be read, or names no model.
    """
    return [recipe.model, *(named(text) for _, params in methods.check(recipe) for text in params.models())]


def repos(recipe: Recipe) -> list[Repo]:
    """Those of its models that are of the hub; of a recipe that cannot be read any more, its own alone."""
    try:
        wanted = models(recipe)
    except InputError:
        wanted = [recipe.model]
    found = []
    for model in wanted:
        with suppress(BadModel):
            if isinstance(repo := classify(model, folders=False), Repo):
                found.append(repo)
    return list(dict.fromkeys(found))


def located(recipe: Recipe, hub: Hub) -> Recipe:
    """The recipe whose steps name the folders in which their models are on this machine.

    Raises:
        BadModel: one is not here.
    """
    steps = []
    for step, (_, params) in zip(recipe.steps, methods.check(recipe), strict=True):
        here = params.renamed(lambda text: str(locate(named(text), hub)))
        steps.append(step.model_copy(update={"params": {**step.params, **here}}))
    return recipe.model_copy(update={"steps": tuple(steps)})


def checked(recipe: Recipe, hub: Hub | None = None, token: str = "") -> list[tuple[Method, Params]]:
    """The recipe's methods with settings that know where the models they name can be read.

    Raises:
        MaquetteError: a step cannot be read, or a model not be found.
    """
    return [
        (method, params.knowing({text: open_model(named(text), hub, token) for text in params.models()}))
        for method, params in methods.check(recipe)
    ]


def whole(source: str) -> str:
    """The whole path of a file or folder that a recipe names; `demo`, and what is not there, stay as they are."""
    try:
        path = place(source)
        return str(path) if source not in ("", BUNDLED) and path.exists() else source
    except (OSError, RuntimeError, ValueError):  # a name that is too long or holds a NUL; a home of nobody
        return source


def open_model(model: Model, hub: Hub | None = None, token: str = "") -> Origin:
    """Where what is asked of a model can be read, before anything is downloaded.

    Raises:
        MaquetteError: it cannot be found, or the hub does not answer.
    """
    if hub is not None and isinstance(classify(model), Repo):
        return hub.origin(model, token)
    return FolderOrigin(locate(model, hub))


def calibration_file(source: str) -> Path:
    """The file of a recipe's calibration text: `demo`, or a path.

    Raises:
        BadText: there is no such file.
    """
    return text_file(source, "calibration file")


def text_file(source: str, called: str) -> Path:
    """The file of a text: `demo`, or a path. `called`: what an error says that it is.

    Raises:
        BadText: there is no such file.
    """
    try:
        path = DEMO / "text.txt" if source == "demo" else place(source)
        if "\0" not in source and path.is_file():
            return path.resolve()
    except (OSError, RuntimeError):  # a name that is too long; a home of nobody
        pass
    raise BadText(f"There is no {called} {short(source)!r}. Give `demo` or a text or JSONL file.")
