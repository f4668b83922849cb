"""A chat endpoint on the loopback that counts what it is asked, and misbehaves as told."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Reaction = Callable[[int, Body], tuple[int, dict[str, str], bytes] | None]


def completion(content: str | None, *, finish: str = "stop", tokens: int = 7, **message: Any) -> bytes:
    """The bytes of a chat completion."""
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 5, "completion_tokens": tokens}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def guess(number: int, body: Body) -> tuple[int, dict[str, str], bytes]:
    """An answer that prompt and seed decide, as a model's would be."""
    drawn = hashlib.sha256(json.dumps([body["messages"], body["seed"]]).encode()).digest()[0]
    return 200, {}, completion(f"<think>\n{drawn}\n</think>\n\\boxed{{{drawn % 8}}}", tokens=20 + drawn % 50)


class ChatServer:
    """`react(n, body)` answers the n-th request with (status, headers, content), or cuts the connection (None)."""

    def __init__(self, react: Reaction = guess, *, delay_s: float = 0.0, port: int = 0) -> None:
        self.react, self.delay_s, self.bodies = react, delay_s, list[Body]()
        self.headers: list[dict[str, str]] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # One segment an answer; else Nagle's algorithm makes the client wait.
            wbufsize = -1

            def do_GET(self) -> None:
                self.reply(200, {}, json.dumps({"data": [{"id": "m", "created": time.time()}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.bodies.append(body)
                    outer.headers.append({key.lower(): value for key, value in self.headers.items()})
                    number = len(outer.bodies)
                time.sleep(outer.delay_s)
                reaction = outer.react(number, body)
                if reaction is None:
                    self.close_connection = True
                else:
                    self.reply(*reaction)

            def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for key, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # the client was killed
                    super().handle()

            def finish(self) -> None:
                with contextlib.suppress(OSError):
                    super().finish()

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1#m"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Take no further connection."""
        self._http.shutdown()
        self._http.server_close()
