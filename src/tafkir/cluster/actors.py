"""A pool of Ray actors that loses no call: a dead or stuck actor is named and replaced, its call goes to another."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pickle import PicklingError
from typing import Any

from tafkir.cluster.session import import_ray
from tafkir.errors import RolloutError, TafkirError

__all__ = ["ActorPool", "Call", "PoolLimits", "Subject"]

_logger = logging.getLogger(__name__)

Call = tuple[str, tuple[Any, ...]]
"""A method of the subject, and its arguments."""
Subject = Callable[[], Any]
"""Builds what an actor is about, in the actor's own process; must be picklable."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What an actor needs, how long to wait for it, and how often to try.

    Attributes:
        timeout_s: for one call.
        start_timeout_s: for an actor to start and build its subject, on top of its first call.
        max_attempts: actors that one call may cost.
        num_cpus, num_gpus: what Ray sets aside for each.
    """

    timeout_s: float = 600.0
    start_timeout_s: float = 300.0
    max_attempts: int = 3
    num_cpus: float = 1.0
    num_gpus: float = 0.0


class _Lost(Exception):
    """An actor is gone before it answered; says how."""


class Worker:
    """What lives in an actor's process. Building waits for the first call, so that what goes wrong there has a name."""

    def __init__(self, build: Subject) -> None:
        self._build = build
        self._subject: Any = None

    def whoami(self) -> str:
        return f"process {os.getpid()} on {socket.gethostname()}"

    def call(self, method: str, args: tuple[Any, ...], version: int, state: Any) -> Any:
        """Take a new state where one comes along, then do what is asked."""
        if self._subject is None:
            self._subject = self._build()
        if state is not None:
            self._subject.take(state, version)
        return getattr(self._subject, method)(*args)


@dataclass(slots=True)
class _Actor:
    name: str
    handle: Any
    whoami: Any
    fresh: bool = True
    busy: bool = False
    version: int = -1
    place: str = ""


@dataclass(frozen=True, slots=True)
class _Running:
    actor: _Actor
    job: int
    attempt: int
    deadline: float


class ActorPool:
    """Actors of one kind, each with a subject of its own.

    A call must be safe to repeat: when its actor dies or does not answer in time, it is made again at another one.
    Its result is given out once, whatever happens.

    Args:
        kind: what logs and errors call the actors: `rollout` makes `rollout-0`, `rollout-1` ...
        build: makes an actor's subject.
        size: how many.
        limits: waits and attempts.
    """

    def __init__(self, kind: str, build: Subject, size: int, limits: PoolLimits) -> None:
        self._ray = import_ray()
        self._kind, self._limits = kind, limits
        options = {"num_cpus": limits.num_cpus, "num_gpus": limits.num_gpus, "max_restarts": 0, "max_task_retries": 0}
        self._class = self._ray.remote(**options)(Worker)
        # Once in the object store, however many actors are started in the end.
        try:
            self._build = self._ray.put(build)
        except (TypeError, AttributeError, PicklingError) as error:
            raise RolloutError(
                f"what a {kind} worker is to do cannot be sent to it ({error})",
                where="[cluster]",
                expected="something that can be pickled",
            ) from error
        self._state: Any = None
        self._version = -1
        self.counts: Counter[str] = Counter()
        """What was lost and made good: actors by how they went, and repeated calls."""
        self._actors = [self._start(f"{kind}-{i}") for i in range(size)]

    def set_state(self, state: Any, version: int) -> None:
        """Put a state into the object store once; every actor takes it (`subject.take(state, version)`) before its
        next call, actors that are started later as well.
        """
        self._state, self._version = self._ray.put(state), version

    def run(
        self, jobs: Sequence[Call], *, substitute: Callable[[int, str], Any] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Make all calls; yields (index of the call, result) as they come, each index once.

        Args:
            jobs: the calls.
            substitute: what stands for the result of a call that cost `max_attempts` actors, from its index and the
                reason; without it such a call is an error.

        Raises:
            TafkirError: what a subject raised, as it was raised.
            RolloutError: a subject raised anything else, or a call cost `max_attempts` actors.
        """
        waiting = deque((job, 1) for job in range(len(jobs)))
        running: dict[Any, _Running] = {}
        try:
            while waiting or running:
                for actor in self._actors:
                    if waiting and not actor.busy:
                        job, attempt = waiting.popleft()
                        running |= self._submit(actor, jobs[job], job, attempt)
                wait_s = max(0.0, min(call.deadline for call in running.values()) - time.monotonic())
                ready, _ = self._ray.wait(list(running), num_returns=1, timeout=wait_s)
                overdue = [ref for ref, call in running.items() if call.deadline <= time.monotonic()]
                for reference in dict.fromkeys((*ready, *overdue)):
                    call = running.pop(reference)
                    try:
                        result = self._collect(reference, call, reference in ready)
                    except _Lost as lost:
                        if call.attempt < self._limits.max_attempts:
                            self.counts["repeated"] += 1
                            waiting.appendleft((call.job, call.attempt + 1))
                            continue
                        result = self._give_up(call, str(lost), substitute)
                    yield call.job, result
        finally:
            # An actor whose result nobody waits for would keep the next call waiting.
            for call in running.values():
                self._replace(call.actor)

    def metrics(self) -> dict[str, float]:
        """All that was counted so far; nothing where nothing was lost."""
        return {f"cluster/{self._kind}_{name}": float(count) for name, count in self.counts.items()}

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors = []

    # --- one call --------------------------------------------------------------------------------------------------

    def _submit(self, actor: _Actor, call: Call, job: int, attempt: int) -> dict[Any, _Running]:
        method, args = call
        state = self._state if actor.version != self._version else None
        reference = actor.handle.call.remote(method, args, self._version, state)
        deadline = time.monotonic() + self._limit(actor)
        actor.busy = True
        return {reference: _Running(actor, job, attempt, deadline)}

    def _limit(self, actor: _Actor) -> float:
        return self._limits.timeout_s + (self._limits.start_timeout_s if actor.fresh else 0.0)

    def _collect(self, reference: Any, call: _Running, is_ready: bool) -> Any:
        """The result of a call, or _Lost."""
        errors, actor = self._ray.exceptions, call.actor
        if not is_ready:
            raise self._lose(actor, "stuck", f"did not answer within {self._limit(actor):g} s")
        try:
            result = self._ray.get(reference, timeout=self._limits.timeout_s)
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, TafkirError):
                actor.busy = False
                raise cause from None
            raise RolloutError(
                f"{actor.name} failed: {type(cause).__name__}: {cause}", where=self._place(actor), fix="see its log"
            ) from error
        except (errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError) as error:
            raise self._lose(actor, "died", f"died ({type(error).__name__})") from None
        except errors.OutOfMemoryError:
            raise self._lose(actor, "died", "was ended by Ray for want of memory") from None
        except errors.GetTimeoutError:
            raise self._lose(actor, "stuck", "did not hand its result over") from None
        actor.busy = actor.fresh = False
        actor.version = self._version
        self._place(actor)
        return result

    def _give_up(self, call: _Running, lost: str, substitute: Callable[[int, str], Any] | None) -> Any:
        what = f"a call cost {call.attempt} workers; the last one, {call.actor.name}, {lost}"
        if substitute is not None:
            return substitute(call.job, what)
        raise RolloutError(
            what,
            where="[cluster]",
            fix="look at Ray's logs (/tmp/ray/session_latest/logs); raise the time limits or max_attempts",
        )

    # --- actors ----------------------------------------------------------------------------------------------------

    def _start(self, name: str) -> _Actor:
        handle = self._class.remote(self._build)
        return _Actor(name, handle, handle.whoami.remote())

    def _lose(self, actor: _Actor, how: str, what: str) -> _Lost:
        """Name an actor that is gone, and start another in its place."""
        self.counts[how] += 1
        if place := self._place(actor):
            what = f"{what} ({place})"
        else:
            what = f"{what} (it never started; free for it: {self._free()})"
        _logger.warning("%s %s; another one takes its place and its call", actor.name, what)
        self._replace(actor)
        return _Lost(what)

    def _free(self) -> str:
        resources = self._ray.available_resources()
        return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))

    def _replace(self, actor: _Actor) -> None:
        self._ray.kill(actor.handle)
        self._actors[self._actors.index(actor)] = self._start(actor.name)

    def _place(self, actor: _Actor) -> str:
        """Process and machine of an actor, as soon as it said so."""
        if not actor.place and self._ray.wait([actor.whoami], timeout=0)[0]:
            try:
                actor.place = str(self._ray.get(actor.whoami, timeout=1))
            except (self._ray.exceptions.RayError, self._ray.exceptions.GetTimeoutError):
                return ""
        return actor.place
