"""What was measured once, kept: by two runs at once."""

from pathlib import Path

import pytest

from engine import files, scores


def test_two_runs_that_keep_the_same_at_once_both_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache" / "width-1234.json"

    def publish(temporary: Path, path: Path) -> None:
        monkeypatch.setattr(scores, "publish", files.publish)
        scores.keep([1.5], path)  # the other run, between what this one writes and its renaming
        files.publish(temporary, path)

    monkeypatch.setattr(scores, "publish", publish)
    scores.keep([2.5], file)
    assert scores.read(file) == [2.5]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
