"""A virtual environment for each peer, beside each other below `CACHE`, which git ignores.

Each wants versions that the other, or Maquette, cannot live with. torch comes first and by its exact version: an open
range would bring gigabytes of CUDA packages.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from benchmarks.sections import ROOT

CACHE = ROOT / "benchmarks" / ".cache" / "peers"
TORCH = "torch==2.13.0"
PACKAGES = {
    "gptqmodel": ("gptqmodel==7.6.0", "numpy==2.2.6"),
    "llmcompressor": ("llmcompressor==0.14.0",),
    "trl": ("trl==1.16.0", "transformers==5.23.0"),
}  # fmt: skip
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

log = logging.getLogger("peers")


def python(peer: str) -> Path:
    """The interpreter that runs a peer; makes its environment where there is none. Maquette runs in this one."""
    if peer not in PACKAGES:
        return Path(sys.executable)
    folder = CACHE / peer
    found, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        log.info("installing %s", ", ".join(PACKAGES[peer]))
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for packages in ((TORCH,), (TORCH, *PACKAGES[peer])):
            subprocess.run([str(found), "-m", "pip", "install", "-q", *packages], check=True)
        ready.touch()
    return found
