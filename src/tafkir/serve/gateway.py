"""What every request passes before the API sees it: id, key, rate, a full queue, and a body that came whole."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from tafkir.serve.access import ApiKeys, RateLimiter
from tafkir.serve.admin import ADMIN_PATHS
from tafkir.serve.errors import ApiError, error_of, error_response
from tafkir.serve.options import ServerOptions
from tafkir.serve.page import PAGE_FILES
from tafkir.serve.worker import EngineWorker, Overloaded, Stopped

__all__ = ["EarlyRefusal", "Gateway"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_GENERATES = re.compile(rb"POST /v1/(?:chat/completions|completions|responses) HTTP/1\.1\r\n")
_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*")
# Whoever sends these is framed, waited for or told in another way.
_NOT_PLAIN = frozenset({b"origin", b"expect", b"transfer-encoding", b"upgrade"})
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Open to probes and scrapers, which carry no key; the page and what it is made of are no secret either.
_OPEN = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/favicon.ico"})
# A client that still sends would not read the answer: this many times the limit is read and thrown away first.
_DISCARD = 16


class Gateway:
    """ASGI middleware around the whole application.

    Args:
        app: what it guards.
        options: keys and limits.
        worker: asked whether its queue is full, and told of HTTP statuses.
    """

    def __init__(self, app: App, options: ServerOptions, worker: EngineWorker) -> None:
        self._app, self._options, self._worker = app, options, worker
        self._admin = ApiKeys((options.admin_key,) if options.admin_key else ())
        self._keys = _keys(options)
        self._limiter = RateLimiter(options.requests_per_minute)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._worker.metrics.responses.add(str(message["status"]))
            await send(message)

        try:
            self._admit(scope, headers)
            receive = await self._whole_body(headers, receive)
        except (ApiError, Overloaded, Stopped) as error:
            await error_response(error_of(error))(scope, receive, reply)
            return
        except _Left:
            return
        await self._app(scope, receive, reply)

    def _admit(self, scope: MutableMapping[str, Any], headers: Headers) -> None:
        """Everything that can be refused without reading the body.

        Raises:
            ApiError: 401 without a known key, 403 for a change that another machine asks for, 429 above the rate.
            Overloaded, Stopped: nothing can be taken.
        """
        if scope["path"] in _OPEN or scope["path"].startswith(PAGE_FILES) or scope["method"] == "OPTIONS":
            return
        client = scope.get("client")
        if self._admin and scope["path"] in ADMIN_PATHS:
            self._admit_admin(client[0] if client else None, headers)
            return
        caller: str | None = client[0] if client else "local"
        if self._keys:
            caller = self._keys.caller(headers.get("authorization", ""))
        if caller is None:
            message = "a known API key must come as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key")
        if scope["method"] != "POST":
            return
        if wait := self._limiter.take(caller):
            limit = self._options.requests_per_minute
            message = f"more than {limit} requests a minute; try again in {wait:.1f} s"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait)
        self._worker.check_open()

    def _admit_admin(self, host: str | None, headers: Headers) -> None:
        if host is not None and not self._options.admin_remote and not ip_address(host).is_loopback:
            message = "this path is open to the server's own machine alone (--admin-remote opens it)"
            raise ApiError(403, message, code="forbidden")
        if self._admin.caller(headers.get("authorization", "")) is None:
            raise ApiError(401, "the admin key must come as `Authorization: Bearer KEY`", code="invalid_api_key")

    async def _whole_body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the body up to the limit, in time; what hands it on afterwards.

        Raises:
            ApiError: 400 for one that is too large, 408 for one that is too slow.
        """
        limit, timeout_s = self._options.max_body_bytes, self._options.body_timeout_s
        chunks, size = [], 0
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit * _DISCARD:
            raise _too_large(int(declared), limit)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size <= limit:
                        chunks.append(chunk)
                    if not message.get("more_body", False) or size > limit * _DISCARD:
                        break
        except TimeoutError:
            message_text = f"the body did not come within {timeout_s:g} s ({size} bytes did)"
            raise ApiError(408, message_text, code="request_timeout") from None
        if size > limit:
            raise _too_large(size, limit)
        body: list[Message] = [{"type": "http.request", "body": _text_only(b"".join(chunks)), "more_body": False}]

        async def replay() -> Message:
            return body.pop() if body else await receive()

        return replay


class EarlyRefusal:
    """Tells those whom a full server cannot take from the first bytes of their request, before anything parses them.

    A crowd that is refused costs little then of the interpreter that it shares with those who are served. Whatever is
    not plain (another key, a limited rate, a page of another origin, a body in chunks, a head that is not whole yet or
    that h11 may read in another way) is left to h11 and the `Gateway`: both must agree where a request ends.

    Args:
        options: keys and limits.
        worker: asked whether it is full, and told of HTTP statuses.
    """

    def __init__(self, options: ServerOptions, worker: EngineWorker) -> None:
        self._worker, self._keys, self._off = worker, _keys(options), bool(options.requests_per_minute)
        self._most = options.max_body_bytes

    @property
    def due(self) -> bool:
        return self._worker.full and not self._off

    def answer(self, data: bytes) -> tuple[bytes, int, bool] | None:
        """The whole answer to a request, how many bytes of its body are still to come, and whether the connection ends
        with it; None where others answer."""
        head, end, body = data.partition(b"\r\n\r\n")
        if not end or not _GENERATES.match(head):
            return None
        given = head.split(b"\r\n")[1:]
        fields = {name.lower(): value.strip() for name, _, value in (field.partition(b":") for field in given)}
        if len(fields) < len(given) or fields.keys() & _NOT_PLAIN or not all(map(_FIELD.fullmatch, given)):
            return None
        length = fields.get(b"content-length", b"")
        missing = int(length) - len(body) if length.isdigit() and len(length) < 10 else -1
        if missing < 0 or missing > self._most:
            return None
        if self._keys and self._keys.caller(fields.get(b"authorization", b"").decode("latin-1")) is None:
            return None
        try:
            self._worker.check_open()
        except Overloaded as error:
            response = error_response(error_of(error))
        except Stopped:
            return None
        else:
            return None
        self._worker.metrics.responses.add("503")
        request_id = _request_id(fields.get(b"x-request-id", b"").decode("latin-1"))
        close = fields.get(b"connection", b"").lower() == b"close"
        headers = [*response.raw_headers, (b"x-request-id", request_id.encode())]
        headers += [(b"connection", b"close")] if close else []
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        return b"HTTP/1.1 503 Service Unavailable\r\n%b\r\n%b" % (lines, bytes(response.body)), missing, close


def _keys(options: ServerOptions) -> ApiKeys:
    """Who may ask; whoever may change the server may, too."""
    return ApiKeys((*options.api_keys, options.admin_key or options.api_keys[0]) if options.api_keys else ())


def _request_id(given: str) -> str:
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


class _Left(Exception):
    """The client closed the connection before its request was whole."""


def _text_only(body: bytes) -> bytes:
    """The body with U+FFFD for halves of surrogate pairs, which JSON can spell and UTF-8 cannot hold."""
    if not _SURROGATE.search(body):
        return body
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False)
    except (ValueError, RecursionError):  # no JSON: the API's own parser says so
        return body
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _too_large(size: int, limit: int) -> ApiError:
    return ApiError(400, f"the body has {size} bytes or more; at most {limit} are read", code="request_too_large")
