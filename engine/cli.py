"""The command line: the same engine as the page's.

    python -m engine run RECIPE.yaml [--model owner/name@revision] [--home DIR] [--measure a,b] [--json]
    python -m engine run --resume RUN [--learning-rate-factor 0.1]     after a divergence; 0 ends the training there
    python -m engine measure MODEL [--measure a,b] [--baseline MODEL] [--json]
    python -m engine export ARTIFACT|RUN --format gguf|gptq|gptq_v2|awq|dense --to FOLDER [--json]
    python -m engine advise MODEL --goal memory=8GB|latency=0.5|cost [--assume NAME=NUMBER] [--json]
    python -m engine preset [NAME] [--model MODEL]     a recipe to begin with, as YAML; without a name, which there are
    python -m engine methods | runs | compare RUN RUN | doctor [--json]
    python -m engine user add|remove NAME | user list     who may log in to a team server; the password comes from stdin

Where a model is asked for, the id of a run means the model that it made.
Results go to stdout, progress and errors to stderr. With --json the last line of stdout is one JSON object.
Exit codes: 0 done, 1 failed, 2 refused with one line that says why, 130 interrupted.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import shlex
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol, Self

import psutil
from pydantic import JsonValue, ValidationError

from engine import advising, attempts, doctor, export, fields, figures, headers, methods, places, rescue
from engine.assumptions import Assumptions
from engine.errors import BadModel, BadRecipe, InputError, MaquetteError, UnknownName, short
from engine.hub import Hub
from engine.presets import PRESETS, preset
from engine.recipes import choose_measures, dump_recipe, load_recipe
from engine.records import MEASURES, USUAL_MEASURES, Event, EventKind, Measurement, Model, Recipe, Run, Status
from engine.sources import WAYS
from engine.store import Store, home
from engine.users import UserFile

Json = dict[str, JsonValue]
EXIT = {Status.SUCCEEDED: 0, Status.REFUSED: 2, Status.INTERRUPTED: 130, Status.CANCELLED: 130}
MODELS = "demo, owner/name[@revision] of the hub, a folder, or a run"
RUN_ID = re.compile(r"[0-9a-f]{8}")
FOLLOW = 0.2  # seconds between looks at a run


class Supervisor(Protocol):
    """What `run` needs of a scheduler."""

    store: Store

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None: ...

    def submit(self, recipe: Recipe, owner: str = "", token: str = "") -> Run: ...

    def resume(
        self, run_id: str, owner: str | None = "", token: str = "", factor: float | None = None
    ) -> Run: ...  # fmt: skip


def main(arguments: Sequence[str], supervisor: Callable[[Path], Supervisor]) -> int:
    """Run one command and return the exit code. `supervisor` opens the scheduler of a data folder."""
    wants_json = "--json" in arguments
    try:
        options = _parser().parse_args(arguments)
        code: int = options.command(options, supervisor)
        sys.stdout.flush()
        return code
    except MaquetteError as error:
        refused = isinstance(error, InputError)
        sys.stderr.write(f"{error}\n")
        if wants_json:
            _json({**_no_result("refused" if refused else "failed"), "reason": str(error)})
        return 2 if refused else 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    except BrokenPipeError:  # who read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python says so when it ends
        return 141


def run(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`run`: execute a recipe to its end."""
    if (options.recipe is None) == (options.resume is None):
        raise InputError("Give either a recipe file or --resume RUN.")
    if options.resume is not None and (options.model is not None or options.measure is not None):
        raise InputError("A run is resumed as it was begun: --model and --measure go with a recipe file.")
    if options.resume is None and options.learning_rate_factor is not None:
        raise InputError("--learning-rate-factor goes with --resume RUN; a recipe has the setting learning_rate.")
    recipe = None if options.recipe is None else read_recipe(Path(options.recipe), options.measure)
    if recipe is not None and options.model is not None:
        recipe = recipe.model_copy(update={"model": _model(options, options.model, recipe.model.dtype)})
    token = sys.stdin.readline().strip() if options.token_stdin else ""
    folder = _home(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: interrupted, can be resumed
    run_id: str | None = None
    try:
        with supervisor(folder) as scheduler:
            told = 0
            if recipe is not None:
                run_id = scheduler.submit(recipe, token=token).id
            else:
                told = max((event.number for event in scheduler.store.events(options.resume)), default=0)
                factor = options.learning_rate_factor
                run_id = scheduler.resume(options.resume, owner=None, token=token, factor=factor).id
            _follow(scheduler.store, run_id, told)
    except KeyboardInterrupt:
        if run_id is None:
            raise
    store = Store(folder / "maquette.db", read_only=True)
    ended = store.run(run_id)
    again = f"python -m engine run --resume {run_id}{f' --home {shlex.quote(options.home)}' if options.home else ''}"
    if ended.status is Status.INTERRUPTED:
        sys.stderr.write(f"Interrupted. Go on with: {again}\n")
    elif ended.reason:
        sys.stderr.write(f"{ended.reason}\n")
        if rescue.left(ended, store.divergences(run_id)) is not None:
            sys.stderr.write(f"Go on from there at a lower rate (0: end there): {again} --learning-rate-factor 0.1\n")
    measurements = list(store.measurements(run_id).values())
    if options.json:
        _json(_result(ended, measurements))
    else:
        _line(f"{ended.id}  {ended.status}  {ended.recipe.title()}  {_artifact(ended) or ''}".rstrip())
        _measured(measurements)
    return EXIT.get(ended.status, 1)


def measure(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`measure`: measure any model that is on this machine, in this process."""
    hub = Hub(_home(options) / "cache" / "hub", offline=True)
    folder = places.locate(_model(options, options.folder), hub)
    baseline = None if options.baseline is None else places.locate(_model(options, options.baseline), hub)
    asked = _measures(options.measure) or ()
    measures = asked or USUAL_MEASURES
    if "divergence" in asked and baseline is None:
        raise InputError("Divergence is that of two models: name the original with --baseline.")
    headers.inspect(folder)
    from engine import pipeline  # only now: it takes seconds to import

    found: dict[str, Measurement] = {}

    def emit(kind: EventKind, data: Json) -> None:
        if kind == "measurement":
            measurement = Measurement.model_validate(data)
            found[measurement.name] = measurement
        else:
            _progress(kind, data)

    pipeline.measure_folder(folder, measures, baseline, emit, lambda: None, options.device)
    if options.json:
        _json({**_no_result("succeeded"), "artifact": str(folder), "measurements": _values([*found.values()])})
    else:
        _measured([*found.values()])
    return 0


def export_artifact(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`export`: write an artifact in a format that other programs read."""
    source = places.resolve(_made(options, options.artifact))
    target = Path(options.to).expanduser().absolute()
    export.exporter(options.format)(source, target)
    size = sum(file.stat().st_size for file in target.iterdir())
    notes = export.notes(target)
    if options.json:
        said = {"status": "succeeded", "format": options.format, "folder": str(target), "bytes": size}
        _json({**said, "notes": list[JsonValue](notes)})
    else:
        _line(f"{target}  {options.format}  {size:,} bytes")
        for note in notes:
            _line(note)
    return 0


def advise(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`advise`: what to do with a model for a goal, the mildest first."""
    found = advising.answer(
        _model(options, options.model), options.goal, options.assume, _home(options) / "maquette.db",
        Hub(_home(options) / "cache" / "hub"),
    )  # fmt: skip
    if options.json:
        _json(advising.as_json(found))
    else:
        _table(advising.rows(found))
        _line(advising.MARKS)
    return 0


def show_preset(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`preset`: a recipe by name, as YAML to run or to change; without a name, all of them."""
    names = list(PRESETS) if options.name is None else [options.name]
    model = _model(options, options.model)
    found = {name: Recipe.model_validate({"model": model, "steps": preset(name)}) for name in names}
    if options.json:
        _json({"presets": {name: dump_recipe(recipe) for name, recipe in found.items()}})
    elif options.name is None:
        _table([[name, recipe.title()] for name, recipe in found.items()])
    else:
        sys.stdout.write(dump_recipe(found[options.name]))
    return 0


def list_methods(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`methods`: what can be done to a model, with every setting."""
    found = methods.methods().values()
    if options.json:
        body: list[JsonValue] = [
            {
                "name": method.name, "title": method.title, "summary": method.summary,
                "changes": [*method.changes], "settings": method.params.model_json_schema()["properties"],
            }
            for method in found
        ]  # fmt: skip
        _json({"methods": body})
        return 0
    for method in found:
        _line(f"{method.name}: {method.summary}")
        rows = []
        for key, info in method.params.model_fields.items():
            low, high = fields.bounds(info)
            span = "" if low is None and high is None else f"{_number(low)} to {_number(high)}"
            rows.append(["", key, str(info.default), span, info.description or ""])
        _table(rows)
    return 0


def list_runs(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`runs`: the newest runs."""
    path = _home(options) / "maquette.db"
    stored = Store(path, read_only=True).runs() if path.exists() else []
    runs = [_as_it_is(path.parent, run) for run in stored]
    if options.json:
        _json({"runs": [_described(run) for run in runs]})
    else:
        day = "%Y-%m-%d %H:%M"
        _table([[r.id, r.status, time.strftime(day, time.localtime(r.created)), r.recipe.title()] for r in runs])
    return 0


def _as_it_is(home: Path, run: Run) -> Run:
    """A run with the status that it has: one whose processes were all killed says `running` until the next start."""
    folder = attempts.attempt_folder(home, run.id, run.attempt)
    pid = attempts.read_pid(folder)
    if run.status is not Status.RUNNING or pid is None or psutil.pid_exists(pid):
        return run
    said = [event.data for event in attempts.EventReader(folder).read() if event.kind == "finished"]
    noted = attempts.read_ending(folder)
    said += [] if noted is None else [noted.data]
    return run.model_copy(update={"status": Status(str(said[0]["status"])) if said else Status.INTERRUPTED})


def compare(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`compare`: two runs, every measurement of either."""
    store = Store(_home(options) / "maquette.db", read_only=True)
    runs = [store.run(name) for name in (options.run, options.other)]
    found = [store.measurements(run.id) for run in runs]
    pairs = [
        (name, [each.get(name) for each in found]) for name in dict.fromkeys(name for each in found for name in each)
    ]
    if options.json:
        _json({"runs": [_described(run) for run in runs], "measurements": [_compared(*pair) for pair in pairs]})
        return 0
    rows = [["", *(f"{run.id} {run.recipe.title()}" for run in runs), "difference"]]
    for name, (one, two) in pairs:
        change = figures.difference(one, two) if one and two else "–"
        rows.append([name, *(figures.shown(m) if m else "–" for m in (one, two)), change])
    _table(rows)
    _line(figures.INTERVAL)
    return 0


def _compared(name: str, pair: Sequence[Measurement | None]) -> JsonValue:
    """A measurement of two runs; null where a run has not taken it."""
    one, two = pair
    unit = next(m.unit for m in pair if m)
    values: list[JsonValue] = [m.value if m else None for m in pair]
    errors: list[JsonValue] = [m.error if m else None for m in pair]
    return {
        "name": name, "unit": unit, "values": values, "errors": errors,
        "difference": two.value - one.value if one and two else None,
        "ratio": two.value / one.value if one and two and one.value else None,
    }  # fmt: skip


def show_doctor(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`doctor`: what this machine and installation offer."""
    findings = doctor.examine(Path(options.home).expanduser() if options.home else None)
    if options.json:
        _json({finding.name: finding.value for finding in findings})
    else:
        _table([["ok" if finding.good else "!!", finding.name, finding.value] for finding in findings])
    return 0 if all(finding.good for finding in findings) else 1


def user(options: argparse.Namespace, supervisor: Callable[[Path], Supervisor]) -> int:
    """`user`: who may log in to a team server."""
    users = UserFile(_home(options))
    if (options.name is None) != (options.do == "list"):
        raise InputError("Give a name to add or remove, and none to list.")
    if options.do == "add":
        users.add(options.name, _password())
    elif options.do == "remove":
        users.remove(options.name)
    if options.json:
        _json({"status": "succeeded", "users": [*users.names()]})
    elif options.do == "list":
        _table([[name] for name in users.names()])
    return 0


def _password() -> str:
    """A password, typed twice and not shown, or a line of stdin."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    first = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != first:
        raise InputError("The two passwords differ. Try again.")
    return first


def read_recipe(file: Path, measures: str | None = None) -> Recipe:
    """The recipe in a YAML file, with other measurements where `measures` (`a,b`) names them.

    Raises:
        InputError: no such file, or it cannot be understood; one line.
    """
    try:
        recipe = load_recipe(file.read_text())
    except FileNotFoundError:
        raise BadRecipe(f"There is no recipe file {short(file)!r}.") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not text"
        raise BadRecipe(f"The recipe file {short(file)!r} cannot be read: {what}.") from None
    chosen = _measures(measures)
    return recipe if chosen is None else recipe.model_copy(update={"measure": chosen})


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}. See python -m engine --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m engine", description="Compress language models and measure what it cost.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., int], *, with_home: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=(command.__doc__ or "").split(": ", 1)[1].strip())
        added.set_defaults(command=command)
        added.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
        if with_home:
            added.add_argument("--home", help="data folder (default: $MAQUETTE_HOME, /data, the user's cache)")
        return added

    runner = add("run", run)
    runner.add_argument("recipe", nargs="?", metavar="RECIPE.yaml")
    runner.add_argument("--resume", metavar="RUN", help="go on with an interrupted or failed run")
    runner.add_argument(
        "--learning-rate-factor", type=float, metavar="FACTOR",
        help="with --resume, after a training that diverged: go on from its last good checkpoint at so many times its "
        "learning rate; 0: end the training there and save, verify and measure what it is",
    )  # fmt: skip
    runner.add_argument("--model", help=f"instead of the recipe's: {MODELS}")
    runner.add_argument(
        "--token-stdin", action="store_true", help="read the hub's token for a gated model from the first line of stdin"
    )
    runner.add_argument("--measure", help=f"instead of the recipe's: {','.join(MEASURES)}")
    meter = add("measure", measure)
    meter.add_argument("folder", metavar="MODEL", help="demo, a folder, a run, or a downloaded owner/name of the hub")
    meter.add_argument("--measure", help=f"of {','.join(MEASURES)}; default: all but sensitivity")
    meter.add_argument("--baseline", help="the original model, for kl, top1_agreement and flips")
    meter.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    exporter = add("export", export_artifact)
    exporter.add_argument("artifact", metavar="ARTIFACT", help="a run, or the folder that it saved")
    exporter.add_argument("--format", required=True, help=", ".join(export.formats()))
    exporter.add_argument("--to", required=True, metavar="FOLDER", help="a folder that is not there yet")
    counsel = add("advise", advise)
    counsel.add_argument("model", metavar="MODEL", help=MODELS)
    counsel.add_argument("--goal", required=True, help="memory=8GB, latency=0.5 (half), cost, or cost=0.3 (USD)")
    counsel.add_argument(
        "--assume", action="append", default=[], metavar="NAME=NUMBER",
        help=f"e.g. teacher_price=3; of {', '.join(Assumptions.model_fields)}",
    )  # fmt: skip
    beginner = add("preset", show_preset)
    beginner.add_argument("name", nargs="?", metavar="NAME", help=", ".join(PRESETS))
    beginner.add_argument("--model", default="demo", help=MODELS)
    add("methods", list_methods, with_home=False)
    add("runs", list_runs)
    comparer = add("compare", compare)
    comparer.add_argument("run", metavar="RUN")
    comparer.add_argument("other", metavar="RUN")
    add("doctor", show_doctor)
    people = add("user", user)
    people.add_argument("do", choices=["add", "remove", "list"])
    people.add_argument("name", nargs="?", metavar="NAME")
    return parser


def _home(options: argparse.Namespace) -> Path:
    return Path(options.home).expanduser().absolute() if options.home else home()


def _made(options: argparse.Namespace, text: str) -> str:
    """The folder of the model that a run made, where a text is the id of one; else the text."""
    if not RUN_ID.fullmatch(text) or Path(text).is_dir():
        return text
    path = _home(options) / "maquette.db"
    if not path.exists():
        return text
    try:
        run = Store(path, read_only=True).run(text)
    except UnknownName:  # a model of the hub may be called so
        return text
    folder = _artifact(run)
    if folder is None:
        why = "its files were deleted" if run.status is Status.SUCCEEDED else f"it is {run.status}"
        raise InputError(f"Run {run.id} has no model: {why}. Name another of `python -m engine runs`, or a folder.")
    return folder


def _model(options: argparse.Namespace, text: str, dtype: str = "bfloat16") -> Model:
    text = _made(options, text)
    try:
        return Model.model_validate({"source": text, "dtype": dtype})
    except ValidationError as error:
        raise BadModel(f"{short(repr(text))} is no model: {error.errors()[0]['msg']}. {WAYS}") from None


def _measures(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else choose_measures(name.strip() for name in text.split(",") if name.strip())


def _follow(store: Store, run_id: str, after: int) -> None:
    """Show a run's progress beyond the event `after` until it ends."""
    while True:
        ended = store.run(run_id).status.final  # before the events, so that the last of them are shown
        for event in store.events(run_id, after, kinds=("phase", "progress", "log")):
            after = event.number
            _progress_of(event)
        if ended:
            return
        time.sleep(FOLLOW)


def _progress_of(event: Event) -> None:
    _progress(event.kind, event.data)


def _progress(kind: EventKind, data: Json) -> None:
    if kind == "phase":
        sys.stderr.write(f"{data['name']}\n")
    elif kind == "progress":
        sys.stderr.write(f"  {data['done']} of {data['total']} {data['unit']}\n")
    elif kind == "log":
        sys.stderr.write(f"  {data['text']}\n")


def _no_result(status: str) -> Json:
    return {"id": None, "status": status, "reason": "", "artifact": None, "measurements": []}


def _result(run: Run, measurements: Sequence[Measurement]) -> Json:
    return {
        "id": run.id, "status": str(run.status), "reason": run.reason, "artifact": _artifact(run),
        "measurements": _values(measurements),
    }  # fmt: skip


def _artifact(run: Run) -> str | None:
    """The model that a run made; of one that did not succeed nobody has checked it."""
    return run.artifact if run.status is Status.SUCCEEDED else None


def _described(run: Run) -> Json:
    return {
        "id": run.id, "title": run.recipe.title(), "status": str(run.status), "reason": run.reason,
        "attempt": run.attempt, "created": run.created, "artifact": _artifact(run),
    }  # fmt: skip


def _values(measurements: Sequence[Measurement]) -> list[JsonValue]:
    return [{"name": m.name, "value": m.value, "error": m.error, "unit": m.unit} for m in measurements]


def _measured(measurements: Sequence[Measurement]) -> None:
    """Measurements as a table, and what ± says where one of them has it."""
    _table([[m.name, figures.shown(m)] for m in measurements])
    if any(m.error for m in measurements):
        _line(figures.INTERVAL)


def _number(value: float | None) -> str:
    return "…" if value is None else f"{value:g}"


def _table(rows: Sequence[Sequence[str]]) -> None:
    """Rows in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _json(body: Json) -> None:
    _line(json.dumps(body))


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
