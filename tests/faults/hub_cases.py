"""Bad hubs, bad repos and bad names of repos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import preflight
from engine.errors import MaquetteError
from engine.hub import Hub
from engine.records import Recipe
from tests import hub as loopback
from tests.faults.scene import Case, Scene

REPO = "org/tiny"
Damage = Callable[[Path], object]


def ask(scene: Scene, place: Path, text: str, token: str, damage: Damage | None, failure: dict[str, Any] | None) -> str:
    """The line with which preflight refuses a repo that the loopback hub serves, and that little was fetched for it."""
    folder = Path(shutil.copytree(scene.model, place / "repo"))
    if damage is not None:
        damage(folder)
    with loopback.Hub() as server:
        server.add(REPO, folder, tags=("v1",))
        server.add("org/gated", folder, gated=True, tokens=("hf_right",))
        server.add("org/private", folder, private=True, tokens=("hf_right",))
        if failure is not None:
            server.fail(**failure)
        hub = Hub(place / "cache", endpoint=server.url, offline=False)
        body = {"model": text, "steps": [{"quantize/rtn": {"group_size": 32}}], "measure": [], "device": "cpu"}
        said = refusal(lambda: preflight.check(Recipe.model_validate(body), hub, token))
        assert server.sent < 1_000_000
    assert not token or token not in said
    return said


def refusal(work: Callable[[], object]) -> str:
    """What a user reads of work that is refused.

    Raises:
        AssertionError: it is not.
    """
    try:
        work()
    except MaquetteError as error:
        return str(error)
    raise AssertionError("it was not refused")


def hub(name: str, says: str, text: str = REPO, token: str = "", damage: Damage | None = None, **failure: Any) -> Case:
    """A case of a repo's name, a token, a damage to its files, or a failure of the server."""
    met = {"repo": REPO, **failure} if failure else None
    return Case(
        f"hub: {name}", "refused", says, act=lambda scene, place, _: ask(scene, place, text, token, damage, met)
    )


def edit(**changes: object) -> Damage:
    """Other values in config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def index(folder: Path) -> None:
    """An index that points outside of the repo."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../../etc/passwd"}}')


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4000])


def offline(scene: Scene, place: Path, patch: object) -> str:
    """Nothing is in the cache, and nobody may be asked."""
    found = Hub(place / "cache", endpoint="http://127.0.0.1:9", offline=True)
    return refusal(lambda: preflight.check(Recipe.model_validate({"model": REPO}), found))


CASES = [
    hub("a name that does not exist", "or it is private", text="org/none"),
    hub("a revision that does not exist", "has no revision", text=f"{REPO}@v9"),
    hub("a revision like a path", "cannot be a revision", text=f"{REPO}@a..b"),
    hub("a gated model without a token", "is gated", text="org/gated"),
    hub("a gated model with another's token", "not accept this token", text="org/gated", token="hf_wrong"),
    hub("a private model", "or it is private", text="org/private"),
    hub("a token of two words", "The token holds spaces", token="two words"),
    hub("three parts", "more than one slash", text="a/b/c"),
    hub("dots as a name", "cannot be the name", text="org/.."),
    hub("an address inside the network", "is no address of a model", text="http://169.254.169.254/latest"),
    hub("a script as an address", "is no address of a model", text="javascript:alert(1)"),
    hub("markup as a name", "cannot be the name", text="<img src=x onerror=alert(1)>"),
    hub("a name that is too long", "too long", text="x" * 97),
    hub("letters that look alike", "cannot be the name", text="org/na\u043de"),
    hub("too many requests", "too many requests", file="api", status=429, retry_after=9),
    hub("a hub that is out of order", "it is out of order", file="api", status=503),
    hub("an answer that breaks off", "broke off", file="api", truncate=5),
    hub("pickled weights", "pickled weights only", damage=pickled),
    hub("an adapter", "holds only an adapter", damage=adapter),
    hub("a truncated file", "truncated or not a safetensors file", damage=truncated),
    hub("an index that points outside", "the index names", damage=index),
    hub(
        "code in the repo", "brings code of its own", damage=edit(model_type="own", auto_map={"AutoModel": "evil.Evil"})
    ),
    hub("a million layers", "that cannot be right", damage=edit(num_hidden_layers=10**6)),
    hub("an unknown type", "is unknown to the installed transformers", damage=edit(model_type="nonsense")),
    hub("already quantized", "is already quantized", damage=edit(quantization_config={"quant_method": "gptq"})),
    Case("hub: nobody may be asked", "refused", "offline", act=offline),
]
