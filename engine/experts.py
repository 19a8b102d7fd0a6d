"""The experts of a mixture, each with linears of its own.

`transformers` 5 holds the experts of a block in two tensors, (experts, 2 x width, hidden) and (experts, hidden, width).
Calibration needs to see which inputs each expert gets, and kernels compute with one packed matrix at a time. So the
experts become modules: gate, up and down, under the names that checkpoints have for them, from which `transformers`
fuses them again when it loads what was saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from engine.low_rank import Factored

# gate, up and down in checkpoints, for the families whose experts compute down(act(gate(x)) * up(x)), no biases.
NAMES: Mapping[str, tuple[str, str, str]] = {
    "mixtral": ("w1", "w3", "w2"),
    "olmoe": ("gate_proj", "up_proj", "down_proj"),
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
}


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x)); x and the result (tokens, hidden)."""

    def __init__(self, names: tuple[str, str, str], hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self._names = names
        gate, up, down = names
        self.add_module(gate, nn.Linear(hidden, width, bias=False))
        self.add_module(up, nn.Linear(hidden, width, bias=False))
        self.add_module(down, nn.Linear(width, hidden, bias=False))
        self.act_fn = ACT2FN[activation]

    @property
    def linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Gate, up and down, or what stands in their places."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        return gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.linears
        result: Tensor = down(self.act_fn(gate(x)) * up(x))
        return result


class Experts(nn.ModuleList):
    """All experts of a block, called as the family's own module is.

    While they are `reading_all`, each computes every token; what the router did not ask it for counts nowhere.
    """

    _all = False

    @property
    def readers(self) -> list[nn.Module]:
        """The linears that read what enters the experts: each one's gate and up, or the first half of a product."""
        first = [expert.get_submodule(name) for expert in self.children() for name in list(expert._modules)[:2]]
        return [each.down if isinstance(each, Factored) else each for each in first]

    @property
    def writers(self) -> list[nn.Module]:
        """The linears whose outputs are summed: each one's down, or the second half of a product."""
        last = [expert.get_submodule(name) for expert in self.children() for name in list(expert._modules)[2:3]]
        return [each.up if isinstance(each, Factored) else each for each in last]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum (tokens, hidden) of the experts that the router chose, k for each token.

        hidden_states: (tokens, hidden). top_k_index, top_k_weights: (tokens, k).
        """
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if self._all:
                output = expert(hidden_states)[token]
            elif token.numel():
                output = expert(hidden_states[token])
            else:
                continue
            result.index_add_(0, token, (output * top_k_weights[token, place, None]).to(result.dtype))
        return result

    @contextlib.contextmanager
    def reading_all(self) -> Iterator[None]:
        """Each computes every token meanwhile, so that what is hooked to its linears sees it.

        The sum is of the same products, which a processor may round otherwise where they are computed with others.
        """
        self._all = True
        try:
            yield
        finally:
            self._all = False


def separate(network: PreTrainedModel) -> None:
    """Replace the fused experts of the network's blocks; parameters are new, on the device that is torch's default."""
    config = network.config.get_text_config()
    names = NAMES.get(config.model_type)
    if names is None:
        return
    for path, module in list(network.named_modules()):
        fused, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
        if fused is not None and down is not None and fused.dim() == 3:
            count, hidden, width = down.shape
            experts = [Expert(names, hidden, width, config.hidden_act) for _ in range(count)]
            network.set_submodule(path, Experts(experts).to(fused.dtype), strict=True)
