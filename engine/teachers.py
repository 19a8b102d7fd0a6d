"""Teachers: one network or several, asked as the student learns, or asked once with their answers kept on disk.

A cached answer is the k most probable tokens and the mass of the rest: with k = 50 about 300 bytes a token, 200 where
ids fit in 16 bits. Training then needs no teacher in memory, and other runs on the same text need none at all.

    cache/teachers/<fingerprint>/<rows>.safetensors     ids (tokens, k), logp (tokens, k), tail (tokens,)

The fingerprint is that of the teachers' weights, configs and tokenizers, of k and of the temperature that softened the
answers; <rows> that of the token ids and positions in a file. So an answer is found again exactly where the same
question was asked, however many rows another run reads, and a cache that is not finished is gone on with. A run has
links of its own to the files: those used longest ago make room for others. Several teachers answer with the mean of
their probabilities.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from engine import distributed, hardware, headers, models
from engine.body import Body
from engine.checkpoint import read_config
from engine.errors import BadModel, TooBig, short
from engine.files import fetch, give, publish
from engine.losses import Full, Target, TopK, averaged, chunk_size, pieces, top_k
from engine.methods import Context
from engine.models import LoadedModel
from engine.rows import Rows
from engine.runtime import load_dense
from engine.runtime.norms_and_gates import take_over
from engine.wide import multiplies_bfloat16

FILE_TOKENS = 1 << 16  # in one file of a cache
SHARE = 0.1  # of the free disk that answers may take
KEY = "maquette_teacher"  # of a file's metadata: whose answers these are, to what
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")

Answers = Callable[[slice], Target]  # for some of the batch's tokens, which are rows without their last token, in order


class Teacher(Protocol):
    """Who knows what should be predicted after each token of a row but the last."""

    def answers(self, rows: Rows, numbers: Tensor) -> Answers:
        """For the rows with these numbers (B,), as (B * (length - 1)) tokens."""


class Live:
    """Networks that are asked while the student learns: exact, and in memory. `vocabulary`: tokens that all know."""

    def __init__(self, bodies: Sequence[Body], vocabulary: int) -> None:
        self.bodies, self.vocabulary = bodies, vocabulary

    @property
    def device(self) -> torch.device:
        device: torch.device = self.bodies[0].network.device
        return device

    def answers(self, rows: Rows, numbers: Tensor) -> Answers:
        """What the teachers say now."""
        return self.of(*rows.of(numbers, self.device))

    @torch.no_grad()
    def of(
        self, ids: Tensor, positions: Tensor | None, chosen: Tensor | None = None, first: Tensor | None = None
    ) -> Answers:  # fmt: skip
        """For any ids and positions (B, T), without the last of each row; of these tokens the `chosen` ones, or all.

        first: what the first network's head reads (B, T, H), where somebody has asked for that already.
        """
        known = [] if first is None else [first]
        whole = [*known, *(body.hidden(ids, positions) for body in self.bodies[len(known) :])]
        states = [each[:, :-1].flatten(0, 1) for each in whole]
        states = states if chosen is None else [each[chosen] for each in states]

        @torch.no_grad()
        def answer(piece: slice) -> Target:
            found = []
            for body, hidden in zip(self.bodies, states, strict=True):
                logits = body.logits(hidden[piece])[:, : self.vocabulary]
                found.append(functional.log_softmax(logits.float(), -1))
            return Full(averaged(found))

        return answer


class Cached:
    """Answers on disk, mapped into memory and softened by a temperature; `device` is where they are wanted."""

    def __init__(self, files: Sequence[Path], rows_each: int, device: torch.device, temperature: float) -> None:
        self._files = [_Mapped.open(path) for path in files]
        self._each, self._device, self._temperature = rows_each, device, temperature

    def answers(self, rows: Rows, numbers: Tensor) -> Answers:
        """What the teachers said."""
        width = rows.ids.shape[1] - 1
        parts = [self._files[number // self._each].tokens(number % self._each, width) for number in numbers.tolist()]
        ids, logp, tail = (torch.cat(each).to(self._device) for each in zip(*parts, strict=True))
        return lambda piece: TopK(ids[piece].long(), logp[piece].float(), tail[piece].float(), self._temperature)


@dataclass(frozen=True)
class _Mapped:
    """One file of a cache, mapped into memory."""

    arrays: tuple[np.memmap, ...]

    @classmethod
    def open(cls, path: Path) -> _Mapped:
        found = headers.read_header(path)
        dtypes = {"I16": np.int16, "I32": np.int32, "F16": np.float16}
        return cls(
            tuple(
                np.memmap(path, dtypes[found[name].dtype], "r", found[name].start, found[name].shape)
                for name in ("ids", "logp", "tail")
            )
        )

    def tokens(self, row: int, width: int) -> tuple[Tensor, ...]:
        """ids (width, k), logp (width, k) and tail (width,) of a row of the file."""
        return tuple(torch.from_numpy(each[row * width : (row + 1) * width].copy()) for each in self.arrays)


@dataclass(frozen=True)
class Question:
    """How teachers are asked: in which dtype, for how many of the most probable tokens, softened by which temperature.

    Their logits are those of the first `vocabulary` tokens.
    """

    dtype: str
    k: int
    vocabulary: int
    temperature: float = 1.0


def cached(
    folders: Sequence[Path], rows: Rows, question: Question, context: Context, load: Callable[[], Live]
) -> Cached:
    """The teachers' answers to all rows, from disk where they are; where some are missing, `load`s them.

    Of several processes each asks for some of the files. Those that are damaged are asked for again.

    Raises:
        BadModel: a file of the cache is another teacher's.
        TooBig: the cache does not fit on the disk.
    """
    whose = fingerprint(folders, question)
    width = rows.ids.shape[1]
    each = max(1, FILE_TOKENS // width)
    spans = [(piece.start, piece.stop) for piece in pieces(len(rows), each)]
    room, own = context.cache / "teachers", context.folder / "answers" / whose[:32]
    files = [own / f"{rows.digest(*span)[:32]}.safetensors" for span in spans]
    shared = [room / whose[:32] / file.name for file in files]
    missing = [
        place
        for place, (file, kept) in enumerate(zip(files, shared, strict=True))
        if not _is_of(file, whose) and not (_shared(kept, whose) and _replaced(file, kept))
    ]
    if missing:
        tokens = sum(spans[place][1] - spans[place][0] for place in missing) * (width - 1)
        _check_room(own, tokens * bytes_per_token(question.k, question.vocabulary))
        mine = [place for place in missing if place % distributed.count() == distributed.rank()]
        live = load() if mine else None
        for done, place in enumerate(mine):
            assert live is not None
            context.progress(done, len(mine), "files of the teacher's answers")
            write_answers(live, rows, spans[place], question, files[place], whose, context)
            give(files[place], shared[place], room, SHARE)
        context.progress(len(mine), len(mine), "files of the teacher's answers")
        context.log(
            f"the teacher answered for {tokens:,} tokens; {len(files) - len(missing)} of {len(files)} files reused"
        )
    else:
        context.log(f"reused the teacher's answers of an earlier run ({len(files)} files); it is not loaded")
    distributed.wait()  # for the answers that others ask for
    return Cached(files, each, torch.device(context.device), question.temperature)


def write_answers(
    live: Live, rows: Rows, span: tuple[int, int], question: Question, path: Path, whose: str, context: Context
) -> None:  # fmt: skip
    """Ask for the rows of a span and write one file, whole or not at all."""
    length = rows.ids.shape[1]
    tokens, kept = (span[1] - span[0]) * (length - 1), min(question.k, live.vocabulary - 1)
    narrow = torch.int16 if live.vocabulary <= 1 << 15 else torch.int32
    # Room for all of it at once: what is kept piece by piece would lie between the pieces' large tensors, and each
    # would then need new memory.
    ids = torch.empty(tokens, kept, dtype=narrow)
    logp, tail = torch.empty(tokens, kept, dtype=torch.half), torch.empty(tokens, dtype=torch.half)
    done = 0
    for piece in pieces(span[1] - span[0], max(1, 2048 // length)):
        context.check_cancelled()
        numbers = torch.arange(span[0] + piece.start, span[0] + piece.stop)
        answer = live.answers(rows, numbers)
        for part in pieces(len(numbers) * (length - 1), chunk_size(live.vocabulary, live.device)):
            target = answer(part)
            assert isinstance(target, Full)
            found = top_k(target.logp, question.k, question.temperature)
            some = slice(done + part.start, done + part.stop)
            ids[some], logp[some], tail[some] = found.ids, found.logp, found.tail
        done += len(numbers) * (length - 1)
    tensors = {"ids": ids, "logp": logp, "tail": tail}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={KEY: json.dumps({"teacher": whose, "rows": path.stem})})
    publish(temporary, path)


def _about(file: Path) -> JsonValue:
    """What a file of answers says that it is; None where none is there, or it is not whole."""
    try:
        with safe_open(file, "pt") as opened:
            return cast(JsonValue, json.loads((opened.metadata() or {}).get(KEY, "{}")))
    except (OSError, SafetensorError, ValueError):
        return None


def _is_of(file: Path, whose: str) -> bool:
    """Whether a file is finished, whole, and of these teachers."""
    return _about(file) == {"teacher": whose, "rows": file.stem}


def _shared(file: Path, whose: str) -> bool:
    """Whether a finished file is there that runs share; one that is damaged is as if it were not.

    Raises:
        BadModel: it is another teacher's.
    """
    if _about(file) is None:
        return False
    if not _is_of(file, whose):
        raise BadModel(
            f"The cache {short(file.name, 12)} was made by another teacher or tokenizer. "
            f"Delete the folder {file.parent.name} below cache/teachers."
        )
    return True


def _replaced(own: Path, shared: Path) -> bool:
    """Whether a shared file could be linked to a run's own place, where none is, or a damaged one."""
    own.unlink(missing_ok=True)
    return fetch(own, shared)


def _check_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise TooBig(
                f"The teacher's answers need {needed / 2**30:.1f} GiB on disk, {free / 2**30:.1f} are free. "
                "Use fewer steps, a smaller top_k, or teacher_logits `live`."
            )


def bytes_per_token(k: int, vocabulary: int) -> int:
    """Of a cache."""
    return k * ((2 if vocabulary <= 1 << 15 else 4) + 2) + 2


def fingerprint(folders: Sequence[Path], question: Question) -> str:
    """SHA-256 of the teachers' weights, configs and tokenizers and of how they are asked, in hexadecimal."""
    found = hashlib.sha256(repr(question).encode())
    for each in sorted(_digest(folder) for folder in folders):
        found.update(each)
    return found.hexdigest()


def _digest(folder: Path) -> bytes:
    found = hashlib.sha256()
    others = [folder / name for name in ("config.json", *TOKENIZER) if (folder / name).is_file()]
    for file in [*headers.weight_files(folder), *others]:
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.digest()


def shared_vocabulary(folders: Sequence[Path], student: int) -> int:
    """Tokens that the student and all teachers have logits for: their sizes may differ by padding."""
    sizes: list[int] = [read_config(folder).get_text_config().vocab_size for folder in folders]
    return min([student, *sizes])


def dtype_of(model: LoadedModel) -> str:
    """The dtype in which the recipe loads models."""
    return str(model.network.dtype).removeprefix("torch.")


def load_live(folders: Sequence[Path], vocabulary: int, context: Context, dtype: str) -> Live:
    """The teachers in memory, or read part by part where they are larger than what is free.

    Where the processor has no products of bfloat16 they are float32, if there is room: they are asked in every step.

    Raises:
        BadModel: one cannot be loaded.
    """
    bodies = []
    for folder in folders:
        shape = headers.inspect(folder)
        free = hardware.free_memory()
        fits = 2 * shape.bytes < free or context.device != "cpu"
        wide = not multiplies_bfloat16(context.device) and 4 * shape.bytes < free
        teacher = (load_dense if fits else models.stream)(folder, "float32" if wide else dtype, context.device)
        if not fits:
            context.log(f"the teacher {folder.name} is larger than half of the free memory: one block at a time")
        teacher.network.requires_grad_(False)
        take_over(teacher.network)
        bodies.append(Body.of(teacher.network))
    return Live(bodies, vocabulary)
