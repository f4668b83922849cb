"""A pool of rollout servers behind `Completer`: the least loaded one is asked; a dead one is named and left out."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tafkir.errors import RequestError, RolloutError
from tafkir.records import Completion, Request
from tafkir.remote.checks import PROBES, EncodesText, check_logprobs, check_sampled, check_spread, check_tokenizer
from tafkir.remote.connection import Connection, TransientError
from tafkir.remote.dialect import Dialect, ServerFacts
from tafkir.remote.weights import WeightFolders

__all__ = ["Limits", "ServerPool"]

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_MAX_BACKOFF_S = 20.0
# A server that is late this often in a row is taken for dead.
_MAX_LATE = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait, how often to try, how much to ask for at once.

    Attributes:
        timeout_s: for one answer.
        weight_timeout_s: for each step of a refresh of weights.
        max_concurrency: requests at one server at once.
        max_retries: further attempts of a request, and of a refresh.
        backoff_s: wait before the first of them; each further one waits twice as long.
    """

    timeout_s: float = 600.0
    weight_timeout_s: float = 1200.0
    max_concurrency: int = 64
    max_retries: int = 3
    backoff_s: float = 0.5


@dataclass(slots=True)
class _Member:
    connection: Connection
    facts: ServerFacts
    alive: bool = True
    running: int = 0
    late: int = 0
    last: str = ""
    temperatures: set[float] = field(default_factory=lambda: {1.0})
    """Those at which its log-probabilities were found to be right."""

    @property
    def url(self) -> str:
        return self.connection.url


class ServerPool:
    """Several servers with the same model as one `Completer`.

    Sampling a request is safe to repeat: nothing at a server depends on it, and only the answer that arrives counts.
    A server whose connection breaks may have been started again, with the weights that it began with: it is used
    again only after it took the present ones.

    Args:
        urls: of the servers.
        dialect: what they speak.
        tokenizer: the trainer's; every server must encode the probes as it does.
        eos_ids: tokens that end every completion.
        vocab_size: of the model, which may exceed the tokenizer's.
        folders: where new weights are put.
        api_key: bearer token for all of them.

    Raises:
        TransientError: a server cannot be reached.
        RolloutError: it speaks another protocol, or has another tokenizer.
    """

    def __init__(
        self,
        urls: Sequence[str],
        dialect: Dialect,
        tokenizer: EncodesText,
        *,
        eos_ids: Sequence[int],
        vocab_size: int,
        folders: WeightFolders,
        limits: Limits | None = None,
        api_key: str | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._dialect, self._tokenizer = dialect, tokenizer
        self._eos_ids, self._vocab_size, self._folders = tuple(eos_ids), vocab_size, folders
        self._folder: Path | None = None
        self.policy_version = 0
        self.counts: Counter[str] = Counter()
        """What went wrong and was made good: attempts by the kind of failure, servers that were lost or came back."""
        self._changed = threading.Condition()
        self._reviving = threading.Lock()
        self._active = 0
        self._members = [self._meet(url, api_key) for url in urls]

    # --- Completer -------------------------------------------------------------------------------------------------

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which they arrive.

        Raises:
            RequestError: two requests have the same id, or one asks for what the servers cannot do.
            RolloutError: an answer cannot be trained on, or a request found no server in all its attempts.
        """
        if len({request.id for request in requests}) < len(requests):
            raise RequestError("two requests have the same id", where="rollout servers", expected="distinct ids")
        for request in requests:
            self._dialect.check(request)
        return self._all(requests, self._complete_one)

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Teacher-forced log-probabilities at temperature 1: for n tokens, n - 1 float32 values.

        Raises:
            RequestError: a sequence has fewer than two tokens.
            RolloutError: a server left a log-probability out, or none could be reached.
        """
        for i, ids in enumerate(token_ids):
            if len(ids) < 2:
                raise RequestError(f"{len(ids)} tokens", where=f"sequence {i}", expected="2 or more")
        scored = dict(self._all(list(enumerate(token_ids)), self._score_one))
        return [scored[i] for i in range(len(token_ids))]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Write the weights to disk and let every server take them; dead servers get the chance to come back.

        Raises:
            RequestError: requests are running.
            CheckpointError: the weights are not the model's, or cannot be written.
            RolloutError: a server refuses the weights, or none is left.
        """
        if self._active:
            raise RequestError(f"{self._active} requests are still running", where="load_weights", expected="none")
        self._folder, self.policy_version = self._folders.write(weights, version), version
        with ThreadPoolExecutor(len(self._members)) as threads:
            for future in [threads.submit(self._bring_up, member) for member in self._members]:
                future.result()
        self._need_one()

    def metrics(self) -> dict[str, float]:
        """Servers that are alive, and all that was counted so far."""
        alive = sum(member.alive for member in self._members)
        return {"engine/servers_alive": float(alive)} | {f"engine/{name}": float(n) for name, n in self.counts.items()}

    def close(self) -> None:
        """Close all connections."""
        for member in self._members:
            member.connection.close()

    # --- one request -----------------------------------------------------------------------------------------------

    def _all(self, jobs: Sequence[object], run: Callable[..., Result]) -> Iterator[Result]:
        """Run jobs at once, as many as the servers take; results as they come."""
        if not jobs:
            return
        capacity = len(self._members) * self._limits.max_concurrency
        threads = ThreadPoolExecutor(min(len(jobs), capacity), thread_name_prefix="rollout")
        self._active += len(jobs)
        futures: list[Future[Result]] = [threads.submit(run, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            self._active -= len(jobs)
            # What runs ends by its own time limit; nobody waits for it.
            threads.shutdown(wait=False, cancel_futures=True)

    def _complete_one(self, request: Request) -> Completion:
        stop_ids = tuple(dict.fromkeys((*self._eos_ids, *request.params.stop_token_ids)))

        def attempt(member: _Member) -> Completion:
            self._check_temperature(member, request)
            path, body = self._dialect.generation(request, member.facts, stop_ids)
            where = f"{member.url}{path}"
            return check_sampled(
                self._dialect.read(member.connection.post(path, body), where),
                request,
                member.facts,
                stop_ids=stop_ids,
                vocab_size=self._vocab_size,
                version=self.policy_version,
                told=self._folder is not None,
                where=where,
            )

        return self._try(attempt, f"request {request.id!r}")

    def _score_one(self, job: tuple[int, Sequence[int]]) -> tuple[int, Tensor]:
        index, ids = job

        def attempt(member: _Member) -> Tensor:
            path, body = self._dialect.scoring(ids, member.facts)
            where = f"{member.url}{path}: sequence {index}"
            values = self._dialect.read_scores(member.connection.post(path, body), ids, where)
            return torch.tensor(check_logprobs(values, len(ids) - 1, where))

        return index, self._try(attempt, f"sequence {index}")

    def _try(self, attempt: Callable[[_Member], Result], what: str) -> Result:
        last: TransientError | None = None
        for tried in range(self._limits.max_retries + 1):
            with self._borrow() as member:
                try:
                    result = attempt(member)
                except TransientError as error:
                    self._note(member, error)
                    last = error
                else:
                    member.late = 0
                    return result
            if tried < self._limits.max_retries:
                self._count("retries")
                self._wait(tried)
        raise RolloutError(
            f"{what} failed {self._limits.max_retries + 1} times, at last: {last}",
            where="rollout servers",
            fix="look at the servers' logs; raise timeout_s or max_retries in [rlvr.engine]",
        ) from last

    def _check_temperature(self, member: _Member, request: Request) -> None:
        """Once for each server and temperature: are log-probabilities those of the distribution sampled from?"""
        temperature = request.params.temperature or 1.0
        if temperature in member.temperatures:
            return
        spreads = []
        for asked in (1.0, temperature):
            path, body = self._dialect.spread(member.facts, request.prompt_ids, asked)
            where = f"{member.url}{path}"
            spreads.append(self._dialect.read_spread(member.connection.post(path, body), where))
        check_spread(spreads[0], spreads[1], temperature, where)
        member.temperatures.add(temperature)

    # --- members ---------------------------------------------------------------------------------------------------

    def _meet(self, url: str, api_key: str | None) -> _Member:
        limits = self._limits
        connection = Connection(
            url, timeout_s=limits.timeout_s, max_concurrency=limits.max_concurrency, api_key=api_key
        )
        member = _Member(connection, self._dialect.connect(connection))
        self._check_probes(member)
        return member

    def _check_probes(self, member: _Member) -> None:
        for text in PROBES:
            theirs = self._dialect.encode(member.connection, member.facts, text)
            check_tokenizer(self._tokenizer.encode(text), theirs, text, member.url)

    @contextmanager
    def _borrow(self) -> Iterator[_Member]:
        """The living server with the fewest requests, lent out; waits for a free place at it."""
        member = self._take()
        while member is None:
            self._revive()
            member = self._take()
        try:
            yield member
        finally:
            with self._changed:
                member.running -= 1
                self._changed.notify_all()

    def _take(self) -> _Member | None:
        with self._changed:
            while True:
                alive = [member for member in self._members if member.alive]
                if not alive:
                    return None
                # One that was late gets no more while another one answers in time.
                member = min(alive, key=lambda member: (member.late, member.running))
                if member.running < self._limits.max_concurrency:
                    member.running += 1
                    return member
                self._changed.wait(1.0)

    def _note(self, member: _Member, error: TransientError) -> None:
        self._count(error.kind)
        member.last = str(error)
        member.late = member.late + 1 if error.kind == "late" else 0
        if error.kind == "down" or member.late >= _MAX_LATE:
            self._bury(member)

    def _bury(self, member: _Member) -> None:
        with self._changed:
            if not member.alive:
                return
            member.alive = False
            self.counts["servers_lost"] += 1
            left = sum(other.alive for other in self._members)
            self._changed.notify_all()
        _logger.warning(
            "rollout server %s is lost (%s); %d left, its requests go to them", member.url, member.last, left
        )

    def _revive(self) -> None:
        """When nobody is left: try all of them again, with waits between."""
        with self._reviving:
            for tried in range(self._limits.max_retries + 1):
                if any(member.alive for member in self._members):
                    return
                for member in self._members:
                    self._bring_up(member)
                if not any(member.alive for member in self._members):
                    self._wait(tried)
            self._need_one()

    def _bring_up(self, member: _Member) -> None:
        """Give a server the present weights, first making sure that a dead one is who it was. Failing, it is dead."""
        limits = self._limits
        for tried in range(limits.max_retries + 1 if member.alive else 1):
            try:
                if not member.alive:
                    member.facts = self._dialect.connect(member.connection)
                    self._check_probes(member)
                    member.temperatures = {1.0}
                if self._folder is not None:
                    self._dialect.refresh(member.connection, self._folder, self.policy_version, limits.weight_timeout_s)
            except TransientError as error:
                self._count(error.kind)
                member.last = str(error)
                if member.alive and tried < limits.max_retries:
                    self._wait(tried)
                continue
            if not member.alive:
                _logger.info(
                    "rollout server %s is back, with the weights of version %d", member.url, self.policy_version
                )
                self._count("servers_back")
            member.alive, member.late = True, 0
            return
        self._bury(member)

    def _need_one(self) -> None:
        if not any(member.alive for member in self._members):
            raise RolloutError(
                "no rollout server is left: " + "; ".join(member.last for member in self._members),
                where="[rlvr.engine]",
                fix="start them again, then run the same command: the stage goes on from its last state",
            )

    def _wait(self, tried: int) -> None:
        time.sleep(min(self._limits.backoff_s * 2**tried, _MAX_BACKOFF_S))

    def _count(self, name: str) -> None:
        with self._changed:
            self.counts[name] += 1
