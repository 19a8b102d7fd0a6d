"""The modules that quantization has left as they are, by name, those that differ in their numbers alone as one.

What can be quantized has a weight of two dimensions: linears, the head, embeddings, routers. Norms have one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from pydantic import JsonValue

from engine.models import LoadedModel

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def kept(model: LoadedModel) -> dict[str, JsonValue]:
    """The event `kept`: of each width in bits, the modules whose weights are stored with it, folded."""
    named: dict[str, int] = {}
    for name, parameter in model.network.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and parameter.dim() > 1:
            named[module] = 8 * parameter.dtype.itemsize
    left = {name: bits for name, bits in named.items() if name not in model.quantized and name not in model.kernels}
    return {
        "modules": {
            str(width): [*fold([name for name, bits in left.items() if bits == width], named)]
            for width in sorted(set(left.values()), reverse=True)
        }
    }


def fold(names: Collection[str], among: Iterable[str]) -> Iterator[str]:
    """`h.*.up` for h.0.up, h.1.up and so on where all of those `among` the names are meant, else `h.{0-2,5}.up`."""
    every: dict[str, set[str]] = {}
    for name in among:
        every.setdefault(NUMBER.sub("*", name), set()).add(name)
    meant: dict[str, list[str]] = {}
    for name in names:
        meant.setdefault(NUMBER.sub("*", name), []).append(name)
    for pattern, found in meant.items():
        if set(found) == every[pattern]:
            yield pattern if len(found) > 1 else found[0]
            continue
        numbers: dict[str, list[int]] = {}  # of the first number, by what the others leave
        for name in found:
            numbers.setdefault(NUMBER.sub("{}", name, count=1), []).append(int(NUMBER.findall(name)[0]))
        for rest, some in numbers.items():
            yield rest.replace("{}", f"{{{_ranges(sorted(some))}}}" if len(some) > 1 else str(some[0]), 1)


def _ranges(numbers: list[int]) -> str:
    """`0-2,5` for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
