"""The small invented world that the demo model knows: its people and its text. `questions.py` asks about it.

Everything is drawn from a seeded generator. One rule keeps training and testing apart: a *unit* (a
sentence about a person, a passage, a sum, a sentence about agreement, a story) belongs to the held-out
side when the hash of its text says so, and to the training side otherwise. No unit can be on both.

- Facts about people are **memory**: they can only be known by having read them. A question uses a
  wording that the training text never used for that person's attribute.
- Reading, sums and grammar are **rules**: the very passages, sums and sentences asked were never read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

WOMEN = (
    "Ada Bela Cora Dina Edda Fenna Gila Hanna Ilka Jona Kira Lena Mira Nora Oda Petra Runa Sela Tilda Ulla "
    "Vera Wilma Yara Zita"
).split()
MEN = (
    "Arno Bruno Curt Dario Emil Falk Gero Hugo Ivo Jaro Klaus Levi Milo Nils Otto Pavel Rolf Sven Timo Udo "
    "Viktor Willi Yuri Zeno"
).split()
FAMILIES = (
    "Alder Birk Crane Dorn Elm Finch Gale Hart Iver Joss Kern Lark Moss Nash Oakes Pike Quill Reed Stone Thorn "
    "Ulm Vale Wren York Ash Brook Cliff Dale Fern Grove Heath Marsh Abel Bright Cobb Drake Ellis Frost Glenn Hobbs "
    "Irwin Jarvis Keats Locke Munro Noble Orwell Pryor"
).split()
TOWNS = (
    "Alma Borna Calden Dorva Elsin Farrow Gorin Halden Imber Jarla Kelso Lunde Morva Nessa Orlin Parva Quenby "
    "Rosta Selby Tarn Umbra Velden Wick Zarin"
).split()
JOBS = (
    "baker farmer tailor miller potter weaver painter sailor fisher hunter builder teacher doctor singer dancer "
    "writer banker barber carter cooper mason miner porter tanner"
).split()
PETS = (
    "cat dog goat horse parrot rabbit turtle snake mouse hen duck goose donkey lamb pig fox frog crow hawk bee "
    "lizard hamster pony swan"
).split()
FOODS = (
    "bread cheese soup rice fish honey apples plums pears beans cake eggs nuts grapes corn stew pie figs cherries "
    "carrots onions noodles porridge olives"
).split()
HOBBIES = (
    "chess cards music sewing fishing rowing riding cooking reading singing swimming running skating drawing hiking "
    "gardening juggling carving knitting dancing sailing climbing painting archery"
).split()
OBJECTS = (
    "lamp key rope book coin cup bell map ring knife hat drum box bag flute candle mirror basket ladder hammer "
    "blanket bottle letter clock"
).split()
PLACES = (
    "barn mill tower cellar garden kitchen chapel stable attic harbor market school forest cave bridge well inn "
    "library workshop hall"
).split()
MOODS = "quiet happy tired angry hungry ready sad late busy proud calm brave".split()

# Wordings of each attribute. The value always comes last, so that any of them can be asked.
WORDINGS: dict[str, tuple[str, ...]] = {
    "town": (
        "{name} lives in {value}.",
        "The home of {name} is in {value}.",
        "You will find {name} in {value}.",
        "{name} has a house in {value}.",
        "Where does {name} live? In {value}.",
        "The letters for {name} go to {value}.",
        "{name} never moved away from {value}.",
        "Everyone knows that {name} comes from {value}.",
    ),
    "job": (
        "{name} works as a {value}.",
        "The work of {name} is that of a {value}.",
        "{name} earns money as a {value}.",
        "{name} learned to be a {value}.",
        "What does {name} do for a living? The work of a {value}.",
        "People know {name} as a {value}.",
        "{name} became a {value}.",
        "For years {name} has been a {value}.",
    ),
    "pet": (
        "{name} has a {value}.",
        "The pet of {name} is a {value}.",
        "{name} looks after a {value}.",
        "At home {name} keeps a {value}.",
        "What animal does {name} keep? A {value}.",
        "{name} takes walks with a {value}.",
        "{name} once found a {value}.",
        "The best friend of {name} is a {value}.",
    ),
    "food": (
        "{name} likes to eat {value}.",
        "The favorite food of {name} is {value}.",
        "{name} always orders {value}.",
        "For dinner {name} wants {value}.",
        "What does {name} like to eat? Some {value}.",
        "{name} asks for more {value}.",
        "{name} cannot resist {value}.",
        "On feast days {name} eats {value}.",
    ),
    "hobby": (
        "{name} enjoys {value}.",
        "The hobby of {name} is {value}.",
        "In the evening {name} goes for {value}.",
        "{name} spends free days on {value}.",
        "What does {name} do for fun? Mostly {value}.",
        "{name} is good at {value}.",
        "{name} tells everyone about {value}.",
        "Nothing pleases {name} more than {value}.",
    ),
}
VALUES = {"town": TOWNS, "job": JOBS, "pet": PETS, "food": FOODS, "hobby": HOBBIES}


@dataclass(frozen=True)
class Person:
    """One inhabitant: a full name that is unique, a gender for pronouns, a value per attribute."""

    first: str
    family: str
    woman: bool
    facts: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.first} {self.family}"


def held_out(unit: str, share: int = 8) -> bool:
    """Whether this unit of text belongs to the held-out side: one in `share`, by the hash of its text."""
    return hashlib.sha256(unit.encode()).digest()[0] % share == 0


def inhabitants(count: int, seed: int) -> list[Person]:
    """`count` people with distinct full names."""
    rng = random.Random(seed)
    names = [(first, family) for first in WOMEN + MEN for family in FAMILIES]
    return [
        Person(first, family, first in WOMEN, {key: rng.choice(values) for key, values in VALUES.items()})
        for first, family in rng.sample(names, count)
    ]


def fact(person: Person, attribute: str, wording: int) -> str:
    """One sentence that states one fact."""
    return WORDINGS[attribute][wording].format(name=person.name, value=person.facts[attribute])


def wordings(person: Person, attribute: str, held: bool) -> list[int]:
    """The wordings that stand on one side of the split for this person and attribute."""
    return [i for i in range(len(WORDINGS[attribute])) if held_out(fact(person, attribute, i), 4) == held]


def biography(rng: random.Random, people: list[Person], held: bool) -> str:
    """Several sentences about one person in a row."""
    person = rng.choice(people)
    sentences = []
    for attribute in rng.sample(list(WORDINGS), len(WORDINGS)):
        choices = wordings(person, attribute, held)
        if choices:
            sentences.append(fact(person, attribute, rng.choice(choices)))
    return " ".join(sentences)


def story(rng: random.Random, people: list[Person]) -> str:
    """A short story in which two people act as their facts say."""
    a, b = rng.sample(people, 2)
    he, his = ("She", "her") if a.woman else ("He", "his")
    him = "her" if b.woman else "him"
    start = rng.choice(("One day", "In spring", "Last winter", "Long ago", "On a cold morning"))
    thing, place = rng.choice(OBJECTS), rng.choice(PLACES)
    opening = rng.choice(
        (
            f"{start} {a.name} left {a.facts['town']} with {his} {a.facts['pet']}.",
            f"{start} the {a.facts['job']} {a.name} packed some {a.facts['food']} and a {thing}.",
            f"{start} {a.name} grew tired of {a.facts['hobby']} and of {a.facts['town']}.",
        )
    )
    meeting = rng.choice(
        (
            f"{he} met {b.name}, a {b.facts['job']} from {b.facts['town']}.",
            f"Near the {place} {his} {a.facts['pet']} saw the {b.facts['pet']} of {b.name}.",
            f"In the {place} sat {b.name} and ate {b.facts['food']}.",
        )
    )
    ending = rng.choice(
        (
            f"{a.first} gave {him} the {thing}, and they talked about {b.facts['hobby']}.",
            f"They shared {a.facts['food']} until {a.first} went home to {a.facts['town']}.",
            f"{b.first} asked for {b.facts['food']}, and {a.first} told {him} about {a.facts['hobby']}.",
        )
    )
    return f"{opening} {meeting} {ending}"


def passage(rng: random.Random, statements: int) -> tuple[str, list[tuple[str, str]]]:
    """A passage that says who has what or put it where, and (question, answer) pairs about each statement."""
    told, asked = [], []
    kind = rng.choice(("has", "put"))
    facts = zip(
        rng.sample(WOMEN + MEN, statements), rng.sample(OBJECTS, statements), rng.sample(PLACES, statements),
        strict=True,
    )  # fmt: skip
    for who, thing, place in facts:
        if kind == "has":
            told.append(f"{who} has the {thing}.")
            asked += [(f"Who has the {thing}? It is", f" {who}."), (f"What does {who} have? It is the", f" {thing}.")]
        else:
            told.append(f"{who} put the {thing} in the {place}.")
            asked += [
                (f"Where is the {thing}? It is in the", f" {place}."),
                (f"Who put the {thing} there? It was", f" {who}."),
                (f"What is in the {place}? It is the", f" {thing}."),
            ]
    return " ".join(told), asked


def inventory(rng: random.Random, count: int) -> str:
    """A list of things and places that is read out twice, the second time in another order."""
    pairs = [f"{t} {p}" for t, p in zip(rng.sample(OBJECTS, count), rng.sample(PLACES, count), strict=True)]
    again = rng.sample(pairs, count)
    return f"List: {', '.join(pairs)}. Again: {', '.join(again)}."


def reading(rng: random.Random, held: bool, statements: tuple[int, ...]) -> tuple[str, list[tuple[str, str]]]:
    """A passage from one side of the split."""
    while True:
        text, asked = passage(rng, rng.choice(statements))
        if held_out(text) == held:
            return text, asked


def addition(rng: random.Random, held: bool, digits: int) -> tuple[int, int]:
    """Two numbers of so many digits whose sum stands on one side of the split."""
    while True:
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        if held_out(f"{a} + {b}") == held:
            return a, b


def agreement(rng: random.Random, held: bool) -> tuple[str, tuple[str, ...], int, str]:
    """A sentence whose marked word must agree across an interruption: (prompt, forms, right one, ending)."""
    while True:
        heads = rng.sample(JOBS + PETS, 2)
        plural, other = rng.random() < 0.5, rng.random() < 0.5
        subject, near = pluralize(heads[0], plural), pluralize(heads[1], other)
        link = rng.choice(("near", "behind", "beside", "with"))
        between = rng.choice((f"{link} the {near}", f"that the {near} {'know' if other else 'knows'}"))
        if rng.random() < 0.5:
            past = rng.random() < 0.5
            when = rng.choice(("Yesterday", "Last week")) if past else rng.choice(("Today", "Right now"))
            prompt, forms = f"{when} the {subject} {between}", (" is", " are", " was", " were")
            answer, ending = 2 * past + plural, f" {rng.choice(MOODS)}."
        else:
            first = rng.choice(WOMEN + MEN)
            woman = first in WOMEN
            single = rng.random() < 0.5
            who = first if single else f"The {subject}"
            prompt = f"{who} {between} {rng.choice(('washed', 'saw', 'helped', 'praised'))}"
            forms = (" herself", " himself", " themselves", " itself")
            if not single and not plural:
                animal = heads[0] in PETS
                if not animal:
                    continue  # a job alone does not tell a gender
                answer = 3
            else:
                answer = (0 if woman else 1) if single else 2
            ending = "."
        if held_out(prompt) == held:
            return prompt, forms, answer, ending


def pluralize(noun: str, plural: bool) -> str:
    """The plural of a noun of this world, or the noun itself."""
    irregular = {"mouse": "mice", "goose": "geese", "fox": "foxes", "pony": "ponies"}
    return (irregular.get(noun) or noun + "s") if plural else noun


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of documents; how long passages, inventories and the numbers of sums are."""

    shares: dict[str, float]
    statements: tuple[int, ...]
    pairs: tuple[int, ...]
    digits: tuple[int, ...]


# Looking something up in the text is learned from passages with one thing to find. Numbers of three digits teach
# this model how large a sum is, but not its digits, in 6,000 steps; so the last mixture has two digits alone.
EARLY = Mixture(
    {"biography": 0.40, "story": 0.04, "reading": 0.23, "inventory": 0.15, "sums": 0.11, "agreement": 0.07},
    statements=(1,),
    pairs=(1, 2, 3),
    digits=(2,),
)
MIDDLE = Mixture(
    {"biography": 0.42, "story": 0.04, "reading": 0.16, "inventory": 0.10, "sums": 0.22, "agreement": 0.06},
    statements=(1, 1, 2, 3),
    pairs=(1, 2, 3, 4),
    digits=(2, 3, 3),
)
LATE = replace(MIDDLE, digits=(2,))
LAST = replace(
    LATE,
    shares={"biography": 0.28, "story": 0.04, "reading": 0.26, "inventory": 0.06, "sums": 0.31, "agreement": 0.05},
)


def document(rng: random.Random, people: list[Person], mixture: Mixture, held: bool = False) -> str:
    """One document from one side of the split, of a kind drawn by the mixture's shares."""
    kind = rng.choices(list(mixture.shares), list(mixture.shares.values()))[0]
    if kind == "biography":
        return biography(rng, people, held)
    if kind == "story":
        return _one_side(lambda: story(rng, people), held)
    if kind == "reading":
        text, asked = reading(rng, held, mixture.statements)
        rng.shuffle(asked)
        return " ".join([text, *(question + answer for question, answer in asked)])
    if kind == "inventory":
        return _one_side(lambda: inventory(rng, rng.choice(mixture.pairs)), held)
    if kind == "sums":
        digits = rng.choice(mixture.digits)
        return " ".join(f"{a} + {b} = {a + b}." for a, b in (addition(rng, held, digits) for _ in range(5)))
    parts = (agreement(rng, held) for _ in range(5))
    return " ".join(prompt + forms[answer] + ending for prompt, forms, answer, ending in parts)


def _one_side(make: Callable[[], str], held: bool) -> str:
    """The first text that `make` gives on the wanted side of the split."""
    while True:
        text = make()
        if held_out(text) == held:
            return text


def stream(people: list[Person], seed: int, mixture: Mixture = EARLY, held: bool = False) -> Iterator[str]:
    """An endless stream of documents from one side of the split."""
    rng = random.Random(f"{seed}-{held}")
    while True:
        yield document(rng, people, mixture, held)
