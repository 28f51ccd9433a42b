"""Attack the owner's page: its login, its sessions, requests from other sites, other names of the host, its answers."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
import requests
from conftest import running_server
from page_browser import LOGIN, PAUSE, Browser, serving_at
from testing import OWNER_TOKEN, Databases, Script, TestData

import db
import outreach_server
import page
import page_templates
import page_today
import sessions

PUBLIC_URL = "https://outreach.example.com"
PRIVATE_URL = "http://100.64.0.7:3030"


def is_paused(world: TestData) -> bool:
    return bool(world.quinn("SELECT paused FROM outreach_settings")[0][0])


class Fields(HTMLParser):
    """Collect the hidden fields of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "input" and values.get("type") == "hidden":
            self.found.append((values["name"] or "", values["value"] or ""))


# --- login --------------------------------------------------------------------------------------------


def test_the_owners_token_opens_the_page(stranger: Browser) -> None:
    assert stranger.get("/").status_code == 401
    response = stranger.log_in()
    assert (response.status_code, response.headers["Location"]) == (303, "/")
    cookie = response.headers["Set-Cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "path=/" in cookie
    assert "secure" not in cookie, "over plain http, the browser would drop it"
    shown = stranger.get("/")
    assert shown.status_code == 200
    assert "Dispatcher not running" in shown.text


def test_behind_tls_the_cookie_is_secure_and_cannot_be_set_by_another_host(databases: Databases) -> None:
    with serving_at(databases, PUBLIC_URL) as url:
        browser = Browser(url, PUBLIC_URL)
        cookie = browser.log_in().headers["Set-Cookie"]
        assert cookie.startswith("__Host-outreach=")
        assert "secure" in cookie.lower()
        assert browser.get("/").status_code == 200


@pytest.mark.parametrize("password", ["", "wrong", OWNER_TOKEN[:-1], OWNER_TOKEN + "x", "naïve ☂", "x" * 10_000])
def test_another_password_opens_nothing(stranger: Browser, password: str) -> None:
    response = stranger.log_in(password)
    assert response.status_code == 403
    assert "not the owner" in response.text
    assert password == "" or password not in response.text.replace("OUTREACH_OWNER_TOKEN", "")
    assert stranger.get("/").status_code == 401


def test_wrong_attempts_are_slowed_and_do_not_block_the_server(stranger: Browser) -> None:
    statuses: list[int] = []

    def attempt() -> None:
        statuses.append(Browser(stranger.url).log_in("wrong").status_code)

    began = time.monotonic()
    threads = [threading.Thread(target=attempt) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses.count(403) == sessions.BURST, "in parallel, too, no more attempts are checked"
    assert statuses.count(429) == 40 - sessions.BURST
    assert time.monotonic() - began < 5, "no attempt waits in one of the server's threads"
    late = stranger.log_in()
    assert late.status_code == 429, "the right token is not checked either: else guessing would not be slowed"
    assert 1 <= int(late.headers["Retry-After"]) <= sessions.REFILL
    assert "Wait" in late.text


def test_the_right_token_costs_no_attempt() -> None:
    found = sessions.Sessions(OWNER_TOKEN)
    for _ in range(3 * sessions.BURST):
        found.check_password(OWNER_TOKEN)


def test_an_attempt_comes_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    attempts = sessions.Attempts()
    for _ in range(sessions.BURST):
        attempts.begin()
    with pytest.raises(sessions.TooManyAttempts) as refused:
        attempts.begin()
    assert refused.value.seconds == sessions.REFILL
    now += sessions.REFILL
    attempts.begin()
    with pytest.raises(sessions.TooManyAttempts):
        attempts.begin()


def test_after_the_login_the_owner_is_where_he_wanted_to_be(stranger: Browser) -> None:
    asked = stranger.get("/people?page=2")
    assert ("next", "/people?page=2") in Fields(asked.text).found
    assert stranger.log_in(next="/people?page=2").headers["Location"] == "/people?page=2"


@pytest.mark.parametrize(
    "target",
    ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/a\r\nX: y", "", "/é"],
)
def test_the_login_never_leads_to_another_site(stranger: Browser, target: str) -> None:
    assert stranger.log_in(next=target).headers["Location"] == "/"


def test_a_form_that_was_sent_without_a_session_is_not_lost(stranger: Browser, world: TestData) -> None:
    text = 'Hello <b>"you"</b> &amp;\r\nsecond line \u202e'
    fields = [("text", text), ("who", "1"), ("who", "2")]
    asked = stranger.post(PAUSE, fields)
    assert asked.status_code == 401
    assert not is_paused(world), "nothing is done before the login"
    hidden = Fields(asked.text).found
    wrong = stranger.post(LOGIN, [*hidden, ("password", "wrong")])
    right = stranger.post(LOGIN, [*Fields(wrong.text).found, ("password", OWNER_TOKEN)])
    assert right.status_code == 200
    assert Fields(right.text).found == [("text", text.replace("\r\n", "\n")), ("who", "1"), ("who", "2")]
    assert f'action="{PAUSE}"' in right.text
    assert stranger.post(PAUSE, fields).status_code == 303


# --- sessions -----------------------------------------------------------------------------------------


def test_a_stolen_database_gives_no_session(visitor: Browser, page_url: str, world: TestData) -> None:
    value = visitor.cookies["outreach"]
    [(stored,)] = world.quinn("SELECT token_hash FROM outreach_sessions")
    assert stored not in (value, hashlib.sha256(value.encode()).hexdigest())
    for guess in (stored, value[::-1], "", "x" * 5000, value + "x"):
        thief = Browser(page_url)
        thief.cookies["outreach"] = guess
        assert thief.get("/").status_code == 401
    forged = hashlib.sha256(b"mine").hexdigest()  # a thief who can write there, and does not know the owner's token
    world.quinn("INSERT INTO outreach_sessions (token_hash) VALUES (%(hash)s)", hash=forged)
    thief.cookies["outreach"] = "mine"
    assert thief.get("/").status_code == 401


def test_another_owners_token_ends_all_sessions(visitor: Browser, databases: Databases) -> None:
    api = outreach_server.Api("another-token-0123456789", databases.quinn_url, databases.icloud_url, timedelta())
    with running_server(outreach_server.make_site(api, None)[0]) as url:
        visitor.url = visitor.base_url = url
        assert visitor.get("/").status_code == 401


@pytest.mark.parametrize(
    ("column", "days", "status"),
    [
        ("last_used_at", sessions.IDLE_DAYS + 1, 401),
        ("last_used_at", sessions.IDLE_DAYS - 1, 200),
        ("created_at", sessions.MAX_DAYS + 1, 401),
        ("created_at", sessions.MAX_DAYS - 1, 200),
    ],
)
def test_a_session_ends_after_its_days(visitor: Browser, world: TestData, column: str, days: int, status: int) -> None:
    world.quinn(f"UPDATE outreach_sessions SET {column} = now() - %(days)s * interval '1 day'", days=days)
    assert visitor.get("/").status_code == status
    assert visitor.get("/").status_code == status, "a look does not bring it back"


def test_a_login_deletes_the_sessions_that_have_ended(visitor: Browser, stranger: Browser, world: TestData) -> None:
    world.quinn("UPDATE outreach_sessions SET last_used_at = now() - interval '15 days'")
    stranger.log_in()
    assert world.quinn("SELECT count(*) FROM outreach_sessions") == [(1,)]


def test_a_use_is_written_down_once_in_ten_minutes(visitor: Browser, world: TestData) -> None:
    look = "SELECT last_used_at FROM outreach_sessions"
    [before] = world.quinn(look)
    visitor.get("/")
    assert world.quinn(look) == [before]
    world.quinn("UPDATE outreach_sessions SET last_used_at = now() - interval '1 hour'")
    visitor.get("/")
    assert world.quinn("SELECT last_used_at > now() - interval '1 minute' FROM outreach_sessions") == [(True,)]


def test_after_a_logout_the_cookie_opens_nothing(visitor: Browser, world: TestData) -> None:
    value = visitor.cookies["outreach"]
    assert visitor.post("/logout").headers["Location"] == "/login"
    assert visitor.cookies["outreach"] == ""
    visitor.cookies["outreach"] = value
    assert visitor.get("/").status_code == 401
    assert not world.quinn("SELECT FROM outreach_sessions")


def test_the_cookie_never_opens_the_api(visitor: Browser) -> None:
    for method, path in (("GET", outreach_server.STATUS), ("GET", outreach_server.SETTINGS)):
        response = visitor.call(method, path)
        assert response.status_code == 401
        assert response.json()["success"] is False


def test_the_bearer_token_opens_the_api_as_before_and_not_the_page(stranger: Browser) -> None:
    bearer = {"Authorization": f"Bearer {OWNER_TOKEN}"}
    assert stranger.get(outreach_server.STATUS, Host="any.name.example", **bearer).json()["success"] is True
    assert stranger.get("/healthz").json()["success"] is True
    assert stranger.get("/", **bearer).status_code == 401


# --- other sites --------------------------------------------------------------------------------------

FOREIGN: list[dict[str, str]] = [
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},  # another port of this host
    {"Sec_Fetch_Site": "none"},
    {"Sec_Fetch_Site": "cross-site", "Origin": "https://evil.example"},
    {"Sec_Fetch_Site": "", "Origin": ""},
    {"Sec_Fetch_Site": "", "Origin": "null"},
    {"Sec_Fetch_Site": "", "Origin": "https://evil.example"},
    {"Sec_Fetch_Site": "", "Origin": "http://127.0.0.1:1"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("path", [PAUSE, LOGIN, "/logout"])
def test_a_post_from_another_site_does_nothing(
    visitor: Browser, world: TestData, path: str, headers: dict[str, str]
) -> None:
    response = visitor.post(path, {"password": OWNER_TOKEN}, **headers)
    assert response.status_code == 403
    assert "another site" in response.text
    assert "Set-Cookie" not in response.headers
    assert not is_paused(world)
    assert visitor.get("/").status_code == 200, "still logged in"


def test_every_post_route_refuses_another_site(visitor: Browser) -> None:
    routes = [route for routes in outreach_server.PAGES for route in routes]
    posts = [route.rule for route in routes if route.method != "GET"]
    assert len(posts) > 2
    for rule in posts:
        path = re.sub("<[^>]*>", "5a6a6e1b-0000-4000-8000-000000000000", rule)
        assert visitor.post(path, Sec_Fetch_Site="cross-site").status_code == 403, rule


def test_every_page_but_the_login_needs_a_session(stranger: Browser) -> None:
    routes = [route for routes in outreach_server.PAGES for route in routes]
    assert {route.rule for route in routes if route.is_public} == {LOGIN}
    for route in routes:
        if not route.is_public:
            path = re.sub("<[^>]*>", "5a6a6e1b-0000-4000-8000-000000000000", route.rule)
            assert stranger.call(route.method, path).status_code == 401, route.rule


def test_where_a_browser_sends_no_sec_fetch_site_the_origin_decides(databases: Databases, world: TestData) -> None:
    with serving_at(databases, PRIVATE_URL) as url:
        browser = Browser(url, PRIVATE_URL)
        assert browser.post(LOGIN, {"password": OWNER_TOKEN}, Sec_Fetch_Site="").status_code == 303
        other = f"http://127.0.0.1:{url.rpartition(':')[2]}"  # ours as well, but not the one in the Host header
        assert browser.post(PAUSE, Sec_Fetch_Site="", Origin=other).status_code == 403
        assert browser.post(PAUSE, Sec_Fetch_Site="").status_code == 303
    assert is_paused(world)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1.evil.example:{port}", "x" * 300]
)
def test_a_rebinding_name_gets_no_page(visitor: Browser, world: TestData, host: str) -> None:
    host = host.format(port=visitor.url.rpartition(":")[2])
    for response in (visitor.get("/", Host=host), visitor.post(PAUSE, Host=host, Origin=f"http://{host}")):
        assert response.status_code == 421
        assert "OUTREACH_BASE_URL" in response.text
        assert "Dispatcher not running" not in response.text
    assert visitor.post(LOGIN, {"password": OWNER_TOKEN}, Host=host).status_code == 421
    assert not is_paused(world)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", "[::1]"])
def test_this_hosts_own_names_are_served_at_its_port(page_url: str, name: str) -> None:
    port = page_url.rpartition(":")[2]
    browser = Browser(page_url, f"http://{name.lower()}:{port}")
    assert browser.get("/", Host=f"{name}:{port}").status_code == 401
    assert browser.log_in().status_code == 303


def test_a_link_in_a_mail_leads_to_the_page_and_not_to_the_login(stranger: Browser, visitor: Browser) -> None:
    arrived = stranger.get("/settings", Sec_Fetch_Site="cross-site")  # a strict cookie stays at home
    assert arrived.status_code == 200
    assert 'http-equiv="refresh"' in arrived.text
    assert "Dispatcher not running" not in visitor.get("/", Cookie="", Sec_Fetch_Site="cross-site").text
    assert stranger.get("/settings", Sec_Fetch_Site="same-origin").status_code == 401


# --- answers ------------------------------------------------------------------------------------------


def every_answer(stranger: Browser, visitor: Browser) -> list[requests.Response]:
    return [
        visitor.get("/"),
        stranger.get("/"),
        stranger.get("/login"),
        stranger.log_in("wrong"),
        visitor.post(PAUSE),
        visitor.post(PAUSE, Sec_Fetch_Site="cross-site"),
        visitor.get("/", Host="evil.example"),
        visitor.get("/nowhere"),
        visitor.call("PUT", "/pause"),
        visitor.post("/logout"),
    ]


def test_each_answer_has_the_headers_and_nothing_is_cached(stranger: Browser, visitor: Browser) -> None:
    for response in every_answer(stranger, visitor):
        where = f"{response.request.method} {response.url} {response.status_code}"
        assert response.headers["Content-Security-Policy"] == (
            "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
            "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        ), where
        assert response.headers["Referrer-Policy"] == "same-origin", where
        assert response.headers["X-Content-Type-Options"] == "nosniff", where
        assert response.headers["Cache-Control"] == "no-store", where
        assert "Access-Control-Allow-Origin" not in response.headers, where


def test_no_page_has_a_script_or_a_style_in_it(stranger: Browser, visitor: Browser) -> None:
    for response in every_answer(stranger, visitor):
        assert not re.search(r"<script(?![^>]*src=)|<style| style=| on[a-z]+=|https?://", response.text), response.url


def test_static_files_are_kept_under_the_digest_of_their_content(stranger: Browser) -> None:
    for found in page_templates.STATIC.values():
        response = stranger.get(found.path)
        assert response.status_code == 200
        assert response.content == found.content
        assert response.headers["Cache-Control"] == page.IMMUTABLE
        assert response.headers["Content-Type"] == found.type
    assert stranger.get("/static/0000/style.css").headers["Cache-Control"] == "no-store"
    for path in ("/static/0/login.html", "/static/0/..%2Fpage.py", "/static/0/%2e%2e/%2e%2e/page.py", "/static/x"):
        assert stranger.get(path).status_code == 404


@pytest.mark.parametrize("size", [page.FORM_LIMIT + 1, 2 * 1024 * 1024])
def test_a_form_that_is_too_long_is_refused(visitor: Browser, size: int) -> None:
    assert visitor.post(PAUSE + "d", b"a" * 10).status_code == 404
    assert visitor.post(LOGIN, b"a=" + b"x" * size).status_code == 413


@pytest.mark.parametrize("body", [b"\xff\xfe", b"password=\xff", b"&" * 5000, b"=" * 100, b"password=%ff%00"])
def test_a_form_that_cannot_be_read_is_no_failure(stranger: Browser, body: bytes) -> None:
    assert stranger.post(LOGIN, body).status_code in (400, 403)
    multipart = stranger.post(LOGIN, body, Content_Type="multipart/form-data; boundary=x")
    assert multipart.status_code in (400, 403)


def test_no_template_writes_a_control_character_or_a_tag_of_a_value() -> None:
    hostile = "<script>alert(1)</script>\u202eevil\x00\x1b[2J\u2066 & \"quotes\" 'too' \ud800"
    written = page_templates.render(
        "error.html", sentence=hostile, is_logged_in=False, message=None, path="/", paused=None, errors={}
    )
    assert "<script>" not in written
    assert "&lt;script&gt;" in written
    assert not re.search("[\u202e\u2066\x00\x1b\ud800]", written)


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(Exception, match="sentence"):
        page_templates.render("error.html", is_logged_in=False, message=None, path="/", paused=None, errors={})


# --- a message after a redirect -----------------------------------------------------------------------


def test_a_message_is_shown_to_its_session_only_and_cannot_be_forged(visitor: Browser, page_url: str) -> None:
    where = visitor.post(PAUSE).headers["Location"]
    assert re.fullmatch(r"/\?m=[\w-]{12}", where), "the address has no text"
    assert "Everything is paused" in visitor.get(where).text
    other = Browser(page_url)
    other.log_in()
    assert "taken back" not in other.get(where).text
    assert "Everything is fine" not in visitor.get("/?m=Everything+is+fine").text


# --- pause and resume everything ----------------------------------------------------------------------


def test_a_tab_that_is_old_does_not_resume_by_accident(visitor: Browser, world: TestData) -> None:
    old = int(time.time()) - page_today.STALE - 5
    world.settings(paused=True)
    for seen_at in (str(old), "", "soon", "-1", "9" * 30):
        if seen_at != "9" * 30:
            assert "was old" in visitor.get(visitor.post("/resume", {"seen_at": seen_at}).headers["Location"]).text
            assert is_paused(world)


def test_a_tab_from_before_the_last_pause_does_not_resume_it(visitor: Browser, world: TestData) -> None:
    world.settings(paused=True)
    seen_at = int(time.time()) - 10
    visitor.post(PAUSE)
    visitor.post("/resume", {"seen_at": str(seen_at)})
    assert is_paused(world)


# --- logs ---------------------------------------------------------------------------------------------


def test_the_log_has_no_token_no_cookie_and_no_text(site: tuple[Script, str]) -> None:
    script, url = site
    browser = Browser(url)
    browser.log_in("not-the-owners-token")
    browser.log_in()
    value = browser.cookies["outreach"]
    browser.post(PAUSE, {"seen_at": "my private words"})
    browser.post("/resume", {"seen_at": "my private words"})
    browser.get("/nowhere/my-private-words?m=my-private-words")
    browser.post("/logout", Sec_Fetch_Site="cross-site")
    browser.post("/logout")
    script.wait_for("owner logged out")
    log = "\n".join(script.lines())
    for secret in (OWNER_TOKEN, "not-the-owners-token", value, "private"):
        assert secret not in log
    assert "owner logged in" in log
    assert "login refused status=403" in log


def test_the_page_says_that_a_database_is_down(
    databases: Databases, world: TestData, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_at(databases) as url:
        browser = Browser(url)
        browser.log_in()
        browser.get("/")
        connect: Callable[..., Any] = db.connect
        monkeypatch.setattr(db, "connect", lambda _: connect("host=127.0.0.1 port=1"))
        shown = browser.get("/")
        assert shown.status_code == 200
        assert "database" in shown.text
        assert browser.post(PAUSE).status_code == 503
        assert "systemctl stop send-queue-server.socket" in browser.post(PAUSE).text
        assert Browser(url).get("/").status_code == 401
        assert Browser(url).log_in().status_code == 503


def test_json_of_a_carried_form_that_is_nonsense_is_ignored(stranger: Browser) -> None:
    nonsense = ["[", "{}", "[1, 2]", '["a"]', '["<x>", "y"]', json.dumps(["ok", "yes"])]
    fields = [("password", OWNER_TOKEN), ("is_post", "true"), ("next", PAUSE), *(("carried", one) for one in nonsense)]
    assert Fields(stranger.post(LOGIN, fields).text).found == [("ok", "yes")]
