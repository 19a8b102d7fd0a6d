"""Whether two models speak of the same tokens: only then can their probabilities be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.configs import read_object
from engine.errors import BadModel, short
from engine.hub import RepoOrigin
from engine.models import load_tokenizer
from engine.origin import Origin

FILE = "tokenizer.json"
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
        raise other_tokenizer(folder.name, reason)


def check_same_files(ours: Origin, theirs: Origin) -> None:
    """The same before any work, by the models' tokenizer.json alone; a model without one is left to the worker.

    Raises:
        BadModel: the first difference.
        HubError: the hub does not answer.
    """
    if not all(FILE in each.sizes for each in (ours, theirs)) or _same_content(ours, theirs):
        return
    from tokenizers import Tokenizer

    bodies = [read_object(each, FILE) for each in (ours, theirs)]
    reason = difference(*(_vocabulary(body, each) for body, each in zip(bodies, (ours, theirs), strict=True)))
    if not reason:
        first, second = (Tokenizer.from_str(json.dumps(body)).encode(SAMPLE).ids for body in bodies)
        reason = "" if first == second else "it splits text in other places"
    if reason:
        raise other_tokenizer(theirs.name, reason)


def _same_content(ours: Origin, theirs: Origin) -> bool:
    """Whether the files are the same; of two repos their listings say so, and none has to be read."""
    if ours.sizes[FILE] != theirs.sizes[FILE]:
        return False
    if isinstance(ours, RepoOrigin) and isinstance(theirs, RepoOrigin):
        return ours.listing.etags.get(FILE, "") == theirs.listing.etags.get(FILE)
    return ours.read(FILE, 0, ours.sizes[FILE]) == theirs.read(FILE, 0, theirs.sizes[FILE])


def _vocabulary(body: Mapping[str, Any], origin: Origin) -> dict[str, int]:
    """Tokens and their ids, added ones too."""
    try:
        tokens = body["model"]["vocab"]
        found = dict(tokens) if isinstance(tokens, dict) else {each[0]: place for place, each in enumerate(tokens)}
        return found | {each["content"]: each["id"] for each in body.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, IndexError):
        raise BadModel(f"{short(origin.name)}: tokenizer.json is damaged. Download it again.") from None


def difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """Why two vocabularies are not the same, "" where they are."""
    if ours == theirs:
        return ""
    if len(ours) != len(theirs):
        return f"it has {len(theirs):,} tokens, the model {len(ours):,}"
    token = min(each for each in {*ours, *theirs} if ours.get(each) != theirs.get(each))
    there, here = theirs.get(token, "none"), ours.get(token, "none")
    return f"token {short(repr(token), 20)} has the id {there} there and {here} here"


def other_tokenizer(name: str, reason: str) -> BadModel:
    """What to say of a model with another tokenizer."""
    return BadModel(
        f"{short(name)} has another tokenizer: {reason}. Probabilities of different tokens cannot be compared; "
        "use a checkpoint of the same family."
    )
