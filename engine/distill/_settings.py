"""The settings that methods of distillation share: the student, the teachers, the loss, the writing."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from engine import headers
from engine.configs import check_tokenizer
from engine.errors import BadModel, BadParams, short
from engine.fields import RARE, With
from engine.headers import integer
from engine.lesson import TextParams
from engine.losses import Divergence, Objective
from engine.methods import Params
from engine.origin import FolderOrigin, Origin
from engine.places import locate
from engine.sizes import attention_sizes, blocks_of, hidden_size
from engine.sources import named, split
from engine.surgery import anew, check_blocks
from engine.tokens import check_same_files

NOTHING_TO_HEAL = "No step before changes the model: the student begins as the teacher itself."


class BesideParams(Params):
    """Models that are read beside the recipe's own."""

    MODELS: ClassVar[frozenset[str]] = frozenset({"teachers", "folder"})

    def origin(self, name: str) -> Origin:
        """Where a model can be read that these settings name.

        Raises:
            BadModel: nobody has said where, and it is not on this machine.
        """
        return self._known.get(name) or FolderOrigin(locate(named(name)))

    def others(self) -> Sequence[str]:
        """Who teaches beside the original."""
        return ()


class TeacherParams(BesideParams):
    """Who teaches: the original model of the recipe, others beside it."""

    teachers: Annotated[str, RARE] = Field(
        "", max_length=4000,
        description="More teachers: `demo`, owner/name of the hub (@revision), or folders, separated by spaces, or in "
        "quotes; probabilities are averaged.",
    )  # fmt: skip

    @field_validator("teachers")
    @classmethod
    def _named(cls, value: str) -> str:
        split(value)
        return value

    def others(self) -> Sequence[str]:
        return split(self.teachers)

    def folders(self, original: Path) -> list[Path]:
        """The teachers' folders, the original first."""
        return [original, *(locate(named(each)) for each in self.others())]

    def models(self) -> Sequence[str]:
        """The teachers."""
        return [*super().models(), *self.others()]

    def renamed(self, rename: Callable[[str], str]) -> dict[str, JsonValue]:
        """The teachers."""
        found = {"teachers": shlex.join(map(rename, self.others()))} if self.others() else {}
        return {**super().renamed(rename), **found}

    def check_models(self, origin: Origin) -> None:
        """Refuse teachers that are no models, speak of other tokens, or would count twice in the mean."""
        super().check_models(origin)
        known = [origin.folder or origin.name]
        for each in self.others():
            other = self.origin(each)
            _check_beside(origin, other)
            if (other.folder or other.name) in known:
                raise BadParams(f"{short(each)} teaches already: the original does, and each other teacher once.")
            known.append(other.folder or other.name)

    def beside(self) -> Sequence[headers.Shape]:
        """The other teachers."""
        return [headers.inspect(self.origin(each)) for each in self.others()]


class ObjectiveParams(TeacherParams):
    """The loss on predictions."""

    divergence: Divergence = Field(
        "forward",
        description="KL to the teacher (forward), from it (reverse, MiniLLM), or between both (js, as in GKD).",
    )
    beta: Annotated[float, With("divergence", "js")] = Field(
        0.5, gt=0.0, lt=1.0, description="With divergence `js`: near 0 forward KL, near 1 reverse."
    )
    temperature: float = Field(1.0, ge=0.1, le=100.0, description="Softens both distributions; 1 changes nothing.")
    label_weight: float = Field(0.5, ge=0.0, le=1.0, description="Weight of the true labels beside the teacher.")

    @property
    def objective(self) -> Objective:
        """As the losses want it."""
        return Objective(self.divergence, self.temperature, self.label_weight, self.beta)


class CacheParams(ObjectiveParams):
    """Whether the teachers' answers are kept."""

    teacher_logits: Annotated[Literal["cached", "live"], RARE] = Field(
        "cached",
        description="Ask the teacher once and keep its top_k answers on disk, or ask at each step for all of them.",
    )
    top_k: Annotated[int, RARE, With("teacher_logits", "cached")] = Field(
        50, ge=1, le=1024, description="With `cached`: most probable tokens that are kept, with the rest."
    )


class WritingParams(TextParams):
    """From where sequences are written."""

    prompt_tokens: Annotated[int, RARE] = Field(
        16, ge=1, le=4096, description="Tokens of a document's or row's beginning, from which writing goes on."
    )

    @model_validator(mode="after")
    def _room(self) -> WritingParams:
        if self.prompt_tokens >= self.sequence_length:
            raise ValueError(f"prompt_tokens {self.prompt_tokens} leave no token of {self.sequence_length} to write")
        return self


Student = Literal["blocks", "size", "current", "folder"]


class StudentParams(BesideParams):
    """Who learns."""

    student: Student = Field(
        "blocks",
        description="Every k-th block of the model, a new network of a size, the model as it is, or a checkpoint.",
    )
    keep_every: Annotated[int, With("student", "blocks")] = Field(
        2, ge=1, le=64, description="With student `blocks`: keep every k-th block."
    )
    hidden_size: Annotated[int, With("student", "size")] = Field(
        128, ge=8, le=16384, description="With student `size`: width of the new network."
    )
    num_blocks: Annotated[int, With("student", "size")] = Field(
        2, ge=1, le=256, description="With student `size`: blocks of the new network."
    )
    folder: Annotated[str, With("student", "folder")] = Field(
        "", max_length=1000, validate_default=True,
        description="With student `folder`: a checkpoint with the same tokenizer; `demo`, owner/name of the hub "
        "(@revision), or a folder.",
    )  # fmt: skip

    @field_validator("folder")
    @classmethod
    def _names_the_student(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("student") == "folder" and not value.strip():
            raise ValueError("no checkpoint is named for the student. Write `demo`, owner/name of the hub, or a folder")
        return value

    def check_config(self, config: Mapping[str, JsonValue]) -> None:
        """Refuse a student that cannot be cut from the model."""
        super().check_config(config)
        count = integer(config.get("num_hidden_layers")) or integer(config.get("n_layer"))
        if self.student == "blocks" and count and self.keep_every > count:
            raise BadParams(f"keep_every {self.keep_every} leaves no block of {count}. Use {count} or less.")
        if self.student == "blocks" and self.keep_every > 1:
            check_blocks(config)
        hidden = integer(config.get("hidden_size")) or integer(config.get("n_embd"))
        heads = integer(config.get("num_attention_heads")) or integer(config.get("n_head"))
        size = integer(config.get("head_dim")) or (hidden // heads if heads else 0)
        if self.student == "size" and size and self.hidden_size % size:
            raise BadParams(f"hidden_size {self.hidden_size} is not a multiple of the head size {size} of this model.")

    def processes(self) -> int:
        """Each needs a row of the batch."""
        return integer(getattr(self, "batch", 1))

    def models(self) -> Sequence[str]:
        """The checkpoint."""
        return [*super().models(), *([self.folder] if self.student == "folder" else [])]

    def renamed(self, rename: Callable[[str], str]) -> dict[str, JsonValue]:
        """The checkpoint."""
        found = {"folder": rename(self.folder)} if self.student == "folder" else {}
        return {**super().renamed(rename), **found}

    def check_models(self, origin: Origin) -> None:
        """Refuse a checkpoint that is no model, is quantized, or speaks of other tokens."""
        super().check_models(origin)
        if self.student == "folder":
            own = self.origin(self.folder)
            if not headers.QUANTIZED.isdisjoint(headers.inspect(own).config):
                raise BadModel(f"{short(own.name)} is quantized; its codes cannot be trained. Name the original.")
            _check_beside(origin, own)

    def reshaped(
        self, config: dict[str, JsonValue], tensors: headers.Tensors
    ) -> tuple[dict[str, JsonValue], headers.Tensors]:
        """Those of the student."""
        if self.student == "folder":
            found = headers.inspect(self.origin(self.folder))
            return found.config, found.tensors
        if self.student == "blocks":
            return headers.fewer_blocks(config, tensors, attention_sizes(config)[0] // self.keep_every)
        if self.student == "size":
            return anew(config, self.hidden_size, self.num_blocks)
        return config, tensors

    def notes(self, shape: headers.Shape, device: str) -> Sequence[str]:
        """Say where the student is no smaller than the teacher."""
        found = list(super().notes(shape, device))
        # Matrices grow with the square of the width, and a block is one set of them.
        own_size, size = self.num_blocks * self.hidden_size**2, blocks_of(shape.config) * hidden_size(shape.config) ** 2
        if self.student == "size" and own_size >= size:
            found.append("The student is as large as the teacher, or larger: nothing gets smaller.")
        if self.student == "folder" and headers.inspect(self.origin(self.folder)).parameters >= shape.parameters:
            found.append("The student is as large as the teacher, or larger: nothing gets smaller.")
        return found

    def notes_at_first(self, shape: headers.Shape) -> Sequence[str]:
        """Say where the student is its only teacher."""
        found = list(super().notes_at_first(shape))
        if self.others():
            return found
        if self.student == "current":
            found.append(NOTHING_TO_HEAL)
        if self.student == "blocks" and self.keep_every == 1:
            found.append(
                "The student has every block of the teacher: it is as large, and begins as the teacher itself."
            )
        if self.student == "folder" and shape.here and self.origin(self.folder).folder == shape.folder:
            found.append("The student is the teacher itself.")
        return found


def _check_beside(ours: Origin, other: Origin) -> None:
    """Refuse a model that cannot be used beside the recipe's own, by headers and tokenizer.json alone."""
    headers.inspect(other)
    check_tokenizer(other)
    check_same_files(ours, other)
