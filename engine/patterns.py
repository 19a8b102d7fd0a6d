"""Patterns that choose linears by name: of the shell's kind or, after `re:`, regular expressions, in bounded time.

A regular expression can look for a match for years (`(a|a)+b`), and the thread that looks holds up every visitor. So
`regex` does it, which stops when its time is over. It writes counted repeats out before it looks, which takes memory:
what they come to together is bounded, too.
"""

from __future__ import annotations

import math
import re
import time
from fnmatch import translate
from functools import lru_cache

import regex

from engine.errors import BadParams, short

BODIES = ("model", "transformer", "gpt_neox")
IN_FILES, IN_NETWORKS = ".block_sparse_moe.", ".mlp."  # of Mixtral
MARK = "re:"
LONGEST = 200  # characters of a regular expression
MOST_REPEATS = 100  # that its counts come to, multiplied
PATIENCE = 0.02  # seconds for one name
SLOW = 0.001  # seconds above which a match counts as slow
PATIENCE_IN_ALL = 0.2  # seconds for all slow matches of an expression
COUNTED = re.compile(r"\{(\d{0,6}),?(\d{0,6})\}")


class Expression:
    """A regular expression with the time that is left for matches that are slow.

    Raises:
        ValueError: it is none, or too long; one line.
    """

    def __init__(self, text: str) -> None:
        self._text, self._left = text, PATIENCE_IN_ALL
        if len(text) > LONGEST:
            raise ValueError(f"{short(MARK + text)} has {len(text)} characters; at most {LONGEST} are read")
        counts = [max(1, *(int(number or 1) for number in found.groups())) for found in COUNTED.finditer(text)]
        if math.prod(counts) > MOST_REPEATS or text.count("{") > len(counts):
            raise ValueError(
                f"{short(MARK + text)} has braces that are no counts, or counts of more than {MOST_REPEATS} repeats "
                "in all"
            )
        try:
            self._compiled = regex.compile(text)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{short(MARK + text)} is no regular expression ({short(error)})") from None

    def matches(self, name: str) -> bool:
        """Whether it fits from the start of a name.

        Raises:
            BadParams: looking takes too long.
        """
        began = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            found = self._compiled.match(name, timeout=PATIENCE) is not None
        except (TimeoutError, MemoryError):
            self._left = 0.0
            raise BadParams(
                f"{short(MARK + self._text)} takes too long to match. Write it without repeats inside repeats."
            ) from None
        took = time.thread_time() - began
        self._left -= took if took > SLOW else 0.0
        return found


def check(patterns: str) -> None:
    """Refuse regular expressions that are none, or too long.

    Raises:
        ValueError: one line that names the pattern.
    """
    for pattern in patterns.split():
        if pattern.startswith(MARK):
            _expression(pattern.removeprefix(MARK))


def matches(patterns: str, name: str) -> bool:
    """Whether one of the patterns, with spaces between them, fits a linear's name.

    Raises:
        BadParams: a regular expression takes too long.
        ValueError: one is none, which `check` would have said.
    """
    expressions, shell = _read(patterns)
    names = _names(name)
    return (shell is not None and any(map(shell.match, names))) or any(
        expression.matches(each) for expression in expressions for each in names
    )


@lru_cache(256)
def _read(patterns: str) -> tuple[tuple[Expression, ...], re.Pattern[str] | None]:
    """The regular expressions among patterns; and all the others in one, whose translation never looks twice."""
    found = dict.fromkeys(patterns.split())
    shell = [translate(pattern) for pattern in found if not pattern.startswith(MARK)]
    expressions = [_expression(pattern.removeprefix(MARK)) for pattern in found if pattern.startswith(MARK)]
    return tuple(expressions), re.compile("|".join(shell)) if shell else None


@lru_cache(256)
def _expression(text: str) -> Expression:
    return Expression(text)


def _names(name: str) -> set[str]:
    """A linear's name as networks and as files have it: some files leave the body's name out, or call mixtures else."""
    body, _, inside = name.partition(".")
    bare = inside if body in BODIES else name
    found = {name, bare, *(f"{body}.{bare}" for body in BODIES)}
    return (
        found
        | {each.replace(IN_FILES, IN_NETWORKS) for each in found}
        | {each.replace(IN_NETWORKS, IN_FILES) for each in found}
    )
