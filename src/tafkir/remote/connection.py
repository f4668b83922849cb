"""One server over HTTP: JSON in, JSON out, a deadline for every exchange, and errors that name the server."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx

from tafkir.errors import RolloutError

__all__ = ["Connection", "FailureKind", "NotJsonError", "StatusError", "TransientError"]

FailureKind = Literal["down", "late", "busy", "aborted"]

# What a server says while it is overloaded, restarting or loading weights.
_BUSY = frozenset({429, 500, 502, 503, 504})
_CONNECT_S = 10.0
_SHOWN = 300


class TransientError(RolloutError):
    """An exchange failed in a way that another attempt, or another server, may not.

    Attributes:
        kind: "down" (no connection, or it broke), "late" (no whole answer in time), "busy" (an HTTP status that says
            so), "aborted" (the server gave the request up).
        pause_s: how long the server asks to wait (`Retry-After`); 0 where it does not say.
    """

    def __init__(
        self, kind: FailureKind, what: str, *, where: str, fix: str | None = None, pause_s: float = 0.0
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.kind: FailureKind = kind
        self.pause_s = pause_s


class StatusError(RolloutError):
    """The server refuses a request, and will again."""

    def __init__(self, status: int, what: str, *, where: str, fix: str | None = None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.status = status


class NotJsonError(RolloutError):
    """The server answers something else than JSON, such as the page of a proxy."""


class Connection:
    """Talks to one server; any number of threads may share it.

    Args:
        url: such as `http://node7:8000`, without a path.
        timeout_s: how long an exchange may take from its start to the last byte of the answer.
        max_concurrency: most connections that stay open.
        api_key: sent as a bearer token.
        through_proxy: take the machine's proxy settings, which are for servers on the outside.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        max_concurrency: int = 64,
        api_key: str | None = None,
        through_proxy: bool = False,
    ) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        limits = httpx.Limits(max_connections=max_concurrency + 4, max_keepalive_connections=max_concurrency + 4)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=self.url, limits=limits, headers=headers, trust_env=through_proxy)

    def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The JSON at a path; see `post` for the errors."""
        return self._exchange("GET", path, None, timeout_s)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON that answers a body, None where the answer is empty.

        Raises:
            TransientError: no connection, no whole answer in time, or a status that says "later".
            RolloutError: any other error status (with what the server said of it), or an answer that is not JSON.
        """
        return self._exchange("POST", path, body, timeout_s, headers)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        limit = self.timeout_s if timeout_s is None else timeout_s
        where = f"{self.url}{path}"
        began = time.monotonic()
        timeout = httpx.Timeout(limit, connect=min(limit, _CONNECT_S))
        try:
            with self._client.stream(method, path, json=body, timeout=timeout, headers=headers) as response:
                content = b""
                for chunk in response.iter_bytes():
                    content += chunk
                    # httpx limits the wait for each piece; a server that trickles would never be late.
                    if time.monotonic() - began > limit:
                        raise httpx.ReadTimeout("the answer is not complete")
        except httpx.TimeoutException as error:
            raise TransientError(
                "late",
                f"no answer within {limit:g} s",
                where=where,
                fix="look at the server's log and load, or raise timeout_s",
            ) from error
        except httpx.TransportError as error:
            raise TransientError(
                "down",
                f"the connection failed ({error or type(error).__name__})",
                where=where,
                fix="look whether the server still runs",
            ) from error
        return _read(response, content, where)


def _read(response: httpx.Response, content: bytes, where: str) -> Any:
    status = response.status_code
    try:
        answer = json.loads(content) if content.strip() else None
    except ValueError:
        answer = content.decode("utf-8", "replace")
        if status < 400:
            raise NotJsonError(
                f"the answer is not JSON: {answer[:_SHOWN]!r}", where=where, fix="is this the server's address?"
            ) from None
    if status in _BUSY:
        what = f"status {status}: {_message(answer)}"
        raise TransientError("busy", what, where=where, pause_s=_retry_after(response))
    if status >= 400:
        raise StatusError(status, f"status {status}: {_message(answer)}", where=where, fix=_hint(status))
    return answer


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, given as a number or as a date; 0 where it says neither."""
    said = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return 0.0


def _message(answer: Any) -> str:
    """What a server says of an error, wherever its dialect puts it."""
    for key in ("error", "message", "detail"):
        if isinstance(answer, Mapping) and answer.get(key):
            answer = answer[key]
    return str(answer or "no explanation")[:_SHOWN]


def _hint(status: int) -> str | None:
    if status in (401, 403):
        return "name the environment variable with the server's key in api_key_env"
    return "docs/scale-out.md says how to start the server" if status in (404, 405) else None
