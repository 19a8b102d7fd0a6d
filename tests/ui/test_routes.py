"""Routes x roles over all routes of the running app and all functions of the page, in each mode.

A route that is new, Gradio's or ours, fails until it stands in the table below: think about who may use it first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import httpx
import pytest

from engine import rescue
from engine.modes import Mode
from engine.records import Run, Status
from tests.ui import fakes
from tests.ui.hosts import CANARY, NAMED, PASSWORD, Host, host
from ui import report, wording
from ui.server import takes_files
from ui.visitors import COOKIE, SESSION

# What a handler tells a visitor goes through the queue; a direct call has none, and Gradio warns instead.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CLOSED = (404, 404, 404)
EVERYBODY = (200, 200, 200)
GATED = (200, 200, 401)
# What one gets who is a visitor but not the run's owner · nobody on a public page · nobody on a team server.
ROUTES: dict[str, tuple[int, int, int]] = {
    "GET /healthz": EVERYBODY, "HEAD /healthz": EVERYBODY,
    "GET /runs/{run}/{name}": (404, 404, 401), "HEAD /runs/{run}/{name}": (404, 404, 401),
    "GET /compare/{name}": (404, 404, 401), "HEAD /compare/{name}": (404, 404, 401),
    "GET /login": (303, 404, 200), "HEAD /login": (303, 404, 200), "POST /login": (403, 404, 403),
    "POST /logout": (303, 404, 401),
    "GET /": (200, 200, 303), "HEAD /": (200, 200, 303),
    "GET /config": GATED, "GET /config/": GATED, "GET /gradio_api/info": GATED, "GET /gradio_api/info/": GATED,
    "GET /svelte/{path:path}": (404, 404, 401), "GET /static/{path:path}": GATED, "GET /assets/{path:path}": GATED,
    "GET /favicon.ico": EVERYBODY, "GET /robots.txt": EVERYBODY, "GET /theme.css": GATED,
    "GET /gradio_api/theme.css": GATED, "GET /gradio_api/startup-events": EVERYBODY,
    "GET /gradio_api/heartbeat/{session_hash}": GATED, "GET /gradio_api/queue/data": (422, 422, 401),
    "POST /gradio_api/queue/join": (422, 422, 401), "POST /gradio_api/run/{api_name}": (422, 422, 401),
    "POST /gradio_api/run/{api_name}/": (422, 422, 401),
    **dict.fromkeys(
        (
            "GET /manifest.json", "GET /pwa_icon", "GET /pwa_icon/{size}",
            "POST /login/", "GET /logout", "GET /gradio_api/deep_link", "GET /monitoring", "GET /monitoring/summary",
            "GET /monitoring/{key}", "GET /gradio_api/user", "GET /gradio_api/user/", "GET /gradio_api/login_check",
            "GET /gradio_api/login_check/", "GET /gradio_api/token", "GET /gradio_api/token/",
            "GET /gradio_api/app_id", "GET /gradio_api/app_id/", "GET /gradio_api/dev/reload", "GET /gradio_api/runs",
            "GET /gradio_api/runs/", "GET /gradio_api/openapi.json",
            "GET /gradio_api/custom_component/{id}/{environment}/{type}/{file_name}",
            "GET /gradio_api/proxy={url_path:path}", "HEAD /gradio_api/proxy={url_path:path}",
            "GET /gradio_api/file={path_or_url:path}", "HEAD /gradio_api/file={path_or_url:path}",
            "GET /gradio_api/file/{path:path}", "POST /gradio_api/stream/{event_id}",
            "POST /gradio_api/stream/{event_id}/close",
            "GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8",
            "GET /gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}",
            "GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file", "POST /gradio_api/reset",
            "POST /gradio_api/reset/", "POST /gradio_api/api/{api_name}", "POST /gradio_api/api/{api_name}/",
            "POST /gradio_api/call/{api_name}", "POST /gradio_api/call/{api_name}/",
            "POST /gradio_api/call/v2/{api_name}", "POST /gradio_api/call/v2/{api_name}/",
            "GET /gradio_api/call/{api_name}/{event_id}", "GET /gradio_api/call/v2/{api_name}/{event_id}",
            "POST /gradio_api/cancel", "POST /gradio_api/component_server", "POST /gradio_api/component_server/",
            "GET /gradio_api/queue/status", "GET /gradio_api/upload_progress", "POST /gradio_api/upload",
            "POST /gradio_api/process_recording", "POST /gradio_api/vibe-edit", "POST /gradio_api/vibe-edit/",
            "POST /gradio_api/undo-vibe-edit", "POST /gradio_api/undo-vibe-edit/", "GET /gradio_api/vibe-code",
            "GET /gradio_api/vibe-code/", "POST /gradio_api/vibe-code", "POST /gradio_api/vibe-code/",
            "POST /gradio_api/vibe-starter-queries", "POST /gradio_api/vibe-starter-queries/",
        ),
        CLOSED,
    ),
}  # fmt: skip
FILLED = {
    "name": "recipe.yaml", "path:path": "img/undo-solid.svg", "size": "64", "session_hash": "s0", "api_name": "look",
    "url_path:path": "http://127.0.0.1/", "path_or_url:path": "/etc/passwd",
}  # fmt: skip


@pytest.fixture(scope="module", params=[Mode.PUBLIC, Mode.TEAM, Mode.LOCAL])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host(request.param, tmp_path_factory.mktemp(f"home-{request.param}")) as made:
        yield made


def ask(client: httpx.Client, method: str, path: str) -> httpx.Response:
    """The head of an answer; streams are not waited for."""
    with client.stream(method, path) as answer:
        assert answer.headers["x-content-type-options"] == "nosniff", path
        assert "default-src 'self'" in answer.headers["content-security-policy"], path
        assert not [name for name in answer.headers if name.startswith("access-control")], path
        return answer


def filled(path: str, run: str) -> str:
    for name, value in {**FILLED, "run": run}.items():
        path = path.replace(f"{{{name}}}", value)
    if "/assets/" in path:
        import gradio

        built = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
        path = f"/assets/{next(file.name for file in sorted(built.iterdir()) if file.suffix == '.js')}"
    return path


def test_every_route_is_open_or_closed_to_each_role_as_the_table_says(running: Host) -> None:
    anna, ben, nobody = running.enter("anna"), running.enter("ben"), running.nobody()
    run = running.run_of(running.owner("anna", anna)).id
    found = {}
    for method, path in running.routes():
        key = f"{method} {path}"
        assert key in ROUTES, f"{key} is a new route: who may use it?"
        nobody.cookies.clear()
        asked = filled(path, run)
        expected = ROUTES[key]
        if "upload" in path and takes_files(running.page):
            expected = (400, 400, 401) if method == "POST" else (422, 422, 401)
        if running.mode is not Mode.TEAM and path in ("/login", "/logout"):
            expected = CLOSED
        # Logging in and out has tests of its own; here the ways in are tried once, not so often that they close.
        found[key] = (
            expected[0] if path == "/logout" else ask(ben, method, asked.replace("/s0", "/s1")).status_code,
            ask(nobody, method, asked).status_code,
        )
        want = (expected[0], expected[2 if running.mode is Mode.TEAM else 1])
        assert found[key] == want, key
    assert anna.get(f"/runs/{run}/recipe.yaml").status_code == 200
    assert CANARY in anna.get(f"/runs/{run}/recipe.yaml").text


def test_the_api_is_not_described(running: Host) -> None:
    ben = running.enter("ben")
    described = ben.get("/gradio_api/info").json()
    assert described == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for path in ("/docs", "/redoc", "/openapi.json", "/gradio_api/mcp/sse", "/gradio_api/mcp", "/mcp"):
        assert ask(ben, "GET", path).status_code == 404


@pytest.mark.parametrize(
    "path", ["//etc/passwd", "/runs/../../etc/passwd", "/assets/..%2f..%2fsecret", "/gradio_api//queue/join", "/%00"]
)
def test_odd_paths_lead_nowhere(running: Host, path: str) -> None:
    ben = running.enter("ben")
    assert ask(ben, "GET", path).status_code in (403, 404)


def test_other_methods_are_closed(running: Host) -> None:
    ben = running.enter("ben")
    for method in ("OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"):
        assert ask(ben, method, "/").status_code == 404
    preflight = ben.options("/config", headers={"Origin": "https://evil.org", "Access-Control-Request-Method": "GET"})
    assert preflight.status_code == 404


# Every function of the page, by its number and its name, directly and through the queue


# Those that show the owner what is the owner's, asked as below; a new one is new here, too. The others change it,
# or show what a visitor has chosen before.
SHOW = {
    "choose_4", "compare_it", "fill", "follow_1", "list_results", "offer_1", "open_runs", "redraw", "resize", "select",
    "share", "show", "show_1", "tick_1", "tick_2", "tick_3",
}  # fmt: skip
CHANGE = {"handler", "handler_1", "handler_2", "rescued", "rescued_1", "toggle"}  # cancel, resume, delete, go on, share


def functions(running: Host, run: str) -> Iterator[tuple[int, str, list[list[object]]]]:
    """Each function by number and name, and what it is asked with.

    First what suits its inputs, with a run wherever one can be named; then what the page itself would send; then that
    run for every input.
    """
    components = {each["id"]: each for each in running.page.config["components"]}

    def suits(number: int, named: bool) -> object:
        kind, own = components[number]["type"], components[number]["props"]
        if kind not in ("dropdown", "textbox") or not named:
            return own.get("value")
        return [run] if own.get("multiselect") else run

    for each in running.page.config["dependencies"]:
        inputs = each["inputs"]
        data = [[suits(number, named) for number in inputs] for named in (True, False)]
        yield each["id"], str(each["api_name"]), [*data, [run] * len(inputs)]


@pytest.fixture
def any_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run be named that a picker does not offer, or a format: Gradio refuses it, but a handler must by itself."""
    for picker in (gr.Dropdown, gr.Radio):
        monkeypatch.setattr(picker, "preprocess", lambda self, value: value)


def body(session: str, index: int, data: list[object], run: str) -> dict[str, object]:
    return {"fn_index": index, "session_hash": session, "data": data, "event_data": {"run": run}, "trigger_id": None}


def through_the_queue(client: httpx.Client, session: str, bodies: list[dict[str, object]]) -> str:
    """What came back for all of them."""
    waiting = {
        client.post("/gradio_api/queue/join", json=each).raise_for_status().json()["event_id"] for each in bodies
    }
    heard = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
        assert answer.headers["x-content-type-options"] == "nosniff"
        for line in answer.iter_lines():
            heard.append(line)
            if '"process_completed"' in line:
                waiting.discard(json.loads(line.removeprefix("data: ")).get("event_id"))
            if not waiting:
                break
    return "\n".join(heard)


@pytest.mark.usefixtures("any_choice")
def test_no_function_shows_or_changes_what_is_anothers(running: Host) -> None:
    anna, ben, nobody = running.enter("anna"), running.enter("ben"), running.nobody()
    run = running.run_of(running.owner("anna", anna))
    heard, queued, outside = {}, [], []
    for index, name, data in functions(running, run.id):
        for number, values in enumerate(data):
            asked = body("ben0", index, values, run.id)
            answer = ben.post("/gradio_api/run/predict", json=asked)
            assert answer.status_code in (200, 500), name
            heard[name, number] = answer.text
            if number < 2:
                queued.append({**asked, "session_hash": "ben1"})
        named = body("ben0", index, data[0], run.id)
        del named["fn_index"]
        heard[name, "by name"] = ben.post(f"/gradio_api/run/{name}", json=named).text
        outside.append(body("nobody1", index, data[0], run.id))
        answer = nobody.post("/gradio_api/run/predict", json={**outside[-1], "session_hash": "nobody0"})
        heard[name, "by nobody"] = answer.text
        if running.mode is Mode.TEAM:
            assert answer.status_code == nobody.post("/gradio_api/queue/join", json=outside[-1]).status_code == 401
    heard["queue", "by ben"] = through_the_queue(ben, "ben1", queued)
    if running.mode is not Mode.TEAM:
        heard["queue", "by nobody"] = through_the_queue(nobody, "nobody1", outside)
    heard["link", ""] = ben.get(f"/?compare={run.id},{run.id}").text
    assert [what for what, text in heard.items() if CANARY in text or NAMED in text] == []
    after = running.scheduler.store.run(run.id)
    assert after == run
    assert all(vote.owner == running.owner("ben", ben) for vote in running.scheduler.store.votes())


@pytest.mark.usefixtures("any_choice")
def test_the_owner_sees_it_by_the_same_way(running: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack above is a real one: with the owner's cookie it succeeds, for each function that shows a run."""
    anna = running.enter("anna")
    run = running.run_of(running.owner("anna", anna)).id
    monkeypatch.setattr("ui.guard.PAGES", 10**6)  # a page for each: of what stands there already nothing is sent
    asked = [
        (name, body(f"anna-{name}-{number}", index, values, run))
        for index, name, data in functions(running, run)
        for number, values in enumerate(data[:2])
        if name not in CHANGE
    ]
    answers = [(name, anna.post("/gradio_api/run/predict", json=each).text) for name, each in asked]
    assert {name for name, text in answers if CANARY in text or NAMED in text} | {
        "share"
    } == SHOW  # which local mode has not
    queued = [{**each, "session_hash": "anna9"} for name, each in asked if name in SHOW]
    assert CANARY in through_the_queue(anna, "anna9", queued)


def test_nobody_calls_anything_on_a_team_server(running: Host) -> None:
    nobody = running.nobody()
    index = next(i for i, fn in running.page.fns.items() if fn.api_name == "look")
    answer = nobody.post("/gradio_api/run/predict", json=body("nobody0", index, [], ""))
    assert answer.status_code == (401 if running.mode is Mode.TEAM else 200)


def test_a_session_belongs_to_who_used_it_first(running: Host) -> None:
    anna, ben = running.enter("anna"), running.enter("ben")
    index = next(i for i, fn in running.page.fns.items() if fn.api_name == "look")
    mine = body("annas-page", index, [], "")
    assert anna.post("/gradio_api/run/predict", json=mine).status_code == 200
    assert ben.post("/gradio_api/run/predict", json=mine).status_code == 404
    assert ben.post("/gradio_api/queue/join", json=mine).status_code == 404
    assert ask(ben, "GET", "/gradio_api/queue/data?session_hash=annas-page").status_code == 404
    assert ask(anna, "GET", "/gradio_api/heartbeat/annaspage").status_code == 200
    assert ask(ben, "GET", "/gradio_api/heartbeat/annaspage").status_code == 404


# Cookies, names, sites


def test_a_forged_or_altered_cookie_is_a_new_visitor(running: Host) -> None:
    anna = running.enter("anna")
    owner = running.owner("anna", anna)
    run = running.run_of(owner).id
    genuine = anna.cookies.get(SESSION if running.mode is Mode.TEAM else COOKIE)
    forged = [f"{owner}.{'0' * 64}", f"{genuine}0", owner[:-1] + "A.x", "member:anna", f"{owner}."]
    if running.mode is not Mode.LOCAL:  # there a name is a secret of this machine's own browsers
        forged.append(owner)
    for value in forged:
        thief = running.nobody(cookies={COOKIE: value, SESSION: value})
        assert thief.get(f"/runs/{run}/recipe.yaml").status_code in (401, 404), value
        page = thief.get("/")
        if running.mode is Mode.PUBLIC:
            assert page.headers["set-cookie"].startswith(f"{COOKIE}=")
            assert owner not in page.headers["set-cookie"]
    assert anna.get(f"/runs/{run}/recipe.yaml").status_code == 200


def test_cookies_are_hidden_from_scripts_and_kept_to_this_site(running: Host) -> None:
    def given(**headers: str) -> str:
        client = running.nobody(headers=headers)
        if running.mode is Mode.TEAM:
            return client.post("/login", data={"name": "anna", "password": PASSWORD}).headers["set-cookie"]
        return client.get("/").headers["set-cookie"]

    plain, secure = given(), given(**{"X-Forwarded-Proto": "https"})
    assert "HttpOnly" in plain
    assert "SameSite=Lax" in plain
    assert "Secure" not in plain
    assert "; Secure" in secure
    assert ("Partitioned" in secure) == (running.mode is not Mode.TEAM)


def test_another_site_can_send_nothing(running: Host) -> None:
    ben = running.enter("ben")
    index = next(i for i, fn in running.page.fns.items() if fn.api_name == "look")
    asked = body("ben-page", index, [], "")
    own = running.url.removesuffix("/")
    for origin, status in ((own, 200), ("https://evil.org", 403), ("null", 403), (f"{own}.evil.org", 403)):
        answer = ben.post("/gradio_api/run/predict", json=asked, headers={"Origin": origin})
        assert answer.status_code == status, origin
        assert not [name for name in answer.headers if name.startswith("access-control")]
    for path in ("/login", "/logout"):
        assert ben.post(path, headers={"Origin": "https://evil.org"}).status_code in (403, 404)


def test_in_local_mode_only_names_of_this_machine_are_answered(running: Host) -> None:
    ben = running.enter("ben")
    port = running.url.rsplit(":", 1)[1]
    for name, local in (("localhost", True), ("[::1]", True), ("evil.org", False), ("127.0.0.1.evil.org", False)):
        status = ben.get("/healthz", headers={"Host": f"{name}:{port}"}).status_code
        assert status == (421 if running.mode is Mode.LOCAL and not local else 200), name


# Answers that are errors


def test_an_error_of_ours_has_the_headers_too(running: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("secret path /root/x")

    anna = running.enter("anna")
    run = running.run_of(running.owner("anna", anna)).id
    monkeypatch.setitem(report.WRITERS, "report.md", (broken, "text/plain"))
    answer = ask(anna, "GET", f"/runs/{run}/report.md")
    assert answer.status_code == 500
    assert ask(anna, "GET", "/assets/none.js").status_code == 404


def test_a_request_that_is_too_long_is_refused(running: Host) -> None:
    ben = running.enter("ben")
    answer = ben.post("/gradio_api/queue/join", content=b"x" * (3 << 20))
    assert answer.status_code == 413
    assert answer.headers["x-content-type-options"] == "nosniff"


# Secrets


def test_a_secret_is_found_nowhere(running: Host, caplog: pytest.LogCaptureFixture) -> None:
    """A password, a session, the key of the cookies and a token sent along: not on disk, in logs or with others."""
    caplog.set_level(logging.DEBUG)
    anna, ben = running.enter("anna"), running.enter("ben")
    token = "hf_canary0123456789abcdef"
    run = running.run_of(running.owner("anna", anna)).id
    index = next(i for i, fn in running.page.fns.items() if fn.api_name == "select")
    heard = []
    for client, session in ((anna, "anna-secret"), (ben, "ben-secret")):
        headers = {"Authorization": f"Bearer {token}", "x-hf-token": token} if client is anna else {}
        asked = {**body(session, index, [None] * len(running.page.fns[index].inputs), run), "oauth_token": token}
        answer = client.post("/gradio_api/run/predict", json=asked, headers=headers)
        heard += [answer.text, str(answer.headers)] if client is ben else []
        heard += [client.get("/config").text] if client is ben else []
    if running.mode is Mode.TEAM:
        anna.post("/login", data={"name": "anna", "password": f"{PASSWORD}-mistyped"})
    home = running.scheduler.home
    secrets = [token, PASSWORD, *(client.cookies.get(SESSION) or token for client in (anna, ben))]
    key = (home / "secret").read_text() if (home / "secret").exists() else token
    written = [file.read_bytes() for file in home.rglob("*") if file.is_file() and file.name != "secret"]
    said = "\n".join(
        f"{record.getMessage()} {record.exc_text}" for record in caplog.records if "http" not in record.name
    )
    events = str(running.scheduler.store.events(run))
    for secret in (*secrets, key):
        assert not any(secret.encode() in content for content in written)
        assert secret not in said
        assert secret not in events
        assert not any(secret in text for text in heard)
    for name in ("secret", "users.json"):
        assert not (home / name).exists() or (home / name).stat().st_mode & 0o077 == 0


# Teams


def test_what_is_shared_can_be_looked_at_and_only_the_owner_changes_it(running: Host) -> None:
    anna, ben = running.enter("anna"), running.enter("ben")
    run = running.run_of(running.owner("anna", anna))
    store = running.scheduler.store
    by_name = {fn.api_name: index for index, fn in running.page.fns.items()}

    def call(client: httpx.Client, session: str, name: str) -> str:
        index = by_name[name]
        data = [None] * len(running.page.fns[index].inputs)
        return client.post("/gradio_api/run/predict", json=body(session, index, data, run.id)).text

    call(ben, "ben-share", "select")
    call(ben, "ben-share", "toggle")
    assert not store.run(run.id).shared
    call(anna, "anna-share", "select")
    call(anna, "anna-share", "toggle")
    several = running.mode is not Mode.LOCAL
    assert store.run(run.id).shared == several
    seen = call(ben, "ben-share", "select")
    assert (CANARY in seen) == (running.mode is Mode.TEAM)  # in public a link opens it, no list
    assert ben.get(f"/runs/{run.id}/report.md").status_code == (200 if several else 404)
    for name in ("toggle", "handler", "handler_1", "doubt", "handler_2"):  # stop sharing, cancel, resume, delete
        call(ben, "ben-share", name)
    assert store.run(run.id).status is Status.SUCCEEDED
    assert store.run(run.id).shared == several
    if several:
        call(anna, "anna-share", "toggle")
        assert CANARY not in call(ben, "ben-share", "select")


def test_an_address_opens_a_run_for_who_may_see_it(running: Host) -> None:
    anna, ben = running.enter("anna"), running.enter("ben")
    run = running.run_of(running.owner("anna", anna))
    by_name = {fn.api_name: index for index, fn in running.page.fns.items()}

    def opened(client: httpx.Client, session: str, run_id: str) -> tuple[str, str]:
        """What the address does, and what the Runs tab shows then."""
        heard = []
        for name in ("turn", "open_runs"):
            data = [None] * len(running.page.fns[by_name[name]].inputs)
            asked = body(session, by_name[name], data, "")
            answer = client.post("/gradio_api/run/predict", params={"run": run_id}, json=asked).json()
            heard.append(json.dumps(answer["data"]))
        return heard[0], heard[1]

    turned, shown = opened(anna, "anna-link", run.id)
    assert '"runs"' in turned
    assert run.id in shown
    stranger, unknown = opened(ben, "ben-link", run.id), opened(ben, "ben-none", "00000000")
    assert stranger == unknown
    assert run.id not in stranger[1]
    running.scheduler.share(run.id, True, owner=run.owner)
    assert (run.id in opened(ben, "ben-shared", run.id)[1]) == (running.mode is not Mode.LOCAL)
    running.scheduler.share(run.id, False, owner=run.owner)
    assert run.id not in opened(ben, "ben-shared", "")[1]


def test_only_its_owner_lets_a_run_that_diverged_go_on(running: Host) -> None:
    anna, ben = running.enter("anna"), running.enter("ben")
    run = fakes.diverged(running.scheduler, fakes.HALF, running.owner("anna", anna))
    run = running.scheduler.share(run.id, True, owner=run.owner)
    by_name = {fn.api_name: index for index, fn in running.page.fns.items()}

    def go_on(client: httpx.Client, session: str) -> Run:
        for name in ("select", "rescued"):
            data = [None] * len(running.page.fns[by_name[name]].inputs)
            client.post("/gradio_api/run/predict", json=body(session, by_name[name], data, run.id))
        return running.scheduler.store.run(run.id)

    assert go_on(ben, "ben-rescue") == run
    found = go_on(anna, "anna-rescue")
    assert (found.status, found.recipe.steps[0].params[rescue.SETTING]) == (Status.QUEUED, "0.1 after 100")


@pytest.mark.usefixtures("any_choice")
def test_only_its_owner_exports_a_run_and_who_sees_it_downloads_that(running: Host) -> None:
    anna, ben, nobody = running.enter("anna"), running.enter("ben"), running.nobody()
    run = running.run_of(running.owner("anna", anna))
    by_name = {fn.api_name: index for index, fn in running.page.fns.items()}

    def export(client: httpx.Client, session: str) -> int:
        """What the export is answered with, once this visitor has tried to make it."""
        client.post("/gradio_api/run/predict", json=body(session, by_name["select"], ["", None], run.id))
        through_the_queue(client, session, [body(session, by_name["export"], [None, None, "awq", 1], run.id)])
        return ask(client, "GET", f"/runs/{run.id}/awq.zip").status_code

    running.scheduler.share(run.id, True, owner=run.owner)
    assert export(ben, "ben-export") == 404
    assert export(anna, "anna-export") == 200
    assert ask(ben, "GET", f"/runs/{run.id}/awq.zip").status_code == (404 if running.mode is Mode.LOCAL else 200)
    running.scheduler.share(run.id, False, owner=run.owner)
    assert ask(ben, "GET", f"/runs/{run.id}/awq.zip").status_code == 404
    assert ask(nobody, "GET", f"/runs/{run.id}/awq.zip").status_code == (401 if running.mode is Mode.TEAM else 404)


def test_a_run_is_deleted_only_once_its_owner_was_asked(running: Host) -> None:
    anna = running.enter("anna")
    run = running.run_of(running.owner("anna", anna))
    by_name = {fn.api_name: index for index, fn in running.page.fns.items()}

    def call(name: str) -> str:
        data = [None] * len(running.page.fns[by_name[name]].inputs)
        return anna.post("/gradio_api/run/predict", json=body("anna-delete", by_name[name], data, run.id)).text

    call("select")
    call("handler_2")
    assert running.scheduler.store.run(run.id).status is Status.SUCCEEDED
    assert wording.title(run.recipe) in call("doubt")
    call("handler_2")
    assert run.id not in [each.id for each in running.scheduler.store.runs()]
