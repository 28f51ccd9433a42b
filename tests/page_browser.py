"""Send requests to the owner's page as a browser does, without one: for tests that attack it, or read what it says.

A plugin of pytest, which conftest.py names. Example:

    def test_today_is_there(visitor: Browser) -> None:
        assert visitor.get("/").status_code == 200
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import requests
from conftest import running_server
from testing import OWNER_TOKEN, Databases

import outreach_server

LOGIN, PAUSE = "/login", "/pause"


class Browser:
    """Send requests as a browser does. It keeps cookies, and follows no redirect."""

    def __init__(self, url: str, base_url: str | None = None) -> None:
        self.url, self.base_url = url, base_url or url
        self.cookies: dict[str, str] = {}

    def call(self, method: str, path: str, data: Any = None, **headers: str) -> requests.Response:
        """`Sec_Fetch_Site="cross-site"` is a header; "" removes the one that a page of the site sends."""
        sent = {"Host": self.base_url.partition("://")[2], "Cookie": "; ".join(map("=".join, self.cookies.items()))}
        if method == "POST":
            sent |= {"Sec-Fetch-Site": "same-origin", "Origin": self.base_url}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {name: value for name, value in sent.items() if value}
        response = requests.request(method, self.url + path, data=data, headers=sent, allow_redirects=False, timeout=10)
        for cookie in response.raw.headers.getlist("Set-Cookie"):
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value.strip('"')
        return response

    def get(self, path: str = "/", **headers: str) -> requests.Response:
        return self.call("GET", path, **headers)

    def post(self, path: str, data: Any = None, **headers: str) -> requests.Response:
        return self.call("POST", path, data, **headers)

    def log_in(self, password: str = OWNER_TOKEN, **fields: str) -> requests.Response:
        return self.post(LOGIN, {"password": password, **fields})


@contextlib.contextmanager
def serving_at(databases: Databases, base_url: str | None = None) -> Iterator[str]:
    api = outreach_server.Api(OWNER_TOKEN, databases.quinn_url, databases.icloud_url, timedelta(seconds=30))
    app, uploads = outreach_server.make_site(api, base_url)
    with running_server(app, uploads) as url:
        yield url


@pytest.fixture
def page_url(databases: Databases) -> Iterator[str]:
    with serving_at(databases) as url:
        yield url


@pytest.fixture
def stranger(page_url: str) -> Browser:
    """A browser that is not logged in."""
    return Browser(page_url)


@pytest.fixture
def visitor(page_url: str) -> Browser:
    """A browser that is logged in."""
    browser = Browser(page_url)
    assert browser.log_in().status_code == 303
    return browser
