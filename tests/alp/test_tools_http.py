"""The client of a code service, tested against a small server on the loopback interface."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from alp.config import ToolsConfig, TrainConfig
from alp.errors import UserError
from alp.setup import make_tool
from alp.tools import http
from alp.tools.http import AUTHORIZATION, HttpTool
from alp.tools.tool import MAX_OUTPUT

Answer = tuple[int, bytes]


class Service(ThreadingHTTPServer):
    """Answers a request with what `answer` returns; records requests, headers and how many came at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[dict[str, Any]], Answer] = honest
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.lock, self.at_once, self.most = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/faas/sandbox/?v=1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_POST(self) -> None:
        service = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with service.lock:
            service.requests.append({"path": self.path, **request})
            service.authorizations.append(self.headers["Authorization"])
            service.at_once += 1
            service.most = max(service.most, service.at_once)
        number, body = service.answer(request)
        with service.lock:
            service.at_once -= 1
        self.send_response(number)
        self.send_header("Content-Length", str(len(body)))
        if number == 302:
            self.send_header("Location", f"http://localhost:{service.server_address[1]}/elsewhere")
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that gave up
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def said(status: str, stdout: str = "", stderr: str = "", /, **more: Any) -> Answer:
    return 200, json.dumps({"status": status, "run_result": {"stdout": stdout, "stderr": stderr, **more}}).encode()


def honest(request: dict[str, Any]) -> Answer:
    return said("success", "42\n" if request["code"] == "print(6 * 7)" else f"ran {request['code']}\n")


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def client(service: Service, **changes: Any) -> HttpTool:
    return HttpTool(service.url, **{"timeout": 1.0, "concurrency": 4, "pause_s": 0.01, **changes})


def test_a_request_is_what_such_services_read(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTHORIZATION, raising=False)
    tool = client(service)
    tool.check()
    results = tool.run([f"x{i}" for i in range(20)])
    assert [(r.status, r.stdout) for r in results] == [("ok", f"ran x{i}\n") for i in range(20)]
    assert service.requests[0] == {
        "path": "/faas/sandbox/?v=1",
        "code": "print(6 * 7)",
        "stdin": "",
        "language": "python",
        "compile_timeout": 1.0,
        "run_timeout": 1.0,
    }
    assert set(service.authorizations) == {None}


def test_the_secret_travels_in_the_header_and_stands_in_no_file(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AUTHORIZATION, "Bearer s3cret\n")
    config = ToolsConfig(max_turns=2, tool="http", url=service.url)
    tool = make_tool(config)
    tool.run(["x"])
    assert set(service.authorizations) == {"Bearer s3cret"}
    assert "s3cret" not in TrainConfig(tools=config).to_json()
    monkeypatch.setenv(AUTHORIZATION, "Bearer s3c\nret")
    with pytest.raises(UserError) as caught:
        client(service)
    assert AUTHORIZATION in str(caught.value) and "s3c" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (said("success", "1\n"), ("ok", "1\n", "")),
        (said("Success", "1\n", "a warning\n", status="Finished", return_code=0), ("ok", "1\n", "")),
        (said("runtime_error", "a\n", "Traceback\nValueError: no\n"), ("error", "a\n", "ValueError: no")),
        (said("Failed", "", "MemoryError\n", status="Finished", return_code=1), ("memory", "", "MemoryError")),
        (said("Failed", "", "", status="Finished", return_code=1), ("error", "", "failed")),
        (said("timeout"), ("timeout", "", "TimeoutError: the code ran too long")),
        (said("Failed", "a", status="TimeLimitExceeded"), ("timeout", "a", "TimeoutError: the code ran too long")),
        ((200, b'{"status": "success", "run_result": null}'), ("ok", "", "")),
        ((401, b"who are you?"), ("refused", "", "HTTP 401: who are you?")),
        ((422, b"x" * 99999), ("refused", "", "HTTP 422: " + "x" * 500)),
    ],
)
def test_what_services_answer(service: Service, answer: Answer, expected: tuple[str, str, str]) -> None:
    service.answer = lambda request: answer
    (result,) = client(service).run(["x"])
    assert result[:3] == expected and len(service.requests) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((503, b""), "HTTP 503"),
        ((429, b""), "HTTP 429"),
        ((200, b"<html>hello</html>"), "malformed"),
        ((200, b"[1, 2]"), "malformed"),
        ((200, b"[" * 100000), "malformed"),
        ((200, b"\xff\xfe\x00"), "malformed"),
        ((200, b"{}"), "malformed answer: its status is None"),
        ((200, b'{"status": "success", "run_result": {"stdout": 3}}'), "malformed"),
        ((200, b'{"status": "success", "run_result": [1]}'), "malformed"),
        ((200, b'{"status": "SandboxError", "message": "no pod"}'), "the service failed: no pod"),
    ],
)
def test_a_service_that_fails_is_asked_again_and_then_called_crashed(
    service: Service, answer: Answer, reason: str
) -> None:
    service.answer = lambda request: answer if len(service.requests) < 3 else honest(request)
    (result,) = client(service).run(["x"])
    assert result[:2] == ("ok", "ran x\n") and len(service.requests) == 3
    service.answer = lambda request: answer
    (result,) = client(service).run(["x"])
    assert result.status == "crashed" and reason in result.error and "4 tries" in result.error
    assert len(service.requests) == 7


def test_pauses_grow(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(http.time, "sleep", pauses.append)
    service.answer = lambda request: (503, b"")
    client(service, pause_s=1.0).run(["x"])
    assert [0.5 * 2**i <= pause <= 1.5 * 2**i for i, pause in enumerate(pauses)] == [True] * 3


def test_no_more_scripts_than_allowed_run_at_once(service: Service) -> None:
    def slow(request: dict[str, Any]) -> Answer:
        time.sleep(0.02)
        return honest(request)

    service.answer = slow
    client(service, concurrency=3).run(["x"] * 30)
    assert service.most == 3


def test_a_silent_a_dribbling_and_a_flooding_service_do_not_hang(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_ANSWER_S", 0.1)
    monkeypatch.setattr(http, "_TRIES", 2)
    is_over = threading.Event()

    def silent(request: dict[str, Any]) -> Answer:
        is_over.wait(20)
        return honest(request)

    service.answer = silent
    start = time.monotonic()
    results = client(service, timeout=0.1).run(["x", "y"])
    is_over.set()
    assert [r.status for r in results] == ["crashed"] * 2 and time.monotonic() - start < 5
    service.answer = lambda request: (200, b" " * (20 * MAX_OUTPUT))
    (result,) = client(service).run(["x"])
    assert result.status == "crashed" and "more than" in result.error

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def dribble() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                try:
                    for _ in range(1000):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    continue

        threading.Thread(target=dribble, daemon=True).start()
        slow = HttpTool(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.1, concurrency=1, pause_s=0.01)
        (result,) = slow.run(["x"])
        assert result.status == "crashed" and "took longer than" in result.error


def test_redirects_are_not_followed(service: Service) -> None:
    service.answer = lambda request: (302, b"")
    (result,) = client(service).run(["x"])
    assert result.status == "refused" and "302" in result.error
    assert [request["path"] for request in service.requests] == ["/faas/sandbox/?v=1"]


def test_a_connection_that_the_service_closed_is_opened_again(service: Service) -> None:
    tool = client(service, concurrency=1)
    assert tool.run(["x"])[0].status == "ok"
    tool._threads.submit(lambda: tool._local.connection.sock.shutdown(socket.SHUT_RDWR)).result()
    assert tool.run(["y"])[0][:2] == ("ok", "ran y\n")


def test_an_unreachable_or_wrong_service_is_known_before_training(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(HttpTool.__init__, "__kwdefaults__", {"timeout": 1.0, "concurrency": 1, "pause_s": 0.01})
    with pytest.raises(UserError, match=rf"tools.url='http://127.0.0.1:{port}/' cannot be used: crashed: .*refused"):
        make_tool(ToolsConfig(max_turns=2, tool="http", url=f"http://127.0.0.1:{port}/"))
    service.answer = lambda request: (403, b"no")
    with pytest.raises(UserError, match="refused: HTTP 403: no"):
        make_tool(ToolsConfig(max_turns=2, tool="http", url=service.url))
    service.answer = lambda request: said("success", "41")
    with pytest.raises(UserError, match="printed '41'"):
        make_tool(ToolsConfig(max_turns=2, tool="http", url=service.url))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tool": "http"}, "tools.url=None"),
        ({"tool": "http", "url": "ftp://host/"}, "tools.url='ftp://host/'"),
        ({"tool": "http", "url": "http://"}, "tools.url"),
        ({"tool": "http", "url": "http://me:secret@host/"}, "without a password"),
        ({"tool": "http", "url": "http://host:port/"}, "tools.url"),
        ({"url": "http://host/"}, "tools.tool=http"),
        ({"timeout": 0}, "tools.timeout=0"),
        ({"max_turns": -1}, "tools.max_turns=-1"),
    ],
)
def test_a_configuration_that_cannot_serve_names_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=re.escape(field)):
        TrainConfig(tools=ToolsConfig(**changes))
