"""Progress of long work: step/total, share, the last numbers, tokens/s and the time left.

Live on a terminal; elsewhere one plain line about every ten seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tafkir.runlog.logging import is_main_rank, is_terminal, stderr_console

if TYPE_CHECKING:
    from rich.live import Live

__all__ = ["Progress", "format_duration"]

_PLAIN_INTERVAL_S = 10.0
_LIVE_INTERVAL_S = 0.2

_logger = logging.getLogger(__name__)


def format_duration(seconds: float) -> str:
    """`75` -> `1:15`, `3700` -> `1:01:40`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """Progress of one stretch of work, as a context manager.

    Args:
        label: what is going on, such as `pretrain`.
        total: steps in all.
        start: steps that an earlier process already did.
        interval_s: seconds between plain lines.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        start: int = 0,
        interval_s: float = _PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total = label, total
        self._start, self._step, self._tokens = start, start, 0
        self._values: dict[str, float] = {}
        self._clock = clock
        self._began = self._shown = clock()
        self._live: Live | None = None
        self._interval_s = interval_s

    def __enter__(self) -> Self:
        self._began = self._shown = self._clock()
        if is_terminal() and is_main_rank():
            from rich.live import Live

            self._interval_s = _LIVE_INTERVAL_S
            self._live = Live("", console=stderr_console(), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if error is None:
            _logger.info("%s", self.line())

    def update(self, step: int, *, tokens: int = 0, **values: float) -> None:
        """Say that `step` steps are done, `tokens` more tokens were worked off, and what the numbers are now.

        Args:
            step: steps done so far, earlier processes included.
            tokens: tokens since the last call.
            values: numbers to show, such as `loss=2.31`.
        """
        self._step, self._tokens = step, self._tokens + tokens
        self._values.update(values)
        now = self._clock()
        if now - self._shown < self._interval_s:
            return
        self._shown = now
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(self.line(), no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            _logger.info("%s", self.line())

    def line(self) -> str:
        """The line as it stands: `pretrain 120/600 20% · loss 3.210 · 1,234 tok/s · ETA 2:31`."""
        elapsed = self._clock() - self._began
        share = 100 * self._step / self.total if self.total else 100.0
        parts = [f"{self.label} {self._step:,}/{self.total:,} {share:.0f}%"]
        parts += [f"{name} {value:.4g}" for name, value in self._values.items()]
        if self._tokens and elapsed > 0:
            parts.append(f"{self._tokens / elapsed:,.0f} tok/s")
        done = self._step - self._start
        if self._step >= self.total:
            parts.append(f"took {format_duration(elapsed)}")
        elif done > 0:
            parts.append(f"ETA {format_duration(elapsed / done * (self.total - self._step))}")
        return " · ".join(parts)
