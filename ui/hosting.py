"""What a visitor reads of the mode: who is logged in, what may be taken, whose a run is and how long its files stay."""

from __future__ import annotations

from markupsafe import Markup

from engine.modes import Limits, Mode
from engine.records import Run, Status
from ui import markup, wording
from ui.markup import tag
from ui.visitors import display
from ui.wording import say


def who(owner: str) -> Markup:
    """Who is logged in, and the way out; nothing where nobody logs in."""
    name = display(owner)
    if not name:
        return Markup("")
    leave = tag(
        "form", tag("button", say("who.leave"), type="submit", class_="mq-open"), method="post", action="./logout"
    )
    return tag("div", tag("span", say("who.name", name=name)), leave, class_="mq-who")


def limits_line(mode: Mode, limits: Limits) -> Markup:
    """What one visitor may take here, in one line; nothing on a page of one's own."""
    if mode is Mode.LOCAL:
        return Markup("")
    parts = [say("limits.runs", running=limits.running, queued=limits.queued)]
    if limits.parameters is not None:
        parts.append(say("limits.parameters", count=wording.digits(limits.parameters / 1e9)))
    if limits.seconds is not None:
        parts.append(say("limits.seconds", span=wording.duration(limits.seconds)))
    if limits.disk is not None:
        parts.append(say("limits.disk", size=wording.size(limits.disk)))
    if limits.keep is not None:
        parts.append(say("limits.keep", span=wording.duration(limits.keep)))
    chips = markup.join(tag("li", part) for part in parts)
    return markup.details(say("limits.title"), tag("ul", chips, class_="mq-notes"))


def run_note(run: Run, limits: Limits, mine: bool, now: float) -> Markup:
    """Whose a shared run is, and when its files go, or that they have gone."""
    lines = []
    if run.shared:
        name, whose = display(run.owner), "yours" if mine else "theirs"
        lines.append(say(f"share.{whose}", name=name) if name else say(f"share.{whose}.link"))
    if run.expired is not None:
        lines.append(say("expiry.gone", when=wording.when(run.expired, now)))
    elif limits.keep is not None and run.finished is not None and run.status is not Status.CANCELLED:
        left = max(60.0, run.finished + limits.keep - now)
        lines.append(say("expiry.left", span=wording.duration(60 * round(left / 60))))
    return markup.join(markup.notice(line) for line in lines)


def marks(runs: list[Run], owner: str) -> dict[str, str]:
    """What stands beside a title in the table of runs, by the run's id."""
    found = {}
    for run in runs:
        if run.shared:
            found[run.id] = say("share.mark") if run.owner == owner else display(run.owner) or say("share.mark")
    return found
