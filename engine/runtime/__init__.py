"""Models that compute on packed weights, and which kernel each device has for them."""

from engine.runtime.linear import Kernel, PackedLinear, kernel_for
from engine.runtime.load import load

__all__ = ["Kernel", "PackedLinear", "kernel_for", "load"]
