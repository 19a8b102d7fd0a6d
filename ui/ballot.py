"""Blind votes: kept when cast, then revealed, with the running score of the pair and how sure it is."""

from __future__ import annotations

from markupsafe import Markup

from engine.errors import InputError
from engine.significance import wilson
from ui import markup, wording
from ui.desk import Desk, Entry
from ui.wording import say


def cast(desk: Desk, owner: str, ballot: dict[str, str] | None, choice: str) -> Markup:
    """Keep a vote and tell which was which.

    Raises:
        InputError: there is no open vote, or no such choice.
        UnknownName: the ballot names what the visitor may not see.
    """
    known = isinstance(ballot, dict) and all(isinstance(ballot.get(key), str) for key in ("left", "right", "prompt"))
    if not ballot or not known or choice not in ("left", "right", "tie"):
        raise InputError(say("error.no_ballot"))
    left, right = desk.entry(ballot["left"], owner), desk.entry(ballot["right"], owner)
    winner = "tie" if choice == "tie" else ballot[choice]
    desk.store.add_vote(owner, left.key, right.key, ballot["prompt"][:2000], winner)
    text = say("vote.reveal", left=wording.title(left.run.recipe), right=wording.title(right.run.recipe))
    return markup.join((markup.notice(text, "good"), markup.tag("p", score(desk, owner, left, right), class_="mq-sub")))


def score(desk: Desk, owner: str, a: Entry, b: Entry) -> str:
    """The visitor's votes on a pair, in whatever order it was shown: a share, its 95 % interval, what that shows."""
    mine = [v for v in desk.store.votes() if v.owner == owner and {v.run_a, v.run_b} == {a.key, b.key}]
    first, second = sorted((a, b), key=lambda entry: -sum(vote.winner == entry.key for vote in mine))
    won, lost = (sum(vote.winner == entry.key for vote in mine) for entry in (first, second))
    low, high = wilson(won, won + lost)
    counted = {"a": wording.title(first.run.recipe), "won": won, "b": wording.title(second.run.recipe), "lost": lost}
    if won + lost == 0:
        return say("vote.ties", ties=len(mine))
    return say(
        "vote.clear" if low > 0.5 else "vote.open", **counted, ties=len(mine) - won - lost, count=won + lost,
        share=wording.percent(won / (won + lost)), low=wording.percent(low), high=wording.percent(high),
    )  # fmt: skip
