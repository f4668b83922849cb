"""Measures any OpenAI server under load: time to the first token and per token, throughput, goodput. Without torch."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import httpx

from tafkir.errors import BackendUnavailable
from tafkir.runlog.progress import Progress
from tafkir.serve.traffic import Lengths, Load, Planned, plan_requests

__all__ = ["Goal", "LoadReport", "Measured", "Target", "run_load", "summarize"]

Send = Callable[[int], Awaitable[None]]

_CONTENT = ("content", "reasoning_content", "reasoning", "tool_calls")
_SAMPLE_WORDS = "river stone paper light garden window seven market train winter " * 2


@dataclass(frozen=True, slots=True)
class Target:
    """A server: the URL up to and with `/v1`, the model, which API to call, and a key."""

    url: str
    model: str = ""
    api: Literal["completions", "chat"] = "completions"
    api_key: str = ""
    ignore_eos: bool = True
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request must keep to count as good: seconds to the first token, seconds a token after it."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1


@dataclass(slots=True)
class Measured:
    """One request. Times are seconds; `status` is the HTTP status, 0 where the connection broke, `detail` why."""

    status: int = 0
    sent_s: float = 0.0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    gaps_s: list[float] = field(default_factory=list)
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.answer_tokens > 0 and not self.detail

    @property
    def tpot_s(self) -> float | None:
        """Mean time a token after the first; None where there is no second."""
        return (self.latency_s - self.ttft_s) / (self.answer_tokens - 1) if self.answer_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What users met. Distributions are {mean, p50, p90, p99, max} in seconds; rates are a second."""

    requests: int
    succeeded: int
    statuses: dict[str, int]
    wall_s: float
    prompt_tokens: int
    answer_tokens: int
    requests_per_s: float
    tokens_per_s: float
    goodput_per_s: float
    good_share: float
    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    gap_s: dict[str, float]
    latency_s: dict[str, float]
    refusal_s: dict[str, float]
    failures: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    shares = {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": ordered[-1]}
    return {"mean": statistics.fmean(ordered), **shares}


def summarize(measured: Sequence[Measured], wall_s: float, goal: Goal) -> LoadReport:
    """Percentiles (linear between observations) and the goodput: requests a second that kept the goal (DistServe)."""
    good = [m for m in measured if m.ok and m.ttft_s <= goal.ttft_s and (m.tpot_s or 0.0) <= goal.tpot_s]
    done = [m for m in measured if m.ok]
    return LoadReport(
        requests=len(measured),
        succeeded=len(done),
        statuses=dict(Counter(str(m.status) for m in measured)),
        wall_s=wall_s,
        prompt_tokens=sum(m.prompt_tokens for m in done),
        answer_tokens=sum(m.answer_tokens for m in done),
        requests_per_s=len(done) / wall_s,
        tokens_per_s=sum(m.answer_tokens for m in done) / wall_s,
        goodput_per_s=len(good) / wall_s,
        good_share=len(good) / len(measured),
        ttft_s=_spread([m.ttft_s for m in done]),
        tpot_s=_spread([m.tpot_s for m in done if m.tpot_s is not None]),
        gap_s=_spread([gap for m in done for gap in m.gaps_s]),
        latency_s=_spread([m.latency_s for m in done]),
        refusal_s=_spread([m.latency_s for m in measured if m.status in (429, 503)]),
        failures=sorted({m.detail for m in measured if m.detail})[:5],
    )


def run_load(target: Target, load: Load, lengths: Lengths, *, seed: int = 0) -> tuple[list[Measured], float]:
    """Send the load; what each request met, in the order of the plan, and the wall time in seconds.

    Raises:
        BackendUnavailable: the server cannot be reached, has no such model, or refuses a plain request.
    """
    return asyncio.run(_run(target, load, lengths, seed))


async def _run(target: Target, load: Load, lengths: Lengths, seed: int) -> tuple[list[Measured], float]:
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=target.url.rstrip("/") + "/", headers=headers, timeout=target.timeout_s, limits=limits
    ) as http:
        model, tokens_per_word = await _probe(http, target)
        plan = plan_requests(load, lengths, tokens_per_word, seed)
        results = [Measured() for _ in plan]
        began = time.perf_counter()
        with Progress("bench", total=len(plan)) as progress:
            done = 0

            async def send(i: int) -> None:
                nonlocal done
                results[i].sent_s = time.perf_counter() - began
                await _measure(http, target, model, plan[i], results[i])
                done += 1
                progress.update(done, tokens=results[i].answer_tokens)

            await (_by_the_clock(plan, send, began) if load.rate else _one_after_another(plan, send, load.concurrency))
        return results, time.perf_counter() - began


async def _one_after_another(plan: Sequence[Planned], send: Send, concurrency: int) -> None:
    queue = iter(range(len(plan)))

    async def work() -> None:
        for i in queue:
            await send(i)

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(plan)))))


async def _by_the_clock(plan: Sequence[Planned], send: Send, began: float) -> None:
    async def later(i: int) -> None:
        await asyncio.sleep(max(0.0, plan[i].at_s - (time.perf_counter() - began)))
        await send(i)

    await asyncio.gather(*(later(i) for i in range(len(plan))))


async def _probe(http: httpx.AsyncClient, target: Target) -> tuple[str, float]:
    """The model's name, and how many tokens its tokenizer makes of a word; a request also warms the server up."""
    try:
        model = target.model
        if not model:
            listed = await http.get("models")
            listed.raise_for_status()
            model = listed.json()["data"][0]["id"]
        counts = []
        for words in (_SAMPLE_WORDS.strip(), "river"):
            path, body = _request(target, model, words, 1, stream=False)
            answer = await http.post(path, json=body)
            if answer.status_code != 200:
                raise BackendUnavailable(
                    f"a plain request was refused ({answer.status_code}: {answer.text[:200]})",
                    where=target.url,
                    fix="try --no-ignore-eos, --api chat, or another --model",
                )
            counts.append(answer.json()["usage"]["prompt_tokens"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise BackendUnavailable(
            f"this is no OpenAI server that answers ({type(error).__name__}: {error})",
            where=target.url,
            expected="a URL that ends in /v1",
        ) from None
    return model, max(0.05, (counts[0] - counts[1]) / (len(_SAMPLE_WORDS.split()) - 1))


def _request(target: Target, model: str, words: str, tokens: int, *, stream: bool) -> tuple[str, dict[str, Any]]:
    """Path and body of one request."""
    body: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if target.ignore_eos:
        body["ignore_eos"] = True
    if target.api == "chat":
        return "chat/completions", {**body, "messages": [{"role": "user", "content": words}]}
    return "completions", {**body, "prompt": words}


async def _measure(http: httpx.AsyncClient, target: Target, model: str, planned: Planned, result: Measured) -> None:
    """Send one request, and note in `result` what it met."""
    path, body = _request(target, model, planned.words, planned.answer_tokens, stream=True)
    began = last = time.perf_counter()
    events = 0
    try:
        async with http.stream("POST", path, json=body) as response:
            result.status = response.status_code
            if response.status_code != 200:
                text = (await response.aread()).decode("utf-8", "replace")
                result.detail = f"{response.status_code}: {text[:200]}"
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                now = time.perf_counter()
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    result.detail = str(chunk["error"])[:200]
                    break
                if usage := chunk.get("usage"):
                    result.prompt_tokens, result.answer_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                if not _says_something(chunk):
                    continue
                if events:
                    result.gaps_s.append(now - last)
                else:
                    result.ttft_s = now - began
                events, last, result.latency_s = events + 1, now, now - began
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        result.detail = f"{type(error).__name__}: {error}"[:200]
    if not result.latency_s:
        result.latency_s = time.perf_counter() - began
    result.answer_tokens = result.answer_tokens or events


def _says_something(chunk: dict[str, Any]) -> bool:
    """Whether a chunk brings tokens: text, a thought, a call, or the end of them."""
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or choice.get("finish_reason") or any(delta.get(k) for k in _CONTENT):
            return True
    return False
