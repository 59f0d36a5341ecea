"""HTTP requests with one deadline for all of a request, over connections that are kept."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

#: Bytes read at a time.
_CHUNK = 1 << 16


class TransportError(Exception):
    """No answer came, or not all of it: the connection failed, was too slow, or broke off."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, whatever its status."""

    status: int
    retry_after: float | None  # seconds
    body: bytes


class Endpoint:
    """A URL that takes POST requests.

    Idle connections are kept, the one used last first. A server may close one at any time, so a request that fails on
    a kept connection before its answer begins is sent again on another. Proxies of the environment and redirects are
    not followed. Safe for several threads.

    Args:
        url: http:// or https://.
        connect_timeout: seconds to be connected.
        max_bytes: largest body of an answer.
        max_idle: connections that are kept.
    """

    def __init__(self, url: str, *, connect_timeout: float, max_bytes: int, max_idle: int = 64) -> None:
        parts = urlsplit(url)
        if parts.username is not None or parts.fragment:  # not shown: it may be a password
            raise ValueError("url must have no user name, password or fragment")
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise ValueError(f"url is {url!r}; it must be http://HOST[:PORT]/PATH or https://..., in ASCII")
        try:
            self.host, self.port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"url is {url!r}: {error}") from error
        self.context = ssl.create_default_context() if parts.scheme == "https" else None
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.connect_timeout = connect_timeout
        self.max_bytes = max_bytes
        self.max_idle = max_idle
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()

    def post(self, body: bytes, headers: dict[str, str], timeout: float) -> Reply:
        """The answer to a POST of `body`, all of it within `timeout` seconds. Raises TransportError."""
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                kept = self._idle.pop() if self._idle else None
            connection = kept or self._connect(deadline)
            try:
                response = connection.send(self.target, body, headers, deadline)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if kept is None or isinstance(error, TimeoutError):
                    raise TransportError(_said(error)) from error
                continue
            return self._read(connection, response)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connect(self, deadline: float) -> _Connection:
        timeout = min(self.connect_timeout, max(0.001, deadline - time.monotonic()))
        try:
            return _Connection(self.host, self.port, timeout, self.context)
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(f"no connection: {_said(error)}") from error

    def _read(self, connection: _Connection, response: http.client.HTTPResponse) -> Reply:
        whole = False
        try:
            body = bytearray()
            while len(body) <= self.max_bytes and (chunk := response.read(_CHUNK)):
                body += chunk
            if len(body) > self.max_bytes:
                raise TransportError(f"the answer is larger than {self.max_bytes} bytes")
            if response.length:  # read() does not complain
                raise TransportError(f"the answer broke off {response.length} bytes before its end")
            whole = not response.will_close
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(f"the answer broke off: {_said(error)}") from error
        finally:
            if not (whole and self._keep(connection)):
                connection.close()
        after = response.headers.get("Retry-After", "")
        return Reply(response.status, float(after) if after.isdecimal() else None, bytes(body))

    def _keep(self, connection: _Connection) -> bool:
        with self._lock:
            if len(self._idle) >= self.max_idle:
                return False
            self._idle.append(connection)
        return True


class _Connection:
    """A connection each of whose operations gets the time that is left until a deadline: a socket's own timeout is for
    one operation, which a server that sends a byte a second never exceeds."""

    def __init__(self, host: str, port: int | None, timeout: float, context: ssl.SSLContext | None) -> None:
        self.http: http.client.HTTPConnection
        if context is None:
            self.http = http.client.HTTPConnection(host, port, timeout=timeout)
        else:
            self.http = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        self.http.connect()
        self.timed = _TimedSocket(self.http.sock)
        self.http.sock = cast(socket.socket, self.timed)

    def send(self, target: str, body: bytes, headers: dict[str, str], deadline: float) -> http.client.HTTPResponse:
        self.timed.deadline = deadline
        self.http.request("POST", target, body, headers)
        return self.http.getresponse()

    def close(self) -> None:
        self.http.close()


class _TimedSocket:
    """As much of a socket as `http.client` uses."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline = 0.0

    def arm(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.sock.settimeout(left)

    def sendall(self, data: Any) -> None:
        self.arm()  # covers all of it
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_TimedReader(self, self.sock.makefile("rb", buffering=0)))

    def close(self) -> None:
        self.sock.close()


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _TimedSocket, raw: socket.SocketIO) -> None:
        self.timed, self.raw = timed, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.timed.arm()
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
