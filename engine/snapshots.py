"""Models of the hub that are here: a cache in huggingface_hub's own layout.

Other tools read it, and a cache that they have filled is read here:

    models--owner--name/blobs/<etag>               contents; <etag>.incomplete is what a download goes on from
                        snapshots/<commit>/<file>  links to them
                        refs/<branch>              the commit of a branch when it was last asked for
                        wanted/<commit>.json       ours: the files that make the snapshot complete
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from engine.configs import weight_names
from engine.errors import BadModel
from engine.files import Unused, publish
from engine.origin import FolderOrigin
from engine.sources import COMMIT, Repo

RESERVE = 64 << 20  # bytes of the disk that stay free


class Snapshots:
    """The cache in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, repo: Repo) -> Path:
        """The repo's folder in the cache."""
        return self.folder / "--".join(["models", *repo.name.split("/")])

    def find(self, repo: Repo) -> Path | None:
        """The folder of a repo at a commit, where all of it is here."""
        if not repo.pinned:
            return None
        folder = self.place(repo) / "snapshots" / repo.revision
        wanted = self._wanted(repo)
        if wanted is not None:
            return folder if all(bytes_of(folder / name) == size for name, size in wanted.items()) else None
        origin = FolderOrigin(folder)  # another tool has filled this cache
        try:
            return folder if "config.json" in origin.sizes and weight_names(origin) else None
        except BadModel:
            return None

    def want(self, repo: Repo, sizes: Mapping[str, int], restricted: bool) -> None:
        """Note what makes the snapshot complete, before the first of it is here."""
        path = self.place(repo) / "wanted" / f"{repo.revision}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"files": dict(sizes), "restricted": restricted}))
        publish(temporary, path)

    def restricted(self, repo: Repo) -> bool:
        """Whether a snapshot was gated or private when it was downloaded."""
        return bool(self._note(repo).get("restricted"))

    def missing(self, repo: Repo, sizes: Mapping[str, int], etags: Mapping[str, str]) -> int:
        """Bytes of these files that are not here."""
        place = self.place(repo)
        left = 0
        for name, size in sizes.items():
            blob = place / "blobs" / etags.get(name, "-")
            if bytes_of(place / "snapshots" / repo.revision / name) != size and bytes_of(blob) != size:
                left += max(0, size - bytes_of(blob.with_name(f"{blob.name}.incomplete")))
        return left

    def free(self) -> int:
        """Bytes of the disk that a download may take; some stay free."""
        disk = next(each for each in (self.folder, *self.folder.absolute().parents) if each.exists())
        return shutil.disk_usage(disk).free - RESERVE

    def link(self, repo: Repo, name: str, etag: str) -> None:
        """Let a content that is here be a file of the snapshot."""
        path = self.place(repo) / "snapshots" / repo.revision / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("../..", "blobs", etag))
        temporary.replace(path)

    def remembered(self, repo: Repo) -> str:
        """The commit of a branch or tag when it was last asked for, or nothing."""
        try:
            text = (self.place(repo) / "refs" / (repo.revision or "main")).read_text().strip()
        except OSError:
            return ""
        return text if COMMIT.fullmatch(text) else ""

    def remember(self, repo: Repo, commit: str) -> None:
        """Note a branch's commit, as huggingface_hub does."""
        path = self.place(repo) / "refs" / (repo.revision or "main")
        if self.remembered(repo) == commit:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        temporary.write_text(commit)
        temporary.replace(path)

    def recents(self) -> list[str]:
        """The repos of which a complete snapshot is here, the latest first."""
        found = []
        for snapshot in self.folder.glob("models--*/snapshots/*"):
            name = _name(snapshot.parents[1])
            if self.find(Repo(name, snapshot.name)) is not None:
                found.append((snapshot.stat().st_mtime, name))
        return list(dict.fromkeys(name for _, name in sorted(found, reverse=True)))

    def discard(self, repo: Repo) -> None:
        """Give back the disk of a snapshot that is not complete: what no other snapshot of the repo uses."""
        if repo.pinned and self.find(repo) is None:
            self._remove(repo)

    def use(self, folder: Path) -> None:
        """Note that a snapshot is used now, where the folder is one."""
        if self.name_of(folder):
            with suppress(OSError):
                os.utime(folder)

    def name_of(self, folder: Path) -> str:
        """The repo whose snapshot a folder is, or nothing."""
        return _name(folder.parents[1]) if self.folder in folder.parents[2:3] else ""

    def evict(self, before: float, spared: Collection[str]) -> list[str]:
        """Give back the disk of snapshots last used before a moment (seconds since the epoch); the repos' names.

        spared: names of repos that stay.
        """
        return [self._remove(repo) for used, repo in self._by_use() if used < before and repo.name not in spared]

    def unused(self, spared: Collection[str]) -> list[Unused]:
        """The snapshots of all repos but those of these names."""
        return [
            Unused(used, repo.name, self.place(repo), partial(self._remove, repo))
            for used, repo in self._by_use()
            if repo.name not in spared
        ]

    def _by_use(self) -> list[tuple[float, Repo]]:
        """All snapshots and when they were last used, longest ago first; also those of which little has come."""
        found: dict[Repo, float] = {}
        for path in (*self.folder.glob("models--*/snapshots/*"), *self.folder.glob("models--*/wanted/*.json")):
            repo = Repo(_name(path.parents[1]), path.name.removesuffix(".json"))
            with suppress(OSError):  # a run that is cancelled takes its own away
                if repo.pinned:
                    found[repo] = max(found.get(repo, 0.0), path.stat().st_mtime)
        return sorted(((used, repo) for repo, used in found.items()), key=lambda each: each[0])

    def _remove(self, repo: Repo) -> str:
        place = self.place(repo)
        shutil.rmtree(place / "snapshots" / repo.revision, ignore_errors=True)
        used = {link.resolve().name for link in place.glob("snapshots/*/*")}
        for blob in place.glob("blobs/*"):
            if blob.name not in used:
                blob.unlink(missing_ok=True)
        (place / "wanted" / f"{repo.revision}.json").unlink(missing_ok=True)
        if not any(place.glob("snapshots/*")):
            shutil.rmtree(place, ignore_errors=True)
        return repo.name

    def _wanted(self, repo: Repo) -> dict[str, int] | None:
        files = self._note(repo).get("files")
        if isinstance(files, dict) and all(isinstance(size, int) for size in files.values()):
            return files
        return None

    def _note(self, repo: Repo) -> dict[str, object]:
        with suppress(OSError, ValueError):
            body = json.loads((self.place(repo) / "wanted" / f"{repo.revision}.json").read_text())
            return body if isinstance(body, dict) else {}
        return {}


def _name(place: Path) -> str:
    """The repo of a folder in the cache."""
    return place.name.removeprefix("models--").replace("--", "/")


def bytes_of(path: Path) -> int:
    """The size of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
