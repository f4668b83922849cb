"""A model behind any OpenAI-compatible endpoint under evaluation: chat completions, many at once, with retries."""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from tafkir.errors import RecipeError, RequestError, RolloutError, TafkirError
from tafkir.eval.answers import Ask, Reply, Watch
from tafkir.records import Message
from tafkir.remote.connection import Connection, NotJsonError, StatusError, TransientError

__all__ = ["EndpointAnswers", "EndpointOptions"]

_MAX_PAUSE_S = 600.0
_MAX_BACKOFF_S = 60.0
# A late answer may have cost minutes of somebody's accelerator: it gets one more chance, not many.
_MAX_LATE = 1
# Statuses that mean this request, not the address, the key or the model.
_OWN_FAULT = frozenset({400, 413, 422})


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How an endpoint is talked to.

    Attributes:
        concurrency: requests at once.
        timeout_s: for one answer.
        max_retries: further attempts of a request that failed for now.
        backoff_s: wait before the first of them, at random between half and all of it; each further one waits twice
            as long. What the server says in `Retry-After` counts where it is more.
        extra_body: added to every request, such as `{"top_k": 20}`; part of the fingerprint.
    """

    concurrency: int = 32
    timeout_s: float = 3600.0
    max_retries: int = 5
    backoff_s: float = 0.5
    extra_body: Mapping[str, Any] = field(default_factory=dict)


class _Refused(Exception):
    """There is no usable answer in what came back; another attempt may bring one."""


class EndpointAnswers:
    """Answers of `http://host/v1#model`; an `Answerer`.

    The fingerprint is made of what the endpoint says of its model: its name, and the weights' hash or path
    (`fingerprint`, `root`) and context where it tells them. Where the server runs is not part of it.

    Args:
        url: base URL; the model's name follows a `#`, and may be left out where there is only one.
        name: for tables; None takes the model's.
        api_key: sent as a bearer token.

    Raises:
        RecipeError: the URL is none, or the endpoint has several models and none is named.
        RolloutError: the endpoint cannot be reached, or refuses the key.
    """

    def __init__(
        self, url: str, *, name: str | None = None, api_key: str | None = None, options: EndpointOptions | None = None
    ) -> None:
        self._options = options or EndpointOptions()
        base, _, wanted = url.partition("#")
        host = urlsplit(base).hostname
        if not host:
            raise RecipeError("is no URL", where=url, expected="http://host:port/v1#model")
        self._connection = Connection(
            base,
            timeout_s=self._options.timeout_s,
            max_concurrency=self._options.concurrency,
            api_key=api_key,
            through_proxy=not (host == "localhost" or host.startswith("127.") or host == "::1"),
        )
        card = self._card(wanted)
        self.model = str(card["id"])
        self.name = name or self.model
        known = {key: card.get(key) for key in ("id", "root", "fingerprint", "max_model_len")}
        parts = json.dumps([known, self._options.extra_body], sort_keys=True)
        self.fingerprint = hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()
        self._watch: Watch | None = None

    def _card(self, wanted: str) -> Mapping[str, Any]:
        """What the endpoint says of the model; some endpoints list none."""
        try:
            listed = self._connection.get("/models", timeout_s=min(30.0, self._options.timeout_s))
        except StatusError as error:
            if wanted and error.status not in (401, 403):
                return {"id": wanted}
            raise
        cards = listed.get("data") if isinstance(listed, Mapping) else None
        cards = [card for card in cards or () if isinstance(card, Mapping) and "id" in card]
        found = next((card for card in cards if card["id"] == wanted), None)
        if found is None and not wanted and len(cards) == 1:
            return cards[0]  # type: ignore[no-any-return]
        if found is None and (cards or not wanted):
            names = ", ".join(str(card["id"]) for card in cards[:8]) or "a model's name"
            raise RecipeError(
                f"the endpoint has no model {wanted!r}" if wanted else f"the endpoint has {len(cards)} models",
                where=self._connection.url,
                expected=f"#{names}" if len(cards) == 1 else f"one of {names} after a #",
            )
        return found or {"id": wanted}

    def watch(self, watch: Watch) -> None:
        """See `RemoteAnswerer`."""
        self._watch = watch

    def read(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages as the endpoint gets them; the chat template is the server's."""
        return [{"role": message.role, "content": message.content} for message in messages]

    def answers(self, asks: Iterable[Ask]) -> Iterator[tuple[Ask, Reply]]:
        """Yield every answer as it comes; an iterator that is closed early leaves its requests to their fate.

        Raises:
            RolloutError: the endpoint refuses the key or the model, or cannot be reached any more.
        """
        drawn, drawing, stop = iter(asks), threading.Lock(), threading.Event()
        # Bounded: who takes the answers slowly, such as a slow grader, slows the asking.
        results: queue.Queue[tuple[Ask, Reply] | Exception | None] = queue.Queue(self._options.concurrency)

        def put(result: tuple[Ask, Reply] | Exception | None) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    results.put(result, timeout=1.0)
                    return

        def work() -> None:
            # Unless something else is caught, a fault of the program: its traceback is printed as the thread ends.
            end: Exception | None = RolloutError("a thread that asks has died", where=self.name, fix="see above why")
            try:
                while not stop.is_set():
                    with drawing:
                        ask = next(drawn, None)
                    if ask is None:
                        break
                    put((ask, self._answer(ask, stop)))
                end = None
            except TafkirError as error:
                end = error
            finally:
                put(end)

        # Daemons: an interrupted run must not wait for answers that take minutes.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(self._options.concurrency)]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                result = results.get()
                if isinstance(result, Exception):
                    raise result
                if result is None:
                    running -= 1
                else:
                    yield result
        finally:
            stop.set()

    def score(self, text: str) -> tuple[float, int]:
        """Raises RequestError: chat completions tell nothing of a text's own tokens."""
        raise RequestError(
            "an endpoint scores no text", where=self.name, expected="a checkpoint", fix="name its folder"
        )

    def close(self) -> None:
        """Close all connections."""
        self._connection.close()

    # --- one request -----------------------------------------------------------------------------------------------

    def _body(self, ask: Ask) -> dict[str, Any]:
        params = ask.params
        return {
            "model": self.model,
            "messages": ask.prompt,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
            "seed": params.seed,
            **self._options.extra_body,
        }

    def _answer(self, ask: Ask, stop: threading.Event) -> Reply:
        """The answer that an earlier run received, or a new one; each is told to who watches."""
        body = self._body(ask)
        parts = json.dumps([self.fingerprint, body], sort_keys=True)
        request_id = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
        if self._watch is None:
            return self._request(body, request_id, stop)
        if (known := self._watch.reply_to(request_id)) is not None:
            return known
        self._watch.asked(request_id, ask.key)
        reply = self._request(body, request_id, stop)
        if not reply.failure:
            self._watch.received(request_id, ask.key, reply)
        return reply

    def _request(self, body: Mapping[str, Any], request_id: str, stop: threading.Event) -> Reply:
        """The answer, however many attempts it takes; or a reply that says why there is none.

        `Idempotency-Key` is the same for what is sent again because nobody knows whether it came, and another one where
        an answer came that is of no use.
        """
        late = unusable = 0
        for attempt in range(self._options.max_retries + 1):
            began, pause = time.perf_counter(), 0.0
            try:
                key = {"Idempotency-Key": f"{request_id}-{unusable}" if unusable else request_id}
                reply = _read(self._connection.post("/chat/completions", body, headers=key))
                return replace(reply, latency_s=time.perf_counter() - began, retries=attempt)
            except TransientError as error:
                last: Exception = error
                late += error.kind == "late"
                pause = error.pause_s
                if late > _MAX_LATE:
                    break
            except StatusError as error:
                if error.status not in _OWN_FAULT:
                    raise
                return Reply(failure="error", reason=error.what, retries=attempt)
            except (NotJsonError, _Refused) as error:
                last = error
                unusable += 1
            if attempt < self._options.max_retries and stop.wait(self._pause(attempt, pause)):
                break
        if isinstance(last, TransientError) and last.kind == "down":
            self._need_alive()
        is_late = isinstance(last, TransientError) and last.kind == "late"
        what = last.what if isinstance(last, RolloutError) else str(last)
        return Reply(
            failure="timeout" if is_late else "error", reason=f"{what} ({attempt + 1} attempts)", retries=attempt
        )

    def _need_alive(self) -> None:
        """A dead server would fail all that is left within seconds; what is not asked stays to be asked."""
        try:
            self._connection.get("/models", timeout_s=min(30.0, self._options.timeout_s))
        except TransientError as error:
            raise RolloutError(
                f"the endpoint is gone: {error.what}",
                where=self._connection.url,
                fix="start it again, then run the same command: it goes on where it was",
            ) from error
        except RolloutError:
            # It speaks; that is enough.
            pass

    def _pause(self, attempt: int, asked: float) -> float:
        """Seconds until the next attempt; at random, so that requests that failed together do not return together."""
        backoff = min(_MAX_BACKOFF_S, self._options.backoff_s * 2.0**attempt)
        return min(_MAX_PAUSE_S, max(asked, backoff * random.uniform(0.5, 1.0)))


def _read(answer: Any) -> Reply:
    """The reply in a chat completion.

    Raises:
        _Refused: it is none, or holds neither an answer nor any thinking.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text = message.get("content")
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        finish_reason = str(choice.get("finish_reason") or "stop")
        usage = answer.get("usage") or {}
        tokens, prompt_tokens = (int(usage.get(name) or 0) for name in ("completion_tokens", "prompt_tokens"))
    except (LookupError, TypeError, AttributeError, ValueError):
        raise _Refused(f"not a chat completion: {json.dumps(answer)[:120]}") from None
    if not isinstance(text or "", str) or not isinstance(reasoning, str):
        raise _Refused("a completion whose content is no text")
    if not (text or reasoning).strip() and finish_reason != "length":
        raise _Refused(f"an empty answer (finish_reason {finish_reason})")
    return Reply(text or "", reasoning, tokens, prompt_tokens, finish_reason)
