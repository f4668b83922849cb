"""What was asked of an endpoint, and what it answered, on disk the moment it happens: `requests.jsonl`.

An answer is graded after it came, which may take a while. A run that is killed in between finds the answer here, and
asks for nothing twice but for what was on its way at that moment, which is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Container
from dataclasses import asdict
from pathlib import Path

from tafkir.eval.answers import Reply
from tafkir.runlog.metrics import JsonlWriter, read_jsonl

__all__ = ["JOURNAL_NAME", "Journal"]

JOURNAL_NAME = "requests.jsonl"


class Journal:
    """Requests by their ids; safe to use from any thread.

    Args:
        path: of the file, which a run that ends well takes away.
        done: keys of answers that have their verdict; what was received for them is not kept in memory.

    Attributes:
        resent: requests sent by this run that an earlier one had sent, too, and got no answer to.
    """

    def __init__(self, path: Path, done: Container[str] = ()) -> None:
        self._received: dict[str, Reply] = {}
        self._open: set[str] = set()
        self.resent, self._closed = 0, False
        for row in read_jsonl(path) if path.exists() else ():
            if "reply" not in row:
                self._open.add(row["id"])
                continue
            self._open.discard(row["id"])
            if row["key"] not in done:
                self._received[row["id"]] = Reply(**row["reply"])
        self._path, self._lock, self._writer = path, threading.Lock(), JsonlWriter(path)

    def asked(self, request_id: str, key: str) -> None:
        """Note a request, before it is sent."""
        with self._lock:
            if self._closed:
                return
            self.resent += request_id in self._open
            self._open.discard(request_id)
            self._writer.append({"id": request_id, "key": key})

    def received(self, request_id: str, key: str, reply: Reply) -> None:
        """Keep an answer, before anybody looks at it."""
        with self._lock:
            if not self._closed:  # a run that failed does not wait for what is under way
                self._writer.append({"id": request_id, "key": key, "reply": asdict(reply)})

    def reply_to(self, request_id: str) -> Reply | None:
        """The answer that an earlier run received, once."""
        with self._lock:
            return self._received.pop(request_id, None)

    def close(self, *, finished: bool) -> None:
        """Let go of the file; of a run that `finished` every answer is where it belongs, and the file goes away."""
        with self._lock:
            self._closed = True
            self._writer.close()
        if finished:
            self._path.unlink()
