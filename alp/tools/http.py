"""Client of a SandboxFusion-compatible service, which runs full Python (sympy included) in its own sandbox.

    POST url {code, stdin, language, compile_timeout, run_timeout} -> {status, run_result: {stdout, stderr, ...}}

The value of the Authorization header comes from the environment, never from a file. A failed request is retried after
a growing, random pause. Redirects are not followed: they would pass on the header.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import UserError
from .tool import MAX_OUTPUT, Status, ToolResult, last_line, refusal

AUTHORIZATION = "ALP_TOOLS_AUTHORIZATION"
_TRIES = 4
_PAUSE_S = 0.5  # before the second try; doubles
_ANSWER_S = 10.0  # wait beyond the script's own time limit, for a service that queues
_MAX_ANSWER = 16 * MAX_OUTPUT  # bytes
_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class _Failure(Exception):
    """The service failed; another try may help."""


class HttpTool:
    """Runs scripts on a service, up to `concurrency` at once."""

    def __init__(self, url: str, *, timeout: float = 2.0, concurrency: int = 32, pause_s: float = _PAUSE_S) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None  # the configuration was checked
        self._url, self._timeout, self._pause_s = url, timeout, pause_s
        self._is_tls, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if AUTHORIZATION in os.environ:
            self._headers["Authorization"] = os.environ[AUTHORIZATION].strip()
            if not (self._headers["Authorization"].isascii() and self._headers["Authorization"].isprintable()):
                raise UserError(f"{AUTHORIZATION} holds characters that no HTTP header can carry")
        self._jitter = random.Random()  # separate from the training's random state
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="alp-tool")
        self._local = threading.local()  # one connection per thread

    def check(self) -> None:
        """Run one script before training; raises a UserError that says why the service cannot be used."""
        result = self._run("print(6 * 7)")
        if result.status != "ok" or result.stdout.strip() != "42":
            found = result.error or f"print(6 * 7) printed {result.stdout[:80]!r}"
            raise UserError(f"tools.url={self._url!r} cannot be used: {result.status}: {found}")

    def run(self, codes: list[str]) -> list[ToolResult]:
        return list(self._threads.map(self._run, codes))

    def _run(self, code: str) -> ToolResult:
        refused = refusal(code)
        if refused is not None:
            return refused
        start, reason = time.monotonic(), ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self._pause_s * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.5))
            try:
                status, stdout, error = self._ask(code)
            except _Failure as failure:
                reason = str(failure)
                continue
            return ToolResult(status, stdout[:MAX_OUTPUT], error, time.monotonic() - start)
        return ToolResult("crashed", "", f"{reason} ({_TRIES} tries)", time.monotonic() - start)

    def _ask(self, code: str) -> tuple[Status, str, str]:
        """Send one request; returns the status, stdout and the last line of the error."""
        request = {
            "code": code,
            "stdin": "",
            "language": "python",
            "compile_timeout": self._timeout,
            "run_timeout": self._timeout,
        }
        try:
            number, body = self._post(json.dumps(request).encode())
        except (OSError, http.client.HTTPException) as error:
            self._close()
            raise _Failure(f"no answer: {type(error).__name__}: {error}") from None
        if number in _AGAIN:
            raise _Failure(f"HTTP {number}")
        if number != 200:
            return "refused", "", f"HTTP {number}: {last_line(body[:500].decode(errors='replace'))}"
        try:
            return _read(json.loads(body))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _Failure(f"malformed answer: {error}") from None

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """POST over this thread's connection; reconnects if the service has closed a kept-alive one."""
        for is_kept in (True, False):
            connection = getattr(self._local, "connection", None)
            if connection is None:
                kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
                connection = kind(self._host, self._port, timeout=self._timeout + _ANSWER_S)
                self._local.connection, is_kept = connection, False
            try:
                connection.request("POST", self._path, body, self._headers)
                response = connection.getresponse()
                answer = _read_body(response, self._timeout + _ANSWER_S)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self._close()
                if not is_kept:
                    raise
                continue
            return response.status, answer
        raise AssertionError("a new connection returns or raises")

    def _close(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None


def _read_body(response: http.client.HTTPResponse, seconds: float) -> bytes:
    """Read the whole body within a size and a time limit; a socket's own timeout restarts with every byte."""
    deadline, body = time.monotonic() + seconds, b""
    while piece := response.read1(1 << 16):
        body += piece
        if len(body) > _MAX_ANSWER:
            raise http.client.HTTPException(f"more than {_MAX_ANSWER} bytes")
        if time.monotonic() > deadline:
            raise http.client.HTTPException(f"the response took longer than {seconds:g} s")
    response.close()  # read1 does not mark the response as done, and the connection would reject its next request
    return body


def _read(answer: dict[str, Any]) -> tuple[Status, str, str]:
    """Parse a service's answer, with SandboxFusion's own statuses or success | timeout | runtime_error."""
    said = str(answer.get("status")).lower()
    result = answer.get("run_result") or {}
    stdout, stderr = result.get("stdout") or "", result.get("stderr") or ""
    if not isinstance(stdout, str) or not isinstance(stderr, str):
        raise TypeError("run_result.stdout and .stderr are not text")
    ended = str(result.get("status") or "").lower()
    if said == "timeout" or ended == "timelimitexceeded":
        return "timeout", stdout, "TimeoutError: the code ran too long"
    if said == "success":
        return "ok", stdout, ""
    if said in ("failed", "runtime_error", "error"):
        error = last_line(stderr) or last_line(str(answer.get("message") or "")) or "failed"
        return ("memory" if error.startswith("MemoryError") else "error"), stdout, error
    if said == "sandboxerror":
        raise _Failure(f"the service failed: {last_line(str(answer.get('message') or ''))[:200]}")
    raise ValueError(f"its status is {answer.get('status')!r}")
