"""A plain folder of an artifact whose format only Maquette reads: weights as numbers, each linear one matrix again.

What is stored as a bitmask (`engine.bitmask`) is written with its zeros, a product of two linears (`engine.low_rank`)
is multiplied out in float32, and what is packed in our own format (`engine.own_packed`) is unpacked; so the folder is
larger, and any `transformers` user can load it. Weights that compressed-tensors packs stay packed as they are, but for
those of products; and of mixtures, where an expert is a product: `transformers` fuses experts that are packed all, or
none of the model's linears.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from engine import headers
from engine.errors import BadModel, short
from engine.export._folder import block_of, open_artifact, publish_folder
from engine.export._offer import DENSE, SCALE
from engine.headers import OWN_KEYS
from engine.low_rank import RANKS_KEY
from engine.own_packed import CONV1D, PACKED_KEY, rounds_inputs
from engine.runtime.load import Schemes
from engine.shards import PARTS, TensorFiles, dense, read_quantized


def export(artifact: Path, folder: Path) -> None:
    """Write an artifact as `folder`, which stock `transformers` loads.

    Raises:
        InputError: `folder` exists, or its parent does not; one line.
        BadModel: no artifact of Maquette's, or one that anybody can load as it is.
        BadArtifact: the artifact is damaged.
    """
    label = short(artifact.name)
    recipe, config = open_artifact(artifact)
    if not headers.is_own(config):
        raise BadModel(f"{label} is stored as any `transformers` user can load it: use the folder as it is.")
    if rounds_inputs(config):
        raise BadModel(
            f"{label}: the inputs of its linears are rounded to 8 bits, which dense weights cannot say. Use a "
            "weight-only method such as quantize/gptq."
        )
    source = _Source(artifact, config)
    plain = {key: value for key, value in source.config.items() if key not in OWN_KEYS}
    publish_folder(artifact, folder, {"config.json": plain}, source.names, source.tensors, recipe, DENSE)


class _Source:
    """The tensors of an artifact, its products and what only we unpack as the weights that they stand for.

    config: without the products.
    """

    def __init__(self, folder: Path, config: dict[str, JsonValue]) -> None:
        self._files = TensorFiles.of_folder(folder)
        products = config.get(RANKS_KEY, {})
        assert isinstance(products, dict)
        self._products = set(products)
        stored = config.get("quantization_config")
        known = config.get(PACKED_KEY, stored)
        self._schemes = Schemes(known, folder) if isinstance(known, dict) else None
        self._transposed = config.get("model_type") in CONV1D
        self.config = dict(config)
        factors = {name for name in self._files.names if self._product_of(name)}
        others = set(self._files.names) - factors
        self._packed: set[str] = set()
        if PACKED_KEY in config or any(".experts." in name for name in self._products):
            self._packed = {name.removesuffix(SCALE) for name in others if name.endswith(SCALE)}
            self.config.pop("quantization_config", None)
        elif isinstance(stored, dict) and self._products:
            self._forget_products(stored)
        others -= {f"{name}.{part}" for name in self._packed for part in (*PARTS, "weight")}
        self.names = sorted([*others, *self._packed, *self._products], key=lambda n: (block_of(n), n))

    def _product_of(self, name: str) -> str:
        """The product that a tensor belongs to, "" where none."""
        module = name.rpartition(".")[0].rpartition(".")[0]
        return module if module in self._products else ""

    def _forget_products(self, stored: dict[str, JsonValue]) -> None:
        """Let the config say that the products are not packed; nothing, where nothing else is."""
        packed = [name for name in self._files.names if name.endswith((".weight_packed", ".weight_scale"))]
        if all(self._product_of(name) for name in packed):
            del self.config["quantization_config"]
            return
        ignore = stored.get("ignore")
        assert isinstance(ignore, list)
        self.config["quantization_config"] = {**stored, "ignore": [*ignore, *sorted(self._products)]}

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Those that stand in the new folder for one of `names`."""
        transposed = self._transposed and block_of(name) >= 0
        if name in self._packed:
            weight = self._matrix(name)
            yield f"{name}.weight", weight.t() if transposed else weight
            return
        if name not in self._products:
            yield name, self._files.read(name)
            return
        down, up = (self._matrix(f"{name}.{part}") for part in ("down", "up"))
        weight = (up.float() @ down.float()).to(up.dtype)
        yield f"{name}.weight", weight.t() if transposed else weight
        if (bias := self._files.get(f"{name}.up.bias")) is not None:
            yield f"{name}.bias", bias

    def _matrix(self, name: str) -> Tensor:
        """The weight (out, in) of a module, as its codes stand for it where it is packed."""
        parts = [leaf for leaf in PARTS if f"{name}.{leaf}" in self._files.names]
        if not parts or self._schemes is None:
            return self._files.read(f"{name}.weight")
        if "weight_shape" in parts:
            rows, columns = self._files.read(f"{name}.weight_shape").tolist()
        else:
            rows, columns = self._files.read(f"{name}.weight").shape
        weight = read_quantized(self._files, name, rows, columns, self._schemes.of(name))
        return dense(weight)
