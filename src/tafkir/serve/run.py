"""Runs the HTTP server on one address until it is told to stop."""

from __future__ import annotations

import errno
import logging
import socket
from pathlib import Path
from typing import Literal

from tafkir.errors import BackendUnavailable

__all__ = ["serve"]

logger = logging.getLogger(__name__)

_GRACE_S = 5


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
    max_queue: int = 256,
    num_threads: int | None = None,
) -> None:
    """Serve a checkpoint until SIGINT or SIGTERM; running requests get a few seconds to finish.

    Args:
        checkpoint: a checkpoint folder with a tokenizer.
        host: address to listen on; the default is reachable from this machine alone, and there is no password.
        port: 0 takes a free one, which the log names.
        model_name, max_batch, max_context, max_cache_bytes, kv_cache, max_queue, num_threads: as in `build_app`.

    Raises:
        BackendUnavailable: the address cannot be used.
        CheckpointError, DataError: the checkpoint or its tokenizer is missing or damaged.
        CapacityError: the sizes do not fit the model.
    """
    import uvicorn

    from tafkir.serve.app import build_app

    listener = _listen(host, port)
    try:
        app = build_app(
            checkpoint,
            model_name=model_name,
            max_batch=max_batch,
            max_context=max_context,
            max_cache_bytes=max_cache_bytes,
            kv_cache=kv_cache,
            max_queue=max_queue,
            num_threads=num_threads,
        )
    except BaseException:
        listener.close()
        raise
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    logger.info("%s: chat at %s, OpenAI API at %s/v1 (Ctrl-C stops)", app.state.model_name, address, address)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_S)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        app.state.worker.stop()
        listener.close()


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
