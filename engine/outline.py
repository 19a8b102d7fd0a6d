"""A model that is not here yet, held against its own config before its weights are downloaded.

The network that a config describes is made without data (`engine.checkpoint`), and files as long as the hub's, of
which only the headers are filled, stand for its weights: they take no room on the disk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from engine import headers
from engine.checkpoint import Checkpoint, read_config, shell
from engine.configs import weight_names
from engine.origin import INDEX, Origin


def check(origin: Origin) -> None:
    """Refuse weights that are missing or of another shape than the config says; packed ones are left to the worker.

    Raises:
        BadModel: the first that does not fit.
        HubError: the hub does not answer.
    """
    config = headers.inspect(origin).config  # of numbers that cannot be right no network is made
    if any(key in config for key in ("quantization_config", *headers.OWN_KEYS)):
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / origin.name.rpartition("/")[2]
        folder.mkdir()
        for name in ("config.json", INDEX):
            if name in origin.sizes:
                (folder / name).write_bytes(origin.read(name, 0, origin.sizes[name]))
        for name in weight_names(origin):
            length = int.from_bytes(origin.read(name, 0, 8), "little")
            with (folder / name).open("wb") as file:
                file.write(origin.read(name, 0, 8 + length))
                file.truncate(origin.sizes[name])
        Checkpoint(folder, shell(read_config(folder), torch.bfloat16), [])
