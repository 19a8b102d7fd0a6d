"""Stop and Run, in whatever order their requests arrive."""

from __future__ import annotations

from ui.turns import MOST, Turns


def test_stop_ends_what_was_started_before_it() -> None:
    turns = Turns()
    mine, other = turns.begin("page", 1.0), turns.begin("another page", 1.0)
    turns.stop("page", 2.0)
    assert mine.stop.is_set()
    assert not mine.replaced
    assert not other.stop.is_set()


def test_a_stop_that_overtakes_its_run_still_ends_it() -> None:
    turns = Turns()
    turns.stop("page", 2.0)
    assert turns.begin("page", 1.0).stop.is_set()


def test_what_is_started_after_a_stop_goes_on() -> None:
    turns = Turns()
    later = turns.begin("page", 3.0)
    turns.stop("page", 2.0)
    assert not later.stop.is_set()
    turns.end("page", later)
    assert not turns.begin("page", 4.0).stop.is_set()


def test_a_new_turn_replaces_the_earlier_one_and_outlives_its_end() -> None:
    turns = Turns()
    first = turns.begin("page", 1.0)
    second = turns.begin("page", 2.0)
    assert first.replaced
    assert first.stop.is_set()
    turns.end("page", first)
    turns.stop("page", 3.0)
    assert second.stop.is_set()


def test_old_pages_are_forgotten() -> None:
    turns = Turns()
    for number in range(MOST + 1):
        turns.stop(f"page {number}", 2.0)
    assert not turns.begin("page 0", 1.0).stop.is_set()
    assert turns.begin(f"page {MOST}", 1.0).stop.is_set()
