"""Whether two models speak of the same tokens: only then can their probabilities be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from engine.errors import BadModel, short
from engine.models import load_tokenizer

SAMPLE = "The café's 3 owners met at 10:45; “why?” — naïve\tcode: x+=1\n\n  done."


def check_same_tokenizer(ours: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a model whose tokens are others.

    Raises:
        BadModel: the first difference.
    """
    theirs = load_tokenizer(folder)
    reason = difference(ours.get_vocab(), theirs.get_vocab())
    if not reason and ours(SAMPLE).input_ids != theirs(SAMPLE).input_ids:
        reason = "it splits text in other places"
    if reason:
        raise other_tokenizer(folder, reason)


def check_same_files(ours: Path, folder: Path) -> None:
    """The same before any work, by the folders' tokenizer.json alone; a folder without one is left to the worker.

    Raises:
        BadModel: the first difference.
    """
    files = [each / "tokenizer.json" for each in (ours, folder)]
    if not all(file.is_file() for file in files):
        return
    from tokenizers import Tokenizer

    reason = difference(*(_vocabulary(file) for file in files))
    if not reason:
        first, second = (Tokenizer.from_file(str(file)).encode(SAMPLE).ids for file in files)
        reason = "" if first == second else "it splits text in other places"
    if reason:
        raise other_tokenizer(folder, reason)


def _vocabulary(file: Path) -> dict[str, int]:
    """Tokens and their ids, added ones too."""
    try:
        body = json.loads(file.read_text())
        tokens = body["model"]["vocab"]
        found = dict(tokens) if isinstance(tokens, dict) else {each[0]: place for place, each in enumerate(tokens)}
        return found | {each["content"]: each["id"] for each in body.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, IndexError):
        raise BadModel(f"{short(file.parent.name)}: tokenizer.json is damaged. Download it again.") from None


def difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """Why two vocabularies are not the same, "" where they are."""
    if ours == theirs:
        return ""
    if len(ours) != len(theirs):
        return f"it has {len(theirs):,} tokens, the model {len(ours):,}"
    token = min(each for each in {*ours, *theirs} if ours.get(each) != theirs.get(each))
    there, here = theirs.get(token, "none"), ours.get(token, "none")
    return f"token {short(repr(token), 20)} has the id {there} there and {here} here"


def other_tokenizer(folder: Path, reason: str) -> BadModel:
    """What to say of a folder with another tokenizer."""
    return BadModel(
        f"{short(folder.name)} has another tokenizer: {reason}. Probabilities of different tokens cannot be compared; "
        "use a checkpoint of the same family."
    )
