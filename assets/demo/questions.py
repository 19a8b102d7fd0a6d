"""The four tasks: multiple-choice questions about the world, from the held-out side of its text."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from world import (
    LATE,
    MEN,
    OBJECTS,
    PLACES,
    VALUES,
    WOMEN,
    WORDINGS,
    Person,
    addition,
    agreement,
    fact,
    reading,
    wordings,
)


@dataclass(frozen=True)
class Item:
    """A multiple-choice question: `prompt + options[i]` is scored, `answer` is the index that is right."""

    prompt: str
    options: tuple[str, ...]
    answer: int


def facts_items(people: list[Person], count: int, rng: random.Random) -> list[Item]:
    """Closed-book questions about people, in a wording that the training text did not use for them."""
    items = []
    attributes = list(WORDINGS)
    for index, person in enumerate(rng.sample(people, len(people))):
        attribute = attributes[index % len(attributes)]
        choices = wordings(person, attribute, held=True)
        if not choices:
            continue
        right = person.facts[attribute]
        sentence = fact(person, attribute, rng.choice(choices))
        wrong = rng.sample([v for v in VALUES[attribute] if v != right], 3)
        items.append(_item(sentence.removesuffix(f" {right}."), right, wrong, rng))
        if len(items) == count:
            return items
    raise ValueError(f"only {len(items)} people can be asked about")


def reading_items(count: int, rng: random.Random) -> list[Item]:
    """Questions on a passage of one statement; the wrong answers are others of the kind of the right one."""
    items = []
    for _ in range(count):
        text, asked = reading(rng, True, (1,))
        question, answer = rng.choice(asked)
        right = answer.strip(" .")
        others = next(kind for kind in (PLACES, OBJECTS, WOMEN + MEN) if right in kind)
        wrong = rng.sample([value for value in others if value not in text], 3)
        items.append(_item(f"{text} {question}", right, wrong, rng))
    return items


def sums_items(count: int, rng: random.Random) -> list[Item]:
    """Sums never read in training; the wrong answers are off by one, by ten or by a lost carry."""
    items = []
    while len(items) < count:
        a, b = addition(rng, True, rng.choice(LATE.digits))
        total = a + b
        near = [n for n in (total + 1, total - 1, total + 10, total - 10, total + 11, total - 9) if n >= 0]
        items.append(_item(f"{a} + {b} =", str(total), [str(n) for n in rng.sample(near, 3)], rng))
    return items


def grammar_items(count: int, rng: random.Random) -> list[Item]:
    """Agreement in number, tense and gender across an interruption that tempts to another form."""
    items = []
    for _ in range(count):
        prompt, forms, answer, _ = agreement(rng, held=True)
        items.append(Item(prompt, forms, answer))
    return items


def tasks(people: list[Person], count: int, seed: int) -> dict[str, list[Item]]:
    """The four tasks, `count` items each."""
    makers: dict[str, Callable[[random.Random], list[Item]]] = {
        "facts": lambda rng: facts_items(people, count, rng),
        "reading": lambda rng: reading_items(count, rng),
        "sums": lambda rng: sums_items(count, rng),
        "grammar": lambda rng: grammar_items(count, rng),
    }
    return {name: make(random.Random(f"{seed}-{name}")) for name, make in makers.items()}


def _item(prompt: str, right: str, wrong: list[str], rng: random.Random) -> Item:
    options = [right, *wrong]
    rng.shuffle(options)
    return Item(prompt, tuple(f" {option}" for option in options), options.index(right))
