"""Files to take away, made when asked for: of one run, its model, and of a comparison. Only the visitor's own.

Every address is judged like any other input; what somebody may not see is answered like what does not exist.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from engine import bundle, exporting
from engine.card import CARD
from engine.errors import InputError, MaquetteError, UnknownName
from ui import dossier, report
from ui.asked import read_link
from ui.desk import Desk, Entry
from ui.edge import COOKIE, NAME, line
from ui.wording import say

ZIP = ".zip"
MODEL = "model"  # as the run saved it; all other zips are called after their formats


class Downloads:
    """The routes of all files."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> list[Route]:
        """What the server answers beside the page itself."""
        return [Route("/runs/{run}/{name}", self.of_run), Route("/compare/{name}", self.of_comparison)]

    def of_run(self, request: Request) -> Response:
        """`recipe.yaml`, `measurements.csv`, `report.md`, the model card, or the model as a zip, of any format."""
        owner, name = visitor(request), request.path_params["name"]
        if not owner:
            return nothing()
        try:
            entry = self._desk.entry(request.path_params["run"], owner)
        except MaquetteError:
            return nothing()
        baseline = self._desk.baseline(entry.run.recipe, owner)
        try:
            if name.endswith(ZIP):
                return self._model(entry, baseline, name.removesuffix(ZIP))
            if name == CARD:
                return attachment(
                    report.card(entry, baseline), "text/markdown; charset=utf-8", f"{entry.run.id}-{name}"
                )
        except MaquetteError as error:
            return PlainTextResponse(line(error), status_code=409)
        if name not in report.WRITERS:
            return nothing()
        make, kind = report.WRITERS[name]
        return attachment(make(entry, baseline), kind, f"{entry.run.id}-{name}")

    def of_comparison(self, request: Request) -> Response:
        """`report.html`, `comparison.csv` or `comparison.json` of what the query names."""
        owner, name = visitor(request), request.path_params["name"]
        if name not in dossier.WRITERS or not owner:
            return nothing()
        make, kind = dossier.WRITERS[name]
        try:
            return attachment(make(self._desk, owner, read_link(dict(request.query_params))), kind, name)
        except UnknownName:
            return nothing()
        except InputError as error:
            return PlainTextResponse(line(error), status_code=400)

    def _model(self, entry: Entry, baseline: Entry | None, name: str) -> Response:
        """The artifact or an export of it, with its card, sent as it is read.

        The numbers were measured of the artifact, so they stand in its card alone.

        Raises:
            MaquetteError: it is not there, or not whole.
        """
        folder = report.folder(entry)
        if name == MODEL:
            files, name = bundle.contents(folder, report.card(entry, baseline)), f"maquette-{entry.run.id}"
        elif name in exporting.made(folder):
            folder = exporting.place(folder, name)
            files, name = bundle.contents(folder, (folder / CARD).read_text()), f"maquette-{entry.run.id}-{name}"
        else:
            return nothing()
        headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
        return StreamingResponse(bundle.zipped(files, name), media_type="application/zip", headers=headers)


def visitor(request: Request) -> str:
    """The visitor by the cookie; empty where there is none, for a file needs a browser that came to the page first."""
    owner = request.cookies.get(COOKIE, "")
    return owner if NAME.fullmatch(owner) else ""


def nothing() -> Response:
    """The answer for what does not exist and for what is somebody else's."""
    return PlainTextResponse(say("door.closed"), status_code=404)


def attachment(text: str, kind: str, name: str) -> Response:
    """A file with its name; a browser saves it and does not open it as a page of this server."""
    headers = {"Content-Disposition": f'attachment; filename="maquette-{name}"'}
    return Response(text, media_type=kind, headers=headers)
