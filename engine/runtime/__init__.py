"""Models that compute on packed weights, and which kernel each device has for them."""

from engine.runtime.linear import Kernel, PackedLinear, kernel_for
from engine.runtime.load import load, load_dense

__all__ = ["Kernel", "PackedLinear", "kernel_for", "load", "load_dense"]
