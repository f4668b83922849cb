"""Who may ask, and how often: API keys compared in constant time, and one token bucket a caller."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable

__all__ = ["ApiKeys", "RateLimiter"]

_MAX_CALLERS = 10_000


class ApiKeys:
    """The keys that open the server, kept as hashes."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def caller(self, authorization: str) -> str | None:
        """A name for the holder of the key in an `Authorization` header, which gives nothing of the key away.

        None where the header is not `Bearer KEY` with a known key. Every key is compared, whichever fits.
        """
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        known = [digest for digest in self._digests if hmac.compare_digest(digest, given)]
        return hashlib.sha256(known[0]).hexdigest()[:12] if known and scheme.lower() == "bearer" else None


class RateLimiter:
    """A token bucket a caller: a minute's requests may come at once, after that they come evenly.

    Args:
        per_minute: requests a minute; 0 lets everything pass.
        clock: seconds that never go back.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: str) -> float:
        """Seconds that the caller must wait; 0 takes one request off its bucket."""
        if not self._per_minute:
            return 0.0
        now, rate = self._clock(), self._per_minute / 60
        left, at = self._buckets.pop(caller, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - at) * rate)
        wait = max(0.0, (1 - left) / rate)
        # The dict keeps callers in the order of their last request: the first one has been silent longest.
        self._buckets[caller] = (left if wait else left - 1, now)
        if len(self._buckets) > _MAX_CALLERS:
            del self._buckets[next(iter(self._buckets))]
        return wait
