"""Weights in pages of 2 MiB.

Decoding streams all weights through the processor for each token. In pages of 4 KiB the hardware's prefetching stops
at each page's end and address translation takes its share: two Zen 4 cores read 31 GB/s from such pages and 59 GB/s
from pages of 2 MiB.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

PAGE = 1 << 21
LINE = 64  # bytes; tensors begin at a multiple
SMALL = 16 * PAGE  # below it caches hold the weights, and half-filled pages would show in the memory

_areas = WeakTensorKeyDictionary()  # of each tensor that was moved: its memory, and where there it begins
_readers = WeakTensorKeyDictionary()  # of each tensor: who reads its memory where it lies, as long as they live


def use_large_pages(network: nn.Module) -> None:
    """Move the tensors of a network into large pages where Linux offers them; each stays the same object.

    Nothing happens for networks of less than 32 MiB, for tensors on GPUs and for a library's own kinds of tensors.
    The memory grows by at most one tensor meanwhile and a page in the end.
    """
    tensors = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()] if _plain(tensor)}
    total = sum(-(-tensor.nbytes // LINE) * LINE for tensor in tensors.values())
    if total < SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    try:
        # No memory yet: pages come as they are written. Shared ones, mmap's default, would be small.
        area = mmap.mmap(-1, total + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return  # a kernel without them
    whole = torch.frombuffer(area, dtype=torch.uint8)
    at = -whole.data_ptr() % PAGE
    for tensor in tensors.values():
        place = whole[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.data)
        _areas[tensor] = (area, at)
        at += -(-tensor.nbytes // LINE) * LINE


def read_in_place(tensors: Iterable[Tensor], reader: object) -> None:
    """Let tensors' memory stay as long as a reader lives that knows where it lies."""
    for tensor in tensors:
        if tensor in _areas:
            _readers.setdefault(tensor, WeakSet()).add(reader)  # type: ignore[no-untyped-call]


def give_back(tensor: Tensor) -> None:
    """Let the system have the memory below a tensor that its owner reads no more, where it is in large pages.

    All of them are one area, which would else keep it: only whole pages of the tensor's own are given back. Where
    somebody still reads them in place they stay.
    """
    if _readers.get(tensor):  # type: ignore[no-untyped-call]
        return
    found = _areas.pop(tensor, None)  # type: ignore[no-untyped-call]
    if found is None:
        return
    area, start = found
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        area.madvise(mmap.MADV_DONTNEED, first, length)


def _plain(tensor: Tensor) -> bool:
    kind = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
    return kind and tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes() > 0
