"""The door alone, before an app that says whom it sees: floods, addresses, guessing; and what the page says of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import gradio as gr
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine import promptsets
from engine.errors import InputError, NeedsToken, TooMany, UnknownName
from engine.modes import LIMITS, Limits, Mode
from engine.records import Run, Status
from engine.scheduler import Scheduler
from engine.users import LONGEST, UserFile
from tests.ui import fakes
from tests.ui.conftest import ANNA, BEN, request
from tests.ui.fakes import FakeScheduler
from ui import comparing, hosting, language, visitors
from ui.desk import BASELINE, Desk
from ui.guard import ADDRESS, Guard, House, house, set_cookie
from ui.login import Door
from ui.pages import runs
from ui.server import takes_files
from ui.turns import Turns
from ui.visitors import COOKIE, MEMBER, Members, Signed

PASSWORD = "correct horse battery"
JOIN = "/gradio_api/queue/join"
Call = Callable[..., httpx.Response]


async def seen(request: Request) -> Response:
    return JSONResponse({"owner": request.cookies.get(COOKIE), "address": request.headers.get(ADDRESS)})


@pytest.fixture
def signed() -> Signed:
    return Signed(b"k" * 32)


def calls(made: House, extra: list[Route] | None = None, address: str = "10.0.0.1") -> Call:
    """Sends one request through the door."""
    routes = [*(extra or []), Route(JOIN, seen, methods=["POST"]), Route("/", seen), Route("/config", seen)]
    app = Guard(Starlette(routes=routes), made)

    def call(method: str, path: str, client: str = address, **options: object) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=app, client=(client, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://maquette.example") as asked:
                return await asked.request(method, path, **options)  # type: ignore[arg-type]

        return asyncio.run(ask())

    return call


def visitor(signed: Signed) -> dict[str, str]:
    return {COOKIE: signed.welcome()}


def test_the_app_behind_sees_the_name_that_was_proved(signed: Signed) -> None:
    call = calls(house(Mode.PUBLIC, LIMITS[Mode.PUBLIC], signed, {}))
    cookies = visitor(signed)
    headers = {"Cookie": f"{COOKIE}={cookies[COOKIE]}", ADDRESS: "1.2.3.4", "X-Forwarded-For": "6.6.6.6"}
    assert call("POST", JOIN, headers=headers).json() == {
        "owner": cookies[COOKIE].partition(".")[0], "address": "10.0.0.1"
    }  # fmt: skip
    assert call("POST", JOIN, headers={"Cookie": f"{COOKIE}={ANNA}"}).json()["owner"] is None


@pytest.mark.parametrize("name", ["other", language.COOKIE])
def test_a_quoted_cookie_hides_no_second_one(name: str, signed: Signed) -> None:
    call = calls(house(Mode.PUBLIC, LIMITS[Mode.PUBLIC], signed, {}))
    hidden = rf'{name}="x\073 {COOKIE}={ANNA}"'
    assert call("POST", JOIN, headers={"Cookie": hidden}).json()["owner"] is None
    own = visitor(signed)[COOKIE]
    found = call("POST", JOIN, headers={"Cookie": f"{COOKIE}={own}; {hidden}"}).json()["owner"]
    assert found == own.partition(".")[0]


def test_an_upload_is_no_larger_than_a_set_of_prompts(signed: Signed) -> None:
    made = house(Mode.PUBLIC, LIMITS[Mode.PUBLIC], signed, {}, uploads=True)
    call = calls(made, [Route("/gradio_api/upload", seen, methods=["POST"])])
    for size, status in ((promptsets.LARGEST + 1000, 200), (300_000, 413)):
        answer = call("POST", "/gradio_api/upload", cookies=visitor(signed), content=b"x" * size)
        assert answer.status_code == status


@pytest.mark.parametrize(
    ("environment", "address"),
    [({}, "10.0.0.1"), ({"SPACE_ID": "a/b"}, "2.2.2.2"), ({"MAQUETTE_PROXIES": "2"}, "1.1.1.1")],
)
def test_of_what_is_forwarded_only_our_proxies_count(environment: dict[str, str], address: str, signed: Signed) -> None:
    call = calls(house(Mode.PUBLIC, LIMITS[Mode.PUBLIC], signed, environment))
    assert call("POST", JOIN, headers={"X-Forwarded-For": "9.9.9.9, 1.1.1.1, 2.2.2.2"}).json()["address"] == address


def test_a_line_of_the_clients_own_chooses_no_address(signed: Signed) -> None:
    call = calls(house(Mode.PUBLIC, LIMITS[Mode.PUBLIC], signed, {"SPACE_ID": "a/b"}))
    lines = [("X-Forwarded-For", "9.9.9.9"), ("X-Forwarded-For", "2.2.2.2")]  # the second is the proxy's
    assert call("POST", JOIN, headers=lines).json()["address"] == "2.2.2.2"


def test_a_flood_hurts_only_its_sender(signed: Signed) -> None:
    call = calls(house(Mode.PUBLIC, Limits(requests=75, crowd=4), signed, {}))  # five at once
    ada, ben = visitor(signed), visitor(signed)
    answers = [call("POST", JOIN, cookies=ada) for _ in range(8)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 3
    assert int(answers[-1].headers["retry-after"]) > 0
    assert "Too many requests" in answers[-1].text
    assert call("POST", JOIN, cookies=ben).status_code == 200
    # Ever new cookies do not help: the address is counted too. Others are not touched.
    assert 429 in [call("POST", JOIN, cookies=visitor(signed)).status_code for _ in range(20)]
    assert call("POST", JOIN, client="10.0.0.2", cookies=visitor(signed)).status_code == 200
    assert call("GET", "/", cookies=ada).status_code == 200


def test_a_flood_of_pages_hurts_only_its_sender(signed: Signed) -> None:
    call = calls(house(Mode.PUBLIC, Limits(requests=10_000), signed, {}))
    ada, ben = visitor(signed), visitor(signed)
    answers = [call("POST", JOIN, cookies=ada, json={"session_hash": f"s{i}"}).status_code for i in range(12)]
    assert answers == [200] * 10 + [429] * 2
    assert call("POST", JOIN, cookies=ada, json={"session_hash": "s0"}).status_code == 200  # a page that is known
    assert call("POST", JOIN, cookies=ben, json={"session_hash": "b0"}).status_code == 200


def test_on_ones_own_machine_nothing_is_counted() -> None:
    call = calls(house(Mode.LOCAL, Limits(), visitors.Anyone(), {}))
    local = {"Host": "127.0.0.1:7860"}
    assert {call("POST", JOIN, headers=local).status_code for _ in range(50)} == {200}


def test_uploads_are_closed_unless_the_page_takes_files(signed: Signed) -> None:
    routes = [Route("/gradio_api/upload", seen, methods=["POST"])]
    for uploads, status in ((False, 404), (True, 200)):
        made = house(Mode.PUBLIC, LIMITS[Mode.PUBLIC], signed, {}, uploads=uploads)
        assert calls(made, routes)("POST", "/gradio_api/upload", cookies=visitor(signed)).status_code == status
    for block, takes in ((gr.Textbox(), False), (gr.File(), True), (gr.UploadButton(), True)):
        assert takes_files(cast(gr.Blocks, SimpleNamespace(blocks={0: block}))) == takes


def test_the_space_s_own_name_is_ours(signed: Signed) -> None:
    call = calls(house(Mode.PUBLIC, Limits(), signed, {"SPACE_HOST": "me-maquette.hf.space"}))
    for origin, status in (("https://me-maquette.hf.space", 200), ("https://other.hf.space", 403)):
        assert call("POST", JOIN, headers={"Origin": origin}).status_code == status


def team(tmp_path: Path) -> tuple[Call, Members, UserFile]:
    users = UserFile(tmp_path)
    users.add("anna", PASSWORD)
    members = Members(users)
    return calls(house(Mode.TEAM, LIMITS[Mode.TEAM], members, {}), Door(members).routes()), members, users


def login(call: Call, name: str = "anna", password: str = PASSWORD, **options: object) -> httpx.Response:
    return call("POST", "/login", data={"name": name, "password": password}, **options)


def session(answer: httpx.Response) -> dict[str, str]:
    return {visitors.SESSION: answer.cookies[visitors.SESSION]}


def test_a_login_lasts_until_logout_another_password_or_removal(tmp_path: Path) -> None:
    call, _, users = team(tmp_path)
    assert call("GET", "/").headers["location"] == "./login"
    assert call("GET", "/?recipe=a%20b").headers["location"] == "./login?recipe=a%20b"
    for name, password in (("anna", "wrong password"), ("nobody", PASSWORD), ("", "")):
        answer = login(call, name, password)
        assert answer.status_code == 403
        assert "Wrong name or password" in answer.text
        assert "set-cookie" not in answer.headers
    cookies = session(login(call, " Anna "))
    assert call("GET", "/", cookies=cookies).json()["owner"] == f"{MEMBER}anna"
    assert call("GET", "/login", cookies=cookies).headers["location"] == "./"
    call("POST", "/logout", cookies=cookies)
    assert call("GET", "/", cookies=cookies).status_code == 303
    for change in (lambda: users.add("anna", PASSWORD + "!"), lambda: users.remove("anna")):
        password = PASSWORD if users.check("anna", PASSWORD) else PASSWORD + "!"
        cookies = session(login(call, password=password))
        assert call("GET", "/", cookies=cookies).status_code == 200
        change()
        assert call("GET", "/", cookies=cookies).status_code == 303


def test_guessing_is_slowed_down_for_the_one_who_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.login.TRIES_BY_ADDRESS", 3)
    call, _, _ = team(tmp_path)
    answers = [login(call, password=f"wrong {i}") for i in range(4)]
    assert [answer.status_code for answer in answers] == [403, 403, 403, 429]
    assert int(answers[-1].headers["retry-after"]) > 0
    assert login(call).status_code == 429
    assert login(call, client="10.0.0.9").status_code == 303


def test_a_form_of_too_many_fields_is_one_line_and_counts_as_a_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ui.login.TRIES_BY_ADDRESS", 2)
    call, _, _ = team(tmp_path)
    many = {f"field{number}": "x" for number in range(20)}
    answers = [call("POST", "/login", data=many) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [400, 400, 429]
    assert "Fill in the form" in answers[0].text


def test_the_longest_password_gets_in_whole(tmp_path: Path) -> None:
    call, _, users = team(tmp_path)
    users.add("ben", "p" * LONGEST)
    assert login(call, "ben", "p" * LONGEST).status_code == 303
    assert login(call, "ben", "p" * (LONGEST - 1)).status_code == 403


def test_the_form_escapes_and_keeps_what_was_asked(tmp_path: Path) -> None:
    call, _, _ = team(tmp_path)
    page = call("GET", '/login?recipe="><script>alert(1)</script>')
    assert "<script>" not in page.text
    answer = call("POST", "/login?compare=a,b", data={"name": "anna", "password": PASSWORD})
    assert answer.headers["location"] == "./?compare=a,b"


def test_the_key_of_the_cookies_is_made_once_and_is_the_servers_own(tmp_path: Path) -> None:
    key = visitors.secret(tmp_path)
    assert len(key) == 32
    (tmp_path / "secret").chmod(0o644)
    assert visitors.secret(tmp_path) == key
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    (tmp_path / "secret").write_text("")
    assert visitors.secret(tmp_path) != key


def test_behind_https_a_cookie_goes_nowhere_else() -> None:
    scope = {"type": "http", "headers": [(b"x-forwarded-proto", b"https, http")], "scheme": "http", "path": "/"}
    assert set_cookie(Request(scope), COOKIE, "x", 1).endswith("HttpOnly; SameSite=None; Secure; Partitioned")
    assert set_cookie(Request(scope), visitors.SESSION, "x", 1).endswith("HttpOnly; SameSite=Lax; Secure")


# Behind the door


def test_who_keeps_no_cookie_looks_and_starts_nothing(desk: Desk) -> None:
    with pytest.raises(TooMany, match="keeps no cookie"):
        desk.enter(request("", "some-session"), "start")
    assert comparing.start_first(desk, request("", "some-session")) == []
    assert desk.enter(request(ANNA), "start") == ANNA


def test_models_that_write_are_counted_by_visitor_and_by_address(desk: Desk, scheduler: FakeScheduler) -> None:
    scheduler.limits = Limits(streams=2, crowd=2)

    def ask(owner: str, address: str) -> gr.Request:
        made = request(owner)
        made.headers[ADDRESS] = address
        return made

    for _ in range(2):
        desk.enter(ask(ANNA, "a"), "stream")
    with pytest.raises(TooMany, match="Try again in"):
        desk.enter(ask(ANNA, "b"), "stream")
    desk.enter(ask(BEN, "a"), "stream")
    desk.enter(ask("cleo-0123456789abcdef", "a"), "stream")
    with pytest.raises(TooMany):  # the fourth of this address was the last
        desk.enter(ask("dora-0123456789abcdef", "a"), "stream")
    desk.enter(ask("dora-0123456789abcdef", "c"), "stream")


def test_a_visitor_has_one_text_written_whatever_the_number_of_pages() -> None:
    turns = Turns()
    first, other = turns.begin("page 1", 1, ANNA), turns.begin("page 1 of ben", 1, BEN)
    second = turns.begin("page 2", 2, ANNA)
    assert first.stop.is_set()
    assert not first.replaced  # it shows that it was stopped
    assert not other.stop.is_set()
    assert not second.stop.is_set()


@pytest.fixture
def teams(scheduler: FakeScheduler) -> Desk:
    scheduler.limits = LIMITS[Mode.TEAM]
    return Desk(scheduler.store, cast(Scheduler, scheduler), None, Mode.TEAM)


def test_buttons_are_for_the_owner(teams: Desk, scheduler: FakeScheduler) -> None:
    mine = fakes.finished(scheduler, fakes.GPTQ, "member:anna", 3.0, 0.1)
    shared = scheduler.share(mine.id, True, "member:anna")
    own = runs.buttons_for(teams, "member:anna", shared)
    other = runs.buttons_for(teams, "member:ben", shared)
    assert [update["interactive"] for update in own[:5]] == [True, False, False, True, True]  # type: ignore[index]
    assert [update["interactive"] for update in other[:5]] == [True, False, False, False, False]  # type: ignore[index]
    assert own[4]["value"] == "Stop sharing"  # type: ignore[index]
    assert [update["visible"] for update in own[5:]] == [False, False]  # type: ignore[index]
    assert teams.find(shared.id, "member:ben")
    with pytest.raises(InputError, match="only its owner"):
        teams.own(shared.id, "member:ben")
    assert hosting.marks([shared], "member:ben") == {shared.id: "anna"}
    assert "anna shares this run" in hosting.run_note(shared, Limits(), False, 0)


def test_nothing_is_shared_on_a_page_of_ones_own(desk: Desk, scheduler: FakeScheduler) -> None:
    mine = scheduler.share(fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.0, 0.1).id, True, ANNA)
    alone = replace(desk, mode=Mode.LOCAL)
    assert alone.find(mine.id, BEN) is None
    assert alone.runs(BEN) == []
    with pytest.raises(InputError, match="nobody to share"):
        alone.share(mine, ANNA, True, scheduler.hub)


@pytest.fixture
def public(scheduler: FakeScheduler) -> Desk:
    scheduler.limits = LIMITS[Mode.PUBLIC]
    return Desk(scheduler.store, cast(Scheduler, scheduler), None, Mode.PUBLIC)


def test_a_link_opens_what_is_shared_in_public_and_keeps_it_in_the_pickers(
    public: Desk, scheduler: FakeScheduler
) -> None:
    runs_ = [fakes.finished(scheduler, recipe, ANNA, 3.0, 0.1) for recipe in (BASELINE, fakes.GPTQ)]
    asked = comparing.pair_of(*(public.entry(run.id, ANNA) for run in runs_))
    with pytest.raises(UnknownName):
        public.open_link(asked.compare, BEN)
    assert "Shared: " in comparing.share(public, ANNA, asked, scheduler.hub)
    assert public.runs(BEN) == []  # a link is needed: nobody reads the list of what is shared
    assert public.entries(BEN) == []
    public.open_link(asked.compare, BEN)
    assert [entry.key for entry in public.entries(BEN)] == list(asked.compare)
    assert "shared with you by a link" in hosting.run_note(public.run(runs_[1].id, BEN), Limits(), False, 0)
    with pytest.raises(InputError, match="only its owner"):
        public.share(public.run(runs_[1].id, BEN), BEN, False, scheduler.hub)
    public.share(runs_[1], ANNA, False, scheduler.hub)
    assert [entry.key for entry in public.entries(BEN)] == [runs_[0].id]


def test_a_gated_model_is_not_shared_in_public(
    public: Desk, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.0, 0.1)

    def refuse(*_: object) -> None:
        raise NeedsToken("acme/secret is gated: accept its conditions and give a token of that account.")

    monkeypatch.setattr("ui.desk.open_model", refuse)
    with pytest.raises(NeedsToken):
        public.share(run, ANNA, True, scheduler.hub)
    assert not scheduler.store.run(run.id).shared


def test_the_page_says_what_may_be_taken_and_when_files_go() -> None:
    line = hosting.limits_line(Mode.PUBLIC, LIMITS[Mode.PUBLIC])
    for words in ("and 2 waiting", "1.50 billion parameters", "30 min", "4.00 GiB", "24 h"):
        assert words in line
    assert hosting.limits_line(Mode.LOCAL, Limits()) == ""
    run = Run(id="aaaa0000", recipe=fakes.GPTQ, created=0, finished=1000.0, status=Status.SUCCEEDED)
    assert "in about 1 h 0 min" in hosting.run_note(run, Limits(keep=3600), True, 1000.0)
    gone = run.model_copy(update={"expired": 4600.0})
    assert "were deleted 30 min ago" in hosting.run_note(gone, Limits(keep=3600), True, 6400.0)
    assert "Logged in as <b>" not in hosting.who("member:<b>")
    assert hosting.who(ANNA) == ""


@pytest.mark.parametrize("place", ["data", "event_data"])
@pytest.mark.parametrize("path", ["https://files.example/1GB", " HTTP://files.example/x", "ftp://files.example/x"])
def test_nobody_lets_the_server_fetch_what_they_name(signed: Signed, place: str, path: str) -> None:
    call = calls(house(Mode.PUBLIC, LIMITS[Mode.PUBLIC], signed, {}))
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"fn_index": 0, "session_hash": "abc", place: [{"deep": [file]}]}
    cookies = visitor(signed)
    assert call("POST", JOIN, cookies=cookies, json=body).status_code == 404
    file["path"] = "/tmp/gradio/abc/set.jsonl"  # as an upload is named; its address is ours
    assert call("POST", JOIN, cookies=cookies, json=body).status_code == 200


def test_sessions_have_short_names_and_bodies_are_objects(signed: Signed) -> None:
    call = calls(house(Mode.PUBLIC, LIMITS[Mode.PUBLIC], signed, {}))
    for name in ("x" * 65, "a b", "../x"):
        assert call("POST", JOIN, cookies=visitor(signed), json={"session_hash": name}).status_code == 404
        assert call("GET", "/config", params={"session_hash": name}, cookies=visitor(signed)).status_code == 404
    for body in (b"[1]", b"not json", b"[" * 100_000):
        assert call("POST", JOIN, cookies=visitor(signed), content=body).status_code == 422


def test_documents_and_reports_are_counted_by_visitor(signed: Signed) -> None:
    call = calls(house(Mode.PUBLIC, LIMITS[Mode.PUBLIC], signed, {}))
    ada, ben = visitor(signed), visitor(signed)
    answers = [call("GET", "/", cookies=ada).status_code for _ in range(40)]
    assert answers[:30] == [200] * 30
    assert 429 in answers
    assert call("GET", "/", cookies=ben).status_code == 200
