"""The page is for whoever has its address, on this machine, and asks no other host for anything."""

import http.client
import json
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

pytest.importorskip("gradio", reason="needs the extra explore")

from cavmae.trainer.explore.application import application
from cavmae.trainer.explore.page import Page
from cavmae.trainer.explore.server import listening_socket, serving

Answer = tuple[int, dict[str, str], str]
SOUGHT: list[object] = []
"""Addresses that this process connected to, and names that it looked up."""


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        SOUGHT.append(arguments[1])
    elif event == "socket.getaddrinfo":
        SOUGHT.append(arguments[:2])


class Visitor:
    """Sends requests to a server on a port, whose token it has."""

    token = "0123456789abcdef"

    def __init__(self, listening: socket.socket) -> None:
        self.port = listening.getsockname()[1]
        self.cookie = {"Cookie": f"cavmae-{self.port}={self.token}"}

    def get(self, path: str, **headers: str) -> Answer:
        return self._ask("GET", path, b"", headers)

    def post(self, path: str, body: bytes, **headers: str) -> Answer:
        return self._ask("POST", path, body, headers)

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, answer.read().decode(errors="replace")


@pytest.fixture(scope="module")
def plain() -> Iterator[Visitor]:
    """A server of an application that answers `inside`."""
    app = PlainTextResponse("inside")
    with listening_socket(0) as listening, serving(app, listening, Visitor.token):
        yield Visitor(listening)


@pytest.fixture(scope="module")
def page() -> Iterator[Visitor]:
    sys.addaudithook(_note)
    app = application(Page())
    with listening_socket(0) as listening, serving(app, listening, Visitor.token):
        yield Visitor(listening)


def test_the_token_is_left_as_a_cookie_and_not_in_the_address(plain: Visitor) -> None:
    status, headers, _ = plain.get(f"/?token={plain.token}")
    assert (status, headers["location"]) == (303, "/")
    assert headers["set-cookie"].startswith(f"cavmae-{plain.port}={plain.token};")
    assert {"httponly", "samesite=strict"} <= set(headers["set-cookie"].lower().split("; "))
    status, headers, text = plain.get("/", **plain.cookie)
    assert (status, text) == (200, "inside")
    assert "default-src 'self'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/", "/?token=", "/?token=guess", "/?token=%C3%A9", "/gradio_api/info"]
)
def test_nothing_is_answered_without_the_token(plain: Visitor, path: str) -> None:
    status, _, text = plain.get(path)
    assert status == 401 and "inside" not in text
    assert plain.get(path, Cookie=f"cavmae-{plain.port}=guess")[0] == 401


def test_a_name_that_resolves_to_this_machine_is_no_way_in(plain: Visitor) -> None:
    for host in (
        f"evil.example:{plain.port}",
        "127.0.0.1",
        "evil.example",
        f"127.0.0.1:{plain.port}.evil.example",
    ):
        assert plain.get(f"/?token={plain.token}", Host=host)[0] == 403
    assert plain.get("/", **plain.cookie, Host=f"localhost:{plain.port}")[0] == 200


def test_a_page_on_another_port_is_another_origin(plain: Visitor) -> None:
    here = f"http://127.0.0.1:{plain.port}"
    for origin in (
        "http://127.0.0.1:1",
        "null",
        "https://evil.example",
        f"http://localhost:{plain.port}",
    ):
        assert plain.get("/", **plain.cookie, Origin=origin)[0] == 403
    assert plain.get("/", **plain.cookie, Origin=here)[0] == 200


def test_a_port_that_is_taken_is_named(plain: Visitor) -> None:
    with pytest.raises(OSError, match=f"port {plain.port} can't be used .*--port"):
        listening_socket(plain.port)


def test_the_page_loads_nothing_from_elsewhere(page: Visitor) -> None:
    _, _, html = page.get("/", **page.cookie)
    loaded = re.findall(
        r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?([^\"'\s>]+)", html
    )
    assert (
        loaded
        and [
            one
            for one in loaded
            if re.match(r"(\w+:)?//", one) and f"127.0.0.1:{page.port}" not in one
        ]
        == []
    )
    _, _, style = page.get("/theme.css", **page.cookie)
    assert "--" in style and not re.search(r"url\([\"']?(\w+:)?//|@import", style)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../etc/passwd",
        "pyproject.toml",
        "%2fetc%2fpasswd",
        "http://127.0.0.1:1/",
    ],
)
def test_no_file_of_this_machine_is_served(page: Visitor, path: str) -> None:
    for route in (
        f"/gradio_api/file={path}",
        f"/gradio_api/file/{path}",
        f"/file={path}",
        f"/static/{path}",
        f"/assets/{path}",
    ):
        status, _, text = page.get(route, **page.cookie)
        assert status in (403, 404) and "root:" not in text and "cavmae" not in text


def test_a_picture_with_a_script_is_not_shown_as_a_page(page: Visitor) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.svg"\r\n'
        b"Content-Type: image/svg+xml\r\n\r\n<svg onload='alert(1)'/>\r\n--x--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert page.post("/gradio_api/upload", body, **kind)[0] == 401
    (path,) = json.loads(page.post("/gradio_api/upload", body, **kind, **page.cookie)[2])
    status, headers, text = page.get(f"/gradio_api/file={path}", **page.cookie)
    assert status == 200 and "<svg" in text
    assert headers["content-disposition"].startswith("attachment")


def test_the_page_fetches_no_url_for_others(page: Visitor) -> None:
    url = "http://elsewhere.invalid/a.png"
    for route in (f"/gradio_api/proxy={url}", f"/gradio_api/file={url}"):
        assert page.get(route, **page.cookie)[0] in (400, 403, 404)
    config = json.loads(page.get("/config", **page.cookie)[2])
    takes_file = next(
        one["id"]
        for one in config["dependencies"]
        if any(config_of(config, part) == "file" for part in one["inputs"])
    )
    given = {"data": [{"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}]}
    body = json.dumps(given | {"fn_index": takes_file, "session_hash": "x"}).encode()
    json_type = {"Content-Type": "application/json"}
    page.post("/gradio_api/queue/join", body, **json_type, **page.cookie)
    page.post("/gradio_api/run/predict", body, **json_type, **page.cookie)
    assert [one for one in SOUGHT if "elsewhere" in str(one) or "dns" in str(one)] == []


def config_of(config: dict[str, Any], part: int) -> str:
    return next(one["type"] for one in config["components"] if one["id"] == part)


def test_the_server_tells_nobody_of_its_use(page: Visitor) -> None:
    config = json.loads(page.get("/config", **page.cookie)[2])
    assert config["analytics_enabled"] is False and config["run_history"] is False
    assert ("127.0.0.1", page.port) in SOUGHT  # by this test
    hosts = {one[0] for one in SOUGHT if isinstance(one, tuple)}
    assert hosts <= {"127.0.0.1", "localhost", "::1", None}
