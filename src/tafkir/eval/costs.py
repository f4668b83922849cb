"""What computing takes of this machine: seconds, joules where the processor counts them, memory at its peak."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Self

__all__ = ["Meter"]

_COUNTERS = Path("/sys/class/powercap")
_SELF = Path("/proc/self")


class Meter:
    """Measures what happens inside a `with`.

    Attributes:
        seconds: wall time.
        joules: of all processor packages, by RAPL's counters: the whole machine's, so that only a quiet one tells of
            one program. None where there are none, or they may not be read.
        peak_bytes: the most memory that this process held; None where the system does not say (Linux does).
    """

    def __init__(self, counters: Path = _COUNTERS, process: Path = _SELF) -> None:
        self._packages = sorted(counters.glob("intel-rapl:*[0-9]/energy_uj"))
        self._packages = [file for file in self._packages if file.parent.name.count(":") == 1]
        self._process = process
        self.seconds = 0.0
        self.joules: float | None = None
        self.peak_bytes: int | None = None

    def __enter__(self) -> Self:
        try:
            # "5" sets the high-water mark back to what is held now (proc(5)).
            (self._process / "clear_refs").write_text("5")
            self._reset = True
        except OSError:
            self._reset = False
        self._energy = self._read_energy()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began
        after = self._read_energy()
        if self._energy is not None and after is not None:
            # A counter starts again from 0 at its range.
            used = [b - a if b >= a else b - a + top for (a, top), (b, _) in zip(self._energy, after, strict=True)]
            self.joules = sum(used) / 1e6
        self.peak_bytes = self._read_peak() if self._reset else None

    def _read_energy(self) -> list[tuple[int, int]] | None:
        try:
            pairs = [(file, file.with_name("max_energy_range_uj")) for file in self._packages]
            return [(int(now.read_text()), int(top.read_text())) for now, top in pairs] or None
        except OSError:
            return None

    def _read_peak(self) -> int | None:
        try:
            lines = (self._process / "status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
