"""Believe a saved model only when a fresh process has read it as a stranger would and computed the same.

Where that takes a small part of the memory, stock `transformers` loads the folder as anybody would. Else the network
reads one part at a time (`engine.stranger`), and so it does where weights are in a format of Maquette's own, which
stock `transformers` refuses (`engine.bitmask`, `engine.low_rank`).

Of a mixture the logits say little: a router that sees two experts as equals may choose either, and an expert that no
token of the probe gets is not seen at all. So each router and each expert is asked for its answer to the same input.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors.torch import load_file
from torch import Tensor, nn

from engine import artifacts, hardware, headers, models
from engine.errors import BadArtifact, BadModel
from engine.experts import Experts
from engine.fit import ROOM
from engine.models import LoadedModel
from engine.wide import Everywhere

PROBE = 48  # tokens on which the logits are compared
TOLERANCE = 0.02  # relative distance of logits; bf16 products differ in their last bits


@torch.inference_mode()
def probe(model: LoadedModel) -> dict[str, Tensor]:
    """Token ids drawn from a fixed seed and the model's logits for them, in float32.

    Raises:
        BadModel: they are no numbers.
    """
    size = model.network.config.get_text_config().vocab_size
    ids = torch.randint(size, (1, PROBE), generator=torch.Generator().manual_seed(0))
    with asked(model) as answers:
        logits = model.network(input_ids=ids.to(model.device), use_cache=False).logits
    if not logits.isfinite().all():
        if logits.dtype == torch.float16:
            raise BadModel("In float16 the numbers of this model become too large. Choose bfloat16 or float32.")
        raise BadModel("What the model computes is no number any more. Choose gentler settings.")
    return {"ids": ids, "logits": logits[0].float().cpu().contiguous(), **answers}


@contextlib.contextmanager
def asked(model: LoadedModel) -> Iterator[dict[str, Tensor]]:
    """The answers of each block's router (1, experts) and of its experts (experts, channels), each to the same input.

    By the experts' name; they are there once the network has computed within.
    """
    answers: dict[str, Tensor] = {}
    state = torch.randn(model.network.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(1))

    def ask(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        count = len(module) if isinstance(module, Experts) else module.get_parameter("gate_up_proj").shape[0]
        inputs = state.to(args[0]).expand(count, -1)  # a token for each
        chosen, weights = torch.arange(count, device=inputs.device)[:, None], inputs.new_ones(count, 1)
        router = model.network.get_submodule(f"{name.rpartition('.')[0]}.gate").get_parameter("weight")
        answers[f"router of {name}"] = (inputs[:1] @ router.t().to(inputs)).cpu().contiguous()
        answers[f"experts of {name}"] = module.forward(inputs, chosen, weights).cpu().contiguous()

    with contextlib.ExitStack() as stack:
        for name, module in model.network.named_modules():
            if isinstance(module, Experts) or _is_fused(module):
                hook = module.register_forward_pre_hook(functools.partial(ask, name))
                stack.callback(hook.remove)
        yield answers


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds the experts of a mixture in parameters of three dimensions; Phi-3 has linears so named."""
    weight = module._parameters.get("gate_up_proj")
    return weight is not None and weight.dim() == 3


def verify(request: Mapping[str, JsonValue]) -> str:
    """Check files and logits of the artifact that a request names; says how.

    Raises:
        BadArtifact: it does not load, or computes something else than the model that was in memory.
    """
    folder, device = Path(str(request["folder"])), str(request["device"])
    artifacts.verify(folder)
    config = json.loads((folder / "config.json").read_text())
    dtype = config["dtype"]
    own = headers.is_own(config)
    streamed = bool(request["streamed"]) and int(str(request["bytes"])) * ROOM > hardware.free_on(device)
    if streamed or own:
        from engine.stranger import Stranger  # with a library that is slow to import

        model = models.stream(folder, dtype, device, Stranger)
    else:
        model = models.load(folder, dtype, device)
    expected = load_file(Path(str(request["expected"])))
    with torch.inference_mode(), Everywhere(), asked(model) as answers:
        logits = model.network(input_ids=expected["ids"].to(model.device), use_cache=False).logits[0].float().cpu()
    check_answers(answers, {name: each for name, each in expected.items() if name not in ("ids", "logits")})
    distance = distance_of(logits, expected["logits"], mixture=headers.experts(config) > 1)
    if not distance <= TOLERANCE:
        raise BadArtifact(
            f"The saved model computes other logits than the one in memory: {distance:.1%} apart, "
            f"{TOLERANCE:.0%} is allowed."
        )
    how = "part by part, for it is large" if streamed else "with transformers"
    if own:
        how = "by Maquette's own reader, for the format is its own"
    return f"read back {how}: logits {distance:.2%} apart"


def check_answers(answers: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse routers and experts that answer otherwise than those in memory did.

    Raises:
        BadArtifact: one line that names the first.
    """
    for name, wanted in expected.items():
        found, wanted = answers[name].float(), wanted.float()
        apart = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12)
        for number, distance in enumerate(apart.tolist()):
            if not distance <= TOLERANCE:
                raise BadArtifact(
                    f"Number {number} of the {name} in the saved model computes something else than the one in "
                    f"memory: {distance:.1%} apart, {TOLERANCE:.0%} is allowed."
                )


def distance_of(logits: Tensor, expected: Tensor, *, mixture: bool) -> float:
    """The relative distance of logits (T, V); of a mixture of experts that of the middle token.

    Where two experts are nearly equal in a router's eyes, the last bit of a product decides which one a token gets: a
    few tokens may come out otherwise although every weight is right. The experts are asked apart (`asked`).
    """
    difference = logits - expected
    if mixture:
        return float((difference.norm(dim=-1) / expected.norm(dim=-1)).median())
    return float(difference.norm() / expected.norm())
