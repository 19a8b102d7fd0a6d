"""The AutoGPTQ format's second version, which stores zero points as they are; everything else is in `gptq.py`."""

from engine.export.gptq import export_v2 as export

__all__ = ["export"]
