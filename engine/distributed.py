"""Several processes that train one network: whose rows are whose, and the network in shards.

Each process holds a part of every weight, of its gradient and of the optimizer's moments, and gathers a block while it
computes it: FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al., 2023, arXiv 2304.11277). Training in float32
takes 16 bytes a parameter, divided by the number of processes. NCCL joins GPUs, gloo processes on a CPU.

In a process that nobody joined to others there is one process with all rows, and nothing here costs anything.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.models import blocks

PATIENCE = timedelta(days=1)  # the first process writes files while the others wait
T = TypeVar("T")


@contextlib.contextmanager
def joined(device: str, place: str) -> Iterator[None]:
    """Join the other processes meanwhile, as the environment says: RANK, WORLD_SIZE, LOCAL_RANK, as `torchrun` has it.

    place: where they meet: `env://`, or the `file://` of a new file, which opens no port.
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=place, rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=PATIENCE,
    )  # fmt: skip
    yield
    torch.distributed.destroy_process_group()  # not after an error: the others may never answer


def count() -> int:
    """How many processes train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def rank() -> int:
    """The number of this process; 0 speaks and writes for all."""
    return torch.distributed.get_rank() if count() > 1 else 0


def wait() -> None:
    """Go on when all processes have come here."""
    if count() > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process do this before the others, which then find what it kept."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def share(rows: Tensor) -> tuple[Tensor, float]:
    """This process's rows of a batch, and what its mean over them weighs in the mean over the processes.

    Of 5 rows among 2 processes the first has 3, which weigh 6/5, the other 2, which weigh 4/5. Who has none computes
    one for nothing, for all must take part.
    """
    mine = rows[rank() :: count()]
    return (mine, len(mine) * count() / len(rows)) if len(mine) else (rows[:1], 0.0)


def mean(value: float, device: torch.device) -> float:
    """The mean of the processes' numbers."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.item() / count()


def average_(tensors: Iterable[Tensor]) -> None:
    """Make tensors that no process has in shards the mean over the processes, the same in all to the last bit."""
    for each in tensors if count() > 1 else ():
        torch.distributed.all_reduce(each)
        each.div_(count())


def gathered(tensor: Tensor) -> Tensor:
    """A tensor that may be in shards, whole; all processes must ask."""
    if count() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process; a change to it is one to the tensor."""
    if count() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scattered(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have, in shards as `like` is."""
    tensor = tensor.to(like.device)
    if count() == 1:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class Shards:
    """A network in float32 whose weights lie in shards; made in all processes of the same network.

    `parameters` are the shards by name. Whatever computes with the network does so inside `run`: its weights outside
    the blocks (embeddings, the last norm, the head) are gathered there, for code that calls the head by itself too.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._empty = _without_weights(network)
        self._root = _Root(network.requires_grad_(True))
        mesh = init_device_mesh(network.device.type, (count(),))
        for module in (*blocks(network)[1], self._root):
            for parameter in module.parameters():  # of the root: those that are in no block, the others are done
                parameter.data = parameter.data.to(torch.float32)
            fully_shard(module, mesh=mesh, reshard_after_forward=module is not self._root)
        # Asked for now: while the root is gathered, the network has other parameters.
        self._all = list(network.named_parameters(remove_duplicate=False))
        self.parameters: Mapping[str, nn.Parameter] = dict(network.named_parameters())

    def run(self, work: Callable[[], T]) -> T:
        """Do what computes with the network, of which the result may be asked for gradients."""
        result: T = self._root(work)
        return result

    @torch.no_grad()
    def whole(self, dtype: torch.dtype) -> PreTrainedModel:
        """A plain network with the weights that the shards have, in every process."""
        found = {id(shard): gathered(shard).to(dtype) for shard in self.parameters.values()}
        for name, shard in self._all:
            owner, _, leaf = name.rpartition(".")
            own = nn.Parameter(found[id(shard)], requires_grad=False)
            self._empty.get_submodule(owner)._parameters[leaf] = own
        self._empty.tie_weights()
        return self._empty


class _Root(nn.Module):
    """A network around whose every use FSDP gathers and lets go, not around its `forward` alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def _without_weights(network: PreTrainedModel) -> PreTrainedModel:
    """A copy with its parameters on the meta device, of the same config."""
    memo: dict[int, object] = {id(network.config): network.config}
    for each in network.parameters():
        memo[id(each)] = nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=False)
    return copy.deepcopy(network, memo)
