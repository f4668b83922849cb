"""Runs the HTTP server on one address until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tafkir.errors import BackendUnavailable
from tafkir.serve.canaries import Canaries, CanaryOptions
from tafkir.serve.options import ServerOptions

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tafkir.serve.gateway import EarlyRefusal

__all__ = ["HttpServer", "serve"]

logger = logging.getLogger(__name__)


def serve(
    checkpoint: Path | str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    model_name: str | None = None,
    max_batch: int = 32,
    max_context: int | None = None,
    max_cache_bytes: int | None = None,
    kv_cache: Literal["auto", "fp8", "nvfp4"] = "auto",
    speculate: str | None = None,
    weights: Literal["auto", "float32", "stored", "int8-head"] = "auto",
    prefix_caching: bool = True,
    batch_invariant: bool = False,
    device: str = "cpu",
    four_bit_products: bool = False,
    max_queue: int = 256,
    num_threads: int | None = None,
    options: ServerOptions | None = None,
    canaries: CanaryOptions | None = None,
) -> None:
    """Serve a checkpoint until SIGINT or SIGTERM; then nothing more is taken, and what runs may finish.

    Args:
        checkpoint: a checkpoint folder with a tokenizer.
        host: address to listen on; the default is reachable from this machine alone.
        port: 0 takes a free one, which the log names.
        model_name, max_batch, max_context, max_cache_bytes, kv_cache, speculate, weights, prefix_caching,
            batch_invariant, device, four_bit_products, max_queue, num_threads, options: as in `build_app`.
        canaries: what the server asks itself in the background; None: nothing.

    Raises:
        BackendUnavailable: the address cannot be used.
        CheckpointError, DataError: the checkpoint or its tokenizer is missing or damaged.
        CapacityError: the sizes do not fit the model.
    """
    options = options or ServerOptions()
    questions = canaries.read() if canaries else None
    listener = _listen(host, port)
    try:
        with _without_collections():
            from tafkir.serve.app import build_app

            app = build_app(
                checkpoint,
                model_name=model_name,
                max_batch=max_batch,
                max_context=max_context,
                max_cache_bytes=max_cache_bytes,
                kv_cache=kv_cache,
                speculate=speculate,
                weights=weights,
                prefix_caching=prefix_caching,
                batch_invariant=batch_invariant,
                device=device,
                four_bit_products=four_bit_products,
                max_queue=max_queue,
                num_threads=num_threads,
                options=options,
            )
    except BaseException:
        listener.close()
        raise
    _announce(app.state.model_name, host, listener.getsockname()[1], options)
    asking = Canaries(app.state.live, *questions) if questions else None
    try:
        if asking is not None:
            asking.start()
        HttpServer(app, options).run(sockets=[listener])
    finally:
        if asking is not None:
            asking.stop()
        app.state.worker.stop()
        listener.close()


def _announce(model_name: str, host: str, port: int, options: ServerOptions) -> None:
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logger.info("%s: chat at %s, OpenAI API at %s/v1 (Ctrl-C stops)", model_name, address, address)
    if host not in ("127.0.0.1", "::1", "localhost") and not options.api_keys:
        logger.warning("%s is open to everyone who reaches it: --api-key asks for a key", address)


@contextmanager
def _without_collections() -> Iterator[None]:
    """What a start makes stays: looking for garbage among it costs the start, and later every full collection."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class HttpServer(uvicorn.Server):
    """Runs an app of `build_app`; told to stop, it finishes what it has, takes nothing more, and ends.

    Args:
        app: the application.
        options: limits, as the app got them.
        settings: further ones of uvicorn.
    """

    def __init__(self, app: FastAPI, options: ServerOptions, **settings: Any) -> None:
        from tafkir.serve.gateway import EarlyRefusal

        class Protocol(_PatientProtocol):
            head_timeout_s = options.body_timeout_s
            refusal = EarlyRefusal(options, app.state.worker)

        settings = {"log_level": "warning", "access_log": False, "server_header": False, **settings}
        grace_s = max(1, round(options.drain_s))
        super().__init__(uvicorn.Config(app, http=Protocol, timeout_graceful_shutdown=grace_s, **settings))
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.worker.drain()
        super().handle_exit(sig, frame)


class _Connection(h11.Connection):
    """Frames the chunks of a stream by itself: h11's way through its states takes longer than all else about them."""

    _chunked = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # one signature for its overloads
        if type(event) is h11.Data and self._chunked:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        out = super().send(event)
        if type(event) is h11.Response:
            self._chunked = out is not None and b"transfer-encoding: chunked" in out.lower()
        return out


class _PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose request head does not come in time (slow-loris), and refuses early."""

    head_timeout_s: float
    refusal: EarlyRefusal
    _late: asyncio.TimerHandle | None = None
    _unread = 0
    """Bytes of a refused body that are still to come."""
    _closes = False
    """Whether the connection ends with them."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = _Connection(h11.SERVER, 1 << 16)
        self._arm()

    def data_received(self, data: bytes) -> None:
        if self._unread:
            data = self._skip(data)
            if not data:
                return
        quick = self.refusal.due and not self.flow.write_paused and self._is_between_requests()
        if quick and (refused := self.refusal.answer(data)):
            self._refuse(*refused)
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._disarm()
        elif self._late is None and not self.transport.is_closing():
            self._arm()

    def _is_between_requests(self) -> bool:
        return set(self.conn.states.values()) == {h11.IDLE} and not self.conn.trailing_data[0]

    def _refuse(self, answer: bytes, unread: int, closes: bool) -> None:
        """Answer in the place of h11, which has seen nothing of the request and waits for the next one as before."""
        self._unset_keepalive_if_required()
        self._disarm()
        self._arm()
        self.server_state.total_requests += 1
        self._unread, self._closes = unread, closes
        self.transport.write(answer)
        self._skip(b"")

    def _skip(self, data: bytes) -> bytes:
        """What stands behind the rest of a refused body; a connection is closed only then, or its answer is lost."""
        skipped = min(len(data), self._unread)
        self._unread -= skipped
        if not self._unread:
            self._disarm()
            if self._closes:
                self.transport.close()
                return b""
            self._unset_keepalive_if_required()
            seconds = self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)
        return data[skipped:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._late = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def _listen(host: str, port: int) -> socket.socket:
    """Bind before the model is loaded, so that a taken port is told at once."""
    where = f"{host}:{port}"
    if not 0 <= port < 65536:  # getaddrinfo would take it modulo 65536
        raise BackendUnavailable("there is no such port", where=where, expected="0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        what = f"the address cannot be used ({error})"
        raise BackendUnavailable(what, where=where, fix="try --host 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        what = "the port is in use" if taken else f"the address cannot be used ({error.strerror})"
        raise BackendUnavailable(what, where=where, fix="choose another, such as --port 0 for any free one") from None
    return listener
