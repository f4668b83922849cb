"""Questions with known answers that a server asks itself in the background, and how far its answers have drifted.

Who changes the weights, the number format or the engine for the worse often sees no error and no slower token. A few
fixed questions, answered greedily, do show it: how probable the model finds the known answers, how often it gives
them, and how long, cut off, refused and in which script its own answers are, beside a recorded baseline.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tafkir.errors import DataError, TafkirError
from tafkir.records import Message, Request, SamplingParams
from tafkir.runlog.atomic import write_text
from tafkir.serve.metrics import ServerMetrics
from tafkir.serve.stream import ChoiceStream
from tafkir.serve.worker import Overloaded, Stopped

if TYPE_CHECKING:
    from tafkir.engine.sequence import TokenEvent
    from tafkir.serve.live import Live

__all__ = [
    "LIMITS",
    "Baseline",
    "Canaries",
    "Canary",
    "CanaryOptions",
    "Reading",
    "drift_of",
    "light_of",
    "read_canaries",
    "summary_of",
]

logger = logging.getLogger(__name__)

LIMITS: Mapping[str, tuple[float, float]] = {
    "logprob": (0.05, 0.2),
    "correct": (0.05, 0.15),
    "length": (0.2, 0.5),
    "truncated": (0.05, 0.15),
    "refused": (0.05, 0.15),
    "script": (0.05, 0.15),
}
"""Drift from which on a light is amber, and red. A baseline carries its own copy, to be edited there.

logprob: mean log-probability of a known answer's tokens, in nats; correct: share of known answers that were given (only
a loss counts); length: tokens of an answer, relative; truncated, refused: shares; script: share of answers whose
letters are mostly of another script than the baseline's."""

_LAST = (1 << 31) - 1  # behind everyone who waits, and the first to give its place back
_REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:sorry|not able|unable)|\bI can(?:no|')t (?:help|assist|answer|do|provide|comply)|\bas an AI\b"
    r"|أعتذر|عذرًا|عذراً|لا أستطيع|لا يمكنني|لست قادر",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Canary:
    """A question and what a sound model answers to it."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of a canary. `logprob` is the known answer's mean a token, the rest is of its own answer."""

    logprob: float
    correct: bool
    length: int
    truncated: bool
    refused: bool
    script: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """Readings of a model that is as it should be.

    Attributes:
        canaries: hash of the questions, which another file's readings say nothing of.
        model, fingerprint: whose they are.
        max_tokens: of an answer.
        limits: as `LIMITS`.
        readings: by canary.
    """

    canaries: str
    model: str
    fingerprint: str | None
    max_tokens: int
    limits: Mapping[str, tuple[float, float]]
    readings: Mapping[str, Reading]

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path, canaries: Sequence[Canary]) -> Baseline:
        """Raises DataError for a file that is no baseline, or one of other canaries."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            readings = {id: Reading(**reading) for id, reading in found.pop("readings").items()}
            limits = {signal: (float(amber), float(red)) for signal, (amber, red) in found.pop("limits").items()}
            baseline = cls(**found, limits=limits, readings=readings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fix = "record one with `tafkir canary record`"
            raise DataError(f"no baseline ({error})", where=str(path), fix=fix) from None
        if limits.keys() != LIMITS.keys():
            raise DataError("limits of other signals", where=str(path), expected=", ".join(LIMITS))
        if baseline.canaries != hash_of(canaries):
            fix = "record one with `tafkir canary record`"
            raise DataError("a baseline of other canaries", where=str(path), expected=hash_of(canaries), fix=fix)
        return baseline


@dataclass(frozen=True, slots=True)
class CanaryOptions:
    """What a server asks itself.

    Attributes:
        path: the file of questions; None: those that ship.
        baseline: a file of `Baseline.save`; None: the first round is it.
        share: of the time that may go by with canaries on their way.
    """

    path: Path | None = None
    baseline: Path | None = None
    share: float = 0.01

    def read(self) -> tuple[list[Canary], Baseline | None, float]:
        """What the files hold. Raises DataError as `read_canaries` and `Baseline.load`."""
        canaries = read_canaries(self.path)
        return canaries, Baseline.load(self.baseline, canaries) if self.baseline else None, self.share


def read_canaries(path: Path | None) -> list[Canary]:
    """The questions of a file of lines `{"id": ..., "prompt": ..., "answer": ...}`; None: those that ship.

    Raises:
        DataError: it cannot be read, is empty, a line has other fields, or an id comes twice.
    """
    source = resources.files("tafkir.serve") / "monitoring" / "canaries.jsonl" if path is None else path
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"the canaries cannot be read ({error})", where=str(path)) from None
    found: dict[str, Canary] = {}
    for number, text in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            canary = Canary(**line)
        except (ValueError, TypeError):
            line = {}
        if not line or not all(isinstance(value, str) and value.strip() for value in line.values()):
            expected = '{"id": "...", "prompt": "...", "answer": "..."}'
            raise DataError("the line is no canary", where=where, expected=expected)
        if canary.id in found:
            raise DataError(f"canary {canary.id!r} comes twice", where=where)
        found[canary.id] = canary
    if not found:
        raise DataError("there is no canary", where=str(path), expected="one a line")
    return list(found.values())


def hash_of(canaries: Sequence[Canary]) -> str:
    """What tells one set of questions from another."""
    text = json.dumps([asdict(canary) for canary in canaries], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def drift_of(now: Mapping[str, Reading], baseline: Mapping[str, Reading]) -> dict[str, float]:
    """How far readings of the same canaries are from the baseline, signal by signal: now minus then."""
    pairs = [(now[id], baseline[id]) for id in baseline]

    def mean(signal: str) -> float:
        return fmean(float(getattr(a, signal)) - float(getattr(b, signal)) for a, b in pairs)

    drift = {signal: mean(signal) for signal in ("logprob", "correct", "truncated", "refused")}
    drift["length"] = mean("length") / fmean(b.length for _, b in pairs)
    drift["script"] = fmean(a.script != b.script for a, b in pairs)
    return {signal: drift[signal] for signal in LIMITS}


def light_of(signal: str, drift: float, limits: Mapping[str, tuple[float, float]]) -> int:
    """0 green, 1 amber, 2 red."""
    amber, red = limits[signal]
    size = max(0.0, -drift) if signal == "correct" else abs(drift)
    # What is no number is no better than the worst.
    return 2 if not size < red else int(not size < amber)


class _Collector:
    """Waits for the tokens of one request."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.error: Exception | None = None
        self.ended = threading.Event()

    def deliver(self, events: list[TokenEvent] | Exception) -> None:
        if isinstance(events, Exception):
            self.error = events
        else:
            self.events += events
        if self.error is not None or self.events[-1].finish_reason:
            self.ended.set()


class Canaries:
    """Asks one question at a time, behind all others, and rests in between so long that it costs its share at most.

    Args:
        live: whom it asks.
        canaries: what it asks, in turn.
        baseline: what the answers are held to; None: the first round.
        share: of the time that may go by with canaries on their way, 0 to 1.
        max_tokens: of an answer; a baseline's own counts more.
    """

    def __init__(
        self,
        live: Live,
        canaries: Sequence[Canary],
        baseline: Baseline | None = None,
        share: float = 0.01,
        *,
        max_tokens: int = 64,
    ) -> None:
        self._live, self._canaries, self.baseline, self._share = live, canaries, baseline, share
        self._max_tokens = baseline.max_tokens if baseline else max_tokens
        self._stopped = threading.Event()
        self._readings: dict[str, Reading] = {}
        self._of = live.served
        self._thread = threading.Thread(target=self._main, name="tafkir-canaries", daemon=True)
        # Who waits behind everyone is no user: his times stay out of the server's.
        self._unseen = ServerMetrics()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def round(self) -> Iterator[tuple[Canary, Reading]]:
        """Ask everything once, without a rest.

        Raises:
            TafkirError, Stopped: the server cannot answer.
        """
        for canary in self._canaries:
            yield canary, self._ask(canary)

    def as_baseline(self, readings: Mapping[str, Reading]) -> Baseline:
        """Readings of a whole round of the present model, under the limits in force."""
        served = self._live.served
        limits = self.baseline.limits if self.baseline else LIMITS
        return Baseline(
            hash_of(self._canaries), served.name, served.fingerprint, self._max_tokens, limits, dict(readings)
        )

    def _main(self) -> None:
        turn, rest_s = 0, 0.0
        while not self._stopped.wait(rest_s):
            began = time.monotonic()
            canary = self._canaries[turn % len(self._canaries)]
            try:
                reading = None if self._live.worker.num_waiting else self._ask(canary)
            except (Overloaded, Stopped, TafkirError) as error:
                if self._stopped.is_set() or not self._live.worker.healthy:
                    return
                logger.warning("canary %s: %s", canary.id, error)
                reading = None
            if reading is not None:
                turn += 1
                self._note(canary, reading)
            rest_s = max(1.0 if reading is None else 0.0, (time.monotonic() - began) * (1 / self._share - 1))

    def _ask(self, canary: Canary) -> Reading:
        served = self._live.served
        if served is not self._of:
            self._readings, self._of = {}, served
            self._live.worker.metrics.forget_canaries()
        tokenizer, worker, engine = served.tokenizer, served.worker, served.engine
        ids = tuple(served.chat_ids([Message("user", canary.prompt)], None))
        answer = tokenizer.encode(canary.answer)
        (future,) = worker.score([(*ids, *answer)], 1, engine)
        params = SamplingParams(temperature=0.0, max_tokens=min(self._max_tokens, served.room(ids)), seed=0)
        collector = _Collector()
        request = Request(f"canary-{canary.id}-{time.monotonic_ns()}", ids, params, priority=_LAST)
        worker.submit([request], collector, engine=engine, metrics=self._unseen)
        while not collector.ended.wait(0.5):
            if self._stopped.is_set():
                worker.cancel([request.id])
                raise Stopped("the canaries are stopped")
        if collector.error is not None:
            raise collector.error
        stream = ChoiceStream(tokenizer, engine.eos_ids, (), split_reasoning=True)
        content = "".join(stream.push(event).content for event in collector.events)
        return Reading(
            logprob=fmean(future.result().logprobs[-len(answer) :]),
            correct=_gives(content, canary.answer),
            length=len(collector.events),
            truncated=collector.events[-1].finish_reason == "length",
            refused=_REFUSAL.search(content) is not None,
            script=_script_of(content),
        )

    def _note(self, canary: Canary, reading: Reading) -> None:
        self._readings[canary.id] = reading
        if len(self._readings) < len(self._canaries):
            return
        if self.baseline is None:
            self.baseline = self.as_baseline(self._readings)
        metrics, last = self._live.worker.metrics, canary is self._canaries[-1]
        for signal, drift in drift_of(self._readings, self.baseline.readings).items():
            light = light_of(signal, drift, self.baseline.limits)
            if light > metrics.canary_light.values.get(signal, 0):
                logger.warning("canaries: %s has drifted by %.3g (%s)", signal, drift, ("", "amber", "red")[light])
            metrics.canary_drift.values[signal], metrics.canary_light.values[signal] = drift, light
        for field in fields(Reading):
            if field.name != "script":
                values = [float(getattr(each, field.name)) for each in self._readings.values()]
                metrics.canary_mean.values[field.name] = fmean(values)
        if last:
            metrics.canary_rounds.add()
            metrics.canary_round_time.values[""] = time.time()


def _gives(content: str, answer: str) -> bool:
    """Whether the answer stands in the text, as words of its own."""
    plain, wanted = (_plain(text) for text in (content, answer))
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", plain) is not None


def _plain(text: str) -> str:
    """Lower case, Western digits, one space between words."""
    digits = (str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c for c in text)
    return " ".join("".join(digits).casefold().split())


def _script_of(text: str) -> str:
    """The script of most letters, by the first word of their Unicode names; empty without letters."""
    scripts: Counter[str] = Counter(unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha())
    return scripts.most_common(1)[0][0] if scripts else ""


def summary_of(readings: Mapping[str, Reading]) -> dict[str, Any]:
    """Means of all readings, for a person."""
    means = {f.name: fmean(float(getattr(r, f.name)) for r in readings.values()) for f in fields(Reading)[:-1]}
    return {name: round(value, 4) for name, value in means.items()}
