"""The kernels as a library: compiled at first use, kept in the user's cache, called through ctypes.

The sources beside this file are plain C++ over pointers and know nothing of torch or Python, so g++ needs four
seconds to nine, once for a machine and version. The processor is asked before anything is built or loaded, and the
compiler is told exactly the instructions that were asked for, so a library runs wherever its flags are there. Where
it cannot be had (another processor, no compiler, a failed build, MAQUETTE_NATIVE=0), torch's kernels compute as
before; the log says so once, and the kernels' names say so everywhere. MAQUETTE_NATIVE=avx2 asks for those of a
lesser processor.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_int32, c_long, c_void_p
from dataclasses import dataclass
from pathlib import Path

from engine.errors import short
from engine.files import publish
from engine.hardware import cores
from engine.processor import instructions

log = logging.getLogger(__name__)

SWITCH = "MAQUETTE_NATIVE"  # in the environment; 0: never, a kind of processor: at most what that can do
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Processor:
    """A kind of processor: its instructions as Linux names them, what the compiler is told, its folders of sources."""

    name: str
    instructions: tuple[str, ...]
    flags: tuple[str, ...] = ()
    less: Processor | None = None  # whose sources are its own, too, but those for which it has better ones
    tiles: bool = False  # whether the system must be asked for its registers

    @property
    def compile_flags(self) -> list[str]:
        """What the compiler is told of this kind."""
        asked = [f"-m{name.replace('amx_', 'amx-').replace('_', '')}" for name in self.instructions]
        return [*FLAGS, *self.flags, *asked, *(f"-I{folder}" for folder in self.folders)]

    @property
    def folders(self) -> list[Path]:
        """Where its sources are, its own first."""
        return [HERE / self.name, *(self.less.folders if self.less else [HERE])]

    @property
    def sources(self) -> list[Path]:
        """All files that the library is made of; of those with one name, the first folder's."""
        found = {path.name: path for folder in reversed(self.folders) for path in folder.iterdir()}
        return sorted(path for path in found.values() if path.suffix in KINDS)

    def here(self) -> bool:
        """Whether this machine's processor is one, and the system lets this process use it."""
        return instructions().issuperset(self.instructions) and (not self.tiles or may_use_tiles())


KINDS = (".cpp", ".h")
AVX512 = Processor(
    "avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "fma"),
    ("-mprefer-vector-width=512",),
)  # fmt: skip
AMX = Processor(
    "amx", (*AVX512.instructions, "amx_tile", "amx_bf16", "amx_int8"), AVX512.flags, less=AVX512, tiles=True
)
PROCESSORS = (AMX, AVX512, Processor("avx2", ("avx2", "fma")))  # best first
ARCH_PRCTL, ASK_FOR_STATE, TILES = 158, 0x1023, 18  # a call of Linux on x86-64, what it shall do, and for which state
PATIENCE = 300.0  # seconds for the compiler, on a machine that does other work


class Some(ctypes.Structure):
    """`Some` of between.cpp. Whoever makes one keeps the tensor it points to."""

    _fields_ = (("data", c_void_p), ("narrow", c_int32))


class Matrix(ctypes.Structure):
    """`Matrix` of products.h. Whoever makes one keeps the tensors it points to."""

    DENSE, INT4, INT8, INT8_INT8, TURNED = range(5)
    _fields_ = (
        ("kind", c_int32), ("rows", c_int32), ("columns", c_int32), ("group", c_int32), ("weight", c_void_p),
        ("scale", c_void_p), ("zero", c_void_p), ("sums", c_void_p), ("bias", c_void_p), ("input_scale", c_float),
    )  # fmt: skip


class Packed(ctypes.Structure):
    """`Packed` of attention.cpp. Whoever makes one keeps the tensors it points to."""

    _fields_ = (
        ("keys", c_void_p), ("values", c_void_p), ("key_codes", c_void_p), ("value_codes", c_void_p),
        ("key_scale", c_void_p), ("key_low", c_void_p), ("value_scale", c_void_p), ("value_low", c_void_p),
        ("bits", c_int32), ("group", c_int32), ("groups", c_int32), ("newest", c_int32),
    )  # fmt: skip


class Heads(ctypes.Structure):
    """`Heads` of heads.h. Whoever makes one keeps the tensor it points to."""

    _fields_ = (
        ("heads", c_int32), ("shared", c_int32), ("size", c_int32), ("turning", c_int32), ("scale", c_float),
        ("cap", c_float), ("coarse", c_int32), ("room", c_int32), ("bias", c_void_p),
    )  # fmt: skip


class Norm(ctypes.Structure):
    """`Norm` of decoder.cpp. Whoever makes one keeps the tensors it points to."""

    NONE, ROUNDED, RMS, LAYER = range(4)
    _fields_ = (
        ("kind", c_int32), ("epsilon", c_float), ("base", c_float), ("weight", c_void_p), ("bias", c_void_p),
    )  # fmt: skip


class Mlp(ctypes.Structure):
    """`Mlp` of decoder.cpp. Whoever makes one keeps the tensors it points to."""

    _fields_ = (
        ("inner", c_int32), ("rising", c_int32), ("gated", c_int32), ("act", c_int32), ("up", Matrix * 2),
        ("down", Matrix),
    )  # fmt: skip


class Mixture(ctypes.Structure):
    """`Mixture` of decoder.cpp. Whoever makes one keeps the tensors and the MLPs it points to."""

    _fields_ = (
        ("count", c_int32), ("chosen", c_int32), ("normed", c_int32), ("rounded", c_int32), ("shares", c_int32),
        ("router", Matrix), ("gate", Matrix), ("experts", c_void_p),
    )  # fmt: skip


class Block(ctypes.Structure):
    """`Block` of decoder.cpp. Whoever makes one keeps the tensors it points to."""

    _fields_ = (
        ("heads", Heads), ("before_attention", Norm), ("queries", Norm), ("keys", Norm), ("behind_attention", Norm),
        ("behind_sum", Norm), ("before_mlp", Norm), ("behind_mlp", Norm), ("behind_all", Norm), ("hidden", c_int32),
        ("asking", c_int32), ("asked", c_int32), ("whole", c_int32), ("beside", c_int32), ("order", c_void_p),
        ("q_k_v", Matrix * 3), ("o", Matrix), ("mlp", Mlp), ("mixture", c_void_p),
    )  # fmt: skip


_POINTERS = {  # arguments of the functions
    "maquette_multiply": (c_void_p, c_void_p, c_int, c_void_p, c_int),
    "maquette_multiply_many": (c_void_p, c_void_p, c_long, c_void_p, c_int),
    "maquette_normalize": (c_void_p, c_void_p, c_int, c_int, c_void_p),
    "maquette_activate": (c_int, c_void_p, c_int, c_void_p),
    "maquette_project": (c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int),
    "maquette_attend": (*[c_void_p] * 4, *[c_int] * 4, c_void_p, c_int),
    "maquette_attend_packed": (*[c_void_p] * 3, *[c_int] * 3, c_void_p, c_int),
    "maquette_finish": (c_void_p, c_void_p, c_void_p, c_int, c_int),
    "maquette_solve_columns": (*[c_void_p] * 6, c_int, c_long, c_float, c_void_p, c_void_p, c_int),
    "maquette_second_moments": (c_void_p, c_void_p, c_long, c_long, c_float, c_float, c_void_p, c_int),
    "maquette_rms_norm": (Some, c_void_p, c_long, c_long, c_float, Some, c_void_p, c_int),
    "maquette_rms_norm_back": (Some, Some, c_void_p, c_void_p, c_long, c_long, Some, c_void_p, c_int),
    "maquette_gate": (c_int, Some, c_void_p, c_long, c_void_p, c_int),
    "maquette_gate_back": (c_int, Some, c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_int),
    "maquette_rotate": (Some, c_void_p, Some, Some, c_long, c_void_p, c_int, Some, c_void_p, c_int),
    "maquette_soften": (Some, *[c_void_p] * 3, c_long, c_float, c_int),
    "maquette_soften_back": (Some, *[c_void_p] * 4, c_long, c_float, c_int),
    "maquette_forward_kl": (
        Some, c_long, c_long, c_void_p, c_long, c_void_p, c_long, c_void_p, *[c_float] * 3, c_void_p, c_void_p, c_int,
    ),
}  # fmt: skip


def library() -> ctypes.CDLL | None:
    """The kernels, built where they were not; None where this machine cannot have them or is told not to."""
    return None if os.environ.get(SWITCH) == "0" else _load()[0]


def available() -> str | None:
    """The kind of processor for which our own kernels compute products here; None where they do not."""
    return None if library() is None else _load()[1]


def may_use_tiles() -> bool:
    """Ask Linux for the registers of tiles (AMX), which no process has before it asked; all its threads then have.

    Source: the kernel's documentation, "Using XSTATE features in user space applications".
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    answer: int = ctypes.CDLL(None).syscall(c_long(ARCH_PRCTL), c_long(ASK_FOR_STATE), c_long(TILES))
    return answer == 0


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library of the best kind that can be had here, and the kind's name."""
    names = [kind.name for kind in PROCESSORS]
    asked = os.environ.get(SWITCH, "")
    kinds = [kind for kind in PROCESSORS[names.index(asked) if asked in names else 0 :] if kind.here()]
    if not kinds:
        missing = sorted({*PROCESSORS[-1].instructions} - instructions())
        log.info("packed products use torch's kernels: this processor has no %s", ", ".join(missing))
    reasons = []
    for kind in kinds:
        try:
            loaded = ctypes.CDLL(str(build(_folder(), kind)))
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append((error.stderr if isinstance(error, subprocess.CalledProcessError) else "") or str(error))
            continue
        for name, arguments in _POINTERS.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, None
        if reasons:
            log.warning(
                "packed products use kernels for %s; better ones could not be built: %s", kind.name, short(reasons[0])
            )
        return loaded, kind.name
    if reasons:
        log.warning("packed products use torch's slower kernels; ours could not be built: %s", short(reasons[0]))
    return None, None


def build(folder: Path, kind: Processor) -> Path:
    """The library for this processor, the sources and the compiler in `folder`, compiled where it is not yet there.

    Processes that come at the same time wait for the first; a name that exists is always a whole library.

    Raises:
        OSError: there is no compiler, or the folder is no safe place.
        subprocess.SubprocessError: the compiler failed or never ended.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++) is installed")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write into {folder}")  # and what lies there is run
    target = folder / f"maquette-{kind.name}-{_key(compiler, kind)}.so"
    if target.exists():  # also where nobody may write any more
        return target
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            began = time.monotonic()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                publish(_compile(compiler, kind, Path(scratch)), target)
            log.info("built the kernels for packed weights in %.0f s: %s", time.monotonic() - began, target)
    return target


def _compile(compiler: str, kind: Processor, scratch: Path) -> Path:
    """The library of a kind, in `scratch`; its sources are compiled beside each other."""

    def run(*arguments: str | Path) -> None:
        subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True, timeout=PATIENCE)

    def compiled(source: Path) -> Path:
        run(*kind.compile_flags, "-c", source, "-o", scratch / f"{source.stem}.o")
        return scratch / f"{source.stem}.o"

    with ThreadPoolExecutor(cores()) as pool:
        objects = list(pool.map(compiled, [path for path in kind.sources if path.suffix == ".cpp"]))
    run(*FLAGS, *objects, "-o", scratch / "library.so")
    return scratch / "library.so"


def _key(compiler: str, kind: Processor) -> str:
    """A name for what comes out: it changes with the sources, the compiler and the machine's kind."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=PATIENCE)
    parts = [*FLAGS, *kind.flags, *kind.instructions, version.stdout, *(path.read_text() for path in kind.sources)]
    text = "\0".join(parts)
    return hashlib.sha256(f"{platform.machine()}\0{text}".encode()).hexdigest()[:16]


def _folder() -> Path:
    """In the user's cache, or below the data folder that the environment names where the cache cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = os.environ.get("MAQUETTE_HOME")
    there = next(path for path in (cache, *cache.parents) if path.exists())
    if home and not os.access(there, os.W_OK | os.X_OK):
        return Path(home).expanduser() / "kernels"
    return cache / "maquette" / "kernels"
