"""`tafkir eval MODEL... --tasks`: k samples an item from every model, each on disk as it ends, and continued later."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tafkir.errors import DataError, RecipeError
from tafkir.eval.answers import Answerer, Ask, RemoteAnswerer, Reply, split_thinking
from tafkir.eval.journal import JOURNAL_NAME, Journal
from tafkir.eval.perplexity import PERPLEXITY, measure_text
from tafkir.eval.samples import Sample, append_sample, load_samples
from tafkir.eval.scores import estimate_of, item_scores
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Example, Message, SamplingParams
from tafkir.runlog.metrics import JsonlWriter
from tafkir.runlog.progress import Progress
from tafkir.tasks.catalog import EvalTask, grade_recorded
from tafkir.tasks.published.base import TURN, Conversation

__all__ = ["Budget", "EvalSettings", "Evaluation", "evaluate_models", "grade_sample"]

# Answers that wait for their verdict; with more of them no further answer is taken.
_MAX_UNGRADED = 128


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """How every task is sampled; None takes what the task's card says.

    Attributes:
        samples: answers an item, each with a seed of its own.
        limit: only the first so many items of each task; 0 is all.
        seed: from which those of all answers are derived.
        until_settled: with this, all items get one more answer each, round after round, until the 95 % interval of the
            task's score is no wider (0.05: five points), or `samples` is reached.
        graders: answers that are graded at once.
    """

    samples: int | None = None
    limit: int = 0
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    until_settled: float | None = None
    graders: int = 4


@dataclass(slots=True)
class Budget:
    """What one invocation may spend; None is no limit. Answers that are under way when it is spent are still taken.

    Attributes:
        max_tokens: of prompts and completions together, as the model counts them.
        max_seconds: of wall time.
        max_cost: in the currency of `prices`.
        prices: of a million prompt tokens, and of a million completion tokens.
    """

    max_tokens: int | None = None
    max_seconds: float | None = None
    max_cost: float | None = None
    prices: tuple[float, float] = (0.0, 0.0)
    prompt_tokens: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def cost(self) -> float:
        return (self.prompt_tokens * self.prices[0] + self.tokens * self.prices[1]) / 1e6

    def spent(self) -> str:
        """Which budget is spent, in words; empty while none is."""
        used = self.prompt_tokens + self.tokens
        if self.max_tokens is not None and used >= self.max_tokens:
            return f"the budget of {self.max_tokens:,} tokens is spent ({used:,})"
        if self.max_seconds is not None and time.monotonic() - self.began >= self.max_seconds:
            return f"the budget of {self.max_seconds:g} s is spent"
        if self.max_cost is not None and self.cost >= self.max_cost:
            return f"the budget of {self.max_cost:g} is spent ({self.cost:.4g})"
        return ""


@dataclass(slots=True)
class Evaluation:
    """What an invocation did.

    Attributes:
        samples: the answers to all that was wanted, of earlier invocations, too; by model, task, repeat and item.
        wanted: how many answers were wanted; fewer samples mean that a budget was spent.
        asked: requests that this invocation sent answers of to the file.
        retries: attempts that failed before an answer came.
        resent: requests that an earlier invocation had sent when it was killed, and that were sent again.
        stopped: which budget was spent; empty where none was.
        seconds: wall time.
        settled: (model, task) -> rounds that it took, for tasks that settled before all samples were drawn.
    """

    samples: list[Sample] = field(default_factory=list)
    wanted: int = 0
    asked: int = 0
    retries: int = 0
    resent: int = 0
    stopped: str = ""
    seconds: float = 0.0
    settled: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Planned:
    """One answer that is wanted, with all that its line says before it is there."""

    task: EvalTask
    example: Example
    ask: Ask
    blank: Sample


def evaluate_models(
    models: Sequence[Answerer],
    tasks: Sequence[EvalTask],
    settings: EvalSettings,
    path: Path,
    *,
    budget: Budget | None = None,
) -> Evaluation:
    """Get and grade every answer that `path` does not hold yet.

    A line is appended as each answer is graded. Answers that failed are asked for again; those that were graded by
    another version of the task, or whose grader failed, are graded again from the text that is stored.

    Args:
        path: JSON-lines file of all models and tasks; the caller sees to it that no other process writes it, nor
            `requests.jsonl` beside it, where what is sent and received stands until it is graded.

    Raises:
        RecipeError: several samples are wanted at temperature 0, where all are one.
        DataError: a task's data is missing or two of its items share an id; two models have one name.
        RolloutError: an endpoint is gone or refuses what is asked; what came before is in the file.
    """
    if len({model.name for model in models}) < len(models):
        raise RecipeError("two models have one name", where="eval", fix="name them: first=MODEL second=MODEL")
    known = {sample.identity: sample for sample in load_samples(path)} if path.exists() else {}
    plans = {(model.name, task.name): _plan(model, task, settings) for model in models for task in tasks}
    began = time.monotonic()
    with _Run(path, known, plans, budget or Budget(), settings) as run:
        for model in models:
            own = {key: rounds for key, rounds in plans.items() if key[0] == model.name}
            if settings.until_settled is None:
                run.answer(model, [one for rounds in own.values() for row in rounds for one in row])
            else:
                _answer_in_rounds(run, model, own, settings.until_settled)
            model.close()
    result = run.result
    for rounds in plans.values():
        for row in rounds:
            result.samples += [run.known[one.blank.identity] for one in row if one.blank.identity in run.known]
    result.seconds = time.monotonic() - began
    return result


def _answer_in_rounds(
    run: _Run, model: Answerer, plans: Mapping[tuple[str, str], list[list[_Planned]]], width: float
) -> None:
    """One more answer to every item of each task, until the task's interval is narrow enough."""
    open_plans = dict(plans)
    number = 0
    while open_plans:
        run.answer(model, [one for rounds in open_plans.values() for one in rounds[number]])
        if run.result.stopped:
            return
        number += 1
        for key, rounds in list(open_plans.items()):
            drawn = [run.known.get(one.blank.identity) for row in rounds[:number] for one in row]
            scores = item_scores([sample for sample in drawn if sample])
            interval = estimate_of(scores) if scores else None
            if number == len(rounds):
                del open_plans[key]
            elif interval and interval.high - interval.low <= width:
                run.settle(key, number, sum(map(len, rounds[number:])))
                del rounds[number:], open_plans[key]


# ---- the plan ------------------------------------------------------------------------------------------------------


def _plan(model: Answerer, task: EvalTask, settings: EvalSettings) -> list[list[_Planned]]:
    """All answers that are wanted of one model to one task: a row a repeat."""
    examples = task.examples("test")
    if len({example.id for example in examples}) < len(examples):
        raise DataError("two items have the same id", where=task.name, expected="distinct ids")
    if not examples:
        raise DataError("the task has no items", where=task.name, expected="at least one in its part test")
    examples = examples[: settings.limit or None]
    params = _params(task, settings)
    samples = settings.samples or (1 if params.temperature == 0 else task.card.sampling.samples)
    is_scored = task.card.metric == PERPLEXITY
    if is_scored:
        samples = 1
    if params.temperature == 0 and samples > 1:
        raise RecipeError(
            f"{samples} samples at temperature 0 are {samples} times the same answer",
            where=task.name,
            fix="leave --samples out, or give a --temperature above 0",
        )
    rows: list[list[_Planned]] = [[] for _ in range(samples)]
    for example in examples:
        prompt = example.question if is_scored else model.read(task.prompt(example))
        mark = _hash([model.fingerprint, task.name, example.id, prompt])
        for repeat, row in enumerate(rows):
            row.append(_planned(model, task, example, prompt, mark, params, repeat, settings.seed))
    return rows


def _params(task: EvalTask, settings: EvalSettings) -> SamplingParams:
    own = task.card.sampling
    return SamplingParams(
        temperature=own.temperature if settings.temperature is None else settings.temperature,
        top_p=own.top_p if settings.top_p is None else settings.top_p,
        max_tokens=settings.max_tokens or own.max_tokens,
    )


def _planned(
    model: Answerer,
    task: EvalTask,
    example: Example,
    prompt: object,
    mark: str,
    params: SamplingParams,
    repeat: int,
    base_seed: int,
) -> _Planned:
    # 31 bits: some servers take no more.
    seed = derive_seed(base_seed, "eval", task.name, example.id, repeat) >> 32
    params = replace(params, seed=seed)
    version = task.card.version
    key = _hash([mark, repeat, params.temperature, params.top_p, params.max_tokens, seed])
    blank = Sample(
        key=f"{key}-v{version}",
        model=model.name,
        task=task.name,
        task_version=version,
        item=example.id,
        source=example.source,
        subject=example.subject,
        difficulty=example.difficulty,
        repeat=repeat,
        seed=seed,
        question=example.question,
        text="",
        reasoning="",
        outcome="error",
        reward=0.0,
        extracted=None,
        expected=example.answer,
        reason="",
        tokens=0,
        finish_reason="error",
        latency_s=0.0,
        fingerprint=model.fingerprint,
    )
    return _Planned(task, example, Ask(key, prompt, params), blank)


def _hash(parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode("utf-8"), digest_size=12).hexdigest()


# ---- the run -------------------------------------------------------------------------------------------------------


class _Run:
    """Asks, grades and writes; answers are graded in threads of their own while the model goes on."""

    def __init__(
        self,
        path: Path,
        known: dict[str, Sample],
        plans: Mapping[tuple[str, str], list[list[_Planned]]],
        budget: Budget,
        settings: EvalSettings,
    ) -> None:
        self.known, self.result, self._budget = known, Evaluation(), budget
        wanted = [one for rounds in plans.values() for row in rounds for one in row]
        self.result.wanted = len(wanted)
        self._done = sum(self._is_done(one) for one in wanted)
        self._graded = self._correct = self._failed = 0
        self._lock = threading.Lock()
        self._ungraded: deque[Future[None]] = deque()
        self._writer = JsonlWriter(path)
        done = {one.ask.key for one in wanted if self._is_done(one)}
        self._journal = Journal(path.with_name(JOURNAL_NAME), done)
        self._progress = Progress("eval", total=len(wanted), start=self._done)
        self._pool = ThreadPoolExecutor(settings.graders, thread_name_prefix="grade")

    def __enter__(self) -> _Run:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        # Answers that are there already get their verdict and their line, whatever ends the run.
        self._pool.shutdown(wait=True)
        self._writer.close()
        self._journal.close(finished=error[0] is None)
        self.result.resent = self._journal.resent
        self._progress.__exit__(*error)  # type: ignore[arg-type]

    def _is_done(self, one: _Planned) -> bool:
        sample = self.known.get(one.blank.identity)
        return sample is not None and sample.key == one.blank.key and not sample.failed

    def settle(self, key: tuple[str, str], rounds: int, saved: int) -> None:
        """A task needs no more than these rounds."""
        self.result.settled[key] = rounds
        self.result.wanted -= saved
        self._progress.total -= saved

    def answer(self, model: Answerer, wanted: Sequence[_Planned]) -> None:
        """Get, grade and write what is not there yet."""
        missing: dict[str, _Planned] = {}
        for one in wanted:
            sample = self.known.get(one.blank.identity)
            if one.task.card.metric == PERPLEXITY:
                if not self._is_done(one) and not self._is_spent():
                    self.result.asked += 1
                    self._write(measure_text(model, one.blank))
            elif sample is None or sample.finish_reason in ("error", "turn"):
                missing[one.ask.key] = one
            elif not self._is_done(one):
                self._submit(one, replace(one.blank, **_answer_of(sample)))
        if isinstance(model, RemoteAnswerer):
            model.watch(self._journal)
        while missing and not self.result.stopped:
            asked = missing
            missing = {}
            for ask, reply in model.answers(self._draw(model, asked)):
                if self._take(asked[ask.key], reply):
                    missing[ask.key] = asked[ask.key]
        while self._ungraded:
            self._ungraded.popleft().result()

    def _draw(self, model: Answerer, missing: Mapping[str, _Planned]) -> Iterator[Ask]:
        for one in missing.values():
            if self._is_spent():
                return
            begun = self._begun(one)
            prompt = _next_prompt(one, begun) if begun else None
            yield replace(one.ask, prompt=model.read(prompt)) if prompt else one.ask

    def _begun(self, one: _Planned) -> Sample | None:
        """The turns so far of a conversation that goes on."""
        sample = self.known.get(one.blank.identity)
        return sample if sample is not None and sample.finish_reason == "turn" else None

    def _is_spent(self) -> bool:
        self.result.stopped = self.result.stopped or self._budget.spent()
        return bool(self.result.stopped)

    def _take(self, one: _Planned, reply: Reply) -> bool:
        """Grade and write an answer; True where the conversation goes on after it."""
        self.result.asked += 1
        self.result.retries += reply.retries
        self._budget.tokens += reply.tokens
        self._budget.prompt_tokens += reply.prompt_tokens
        thinking, text = (reply.reasoning, reply.text) if reply.reasoning else split_thinking(reply.text)
        begun = self._begun(one)
        if begun and reply.failure:  # the turns before stand, and the next call goes on after them
            self._submit(one, replace(begun, outcome=reply.failure, reason=reply.reason))
            return False
        sample = replace(
            one.blank,
            text=f"{begun.text}{TURN}{text}" if begun else text,
            reasoning=f"{begun.reasoning}{TURN}{thinking}" if begun else thinking,
            outcome=reply.failure or "error",
            reason=reply.reason,
            tokens=reply.tokens + (begun.tokens if begun else 0),
            prompt_tokens=reply.prompt_tokens + (begun.prompt_tokens if begun else 0),
            finish_reason="error" if reply.failure else reply.finish_reason,
            latency_s=round(reply.latency_s + (begun.latency_s if begun else 0.0), 4),
        )
        if _next_prompt(one, sample) is not None:
            sample = replace(sample, finish_reason="turn", reason="the conversation goes on")
            append_sample(self._writer, sample)
            self.known[sample.identity] = sample
            return True
        self._submit(one, sample)
        return False

    def _submit(self, one: _Planned, sample: Sample) -> None:
        self._ungraded.append(self._pool.submit(self._finish, one, sample))
        while self._ungraded and (self._ungraded[0].done() or len(self._ungraded) > _MAX_UNGRADED):
            self._ungraded.popleft().result()

    def _finish(self, one: _Planned, sample: Sample) -> None:
        if sample.finish_reason not in ("error", "turn"):
            sample = grade_sample(one.task, one.example, sample)
        self._write(sample)

    def _write(self, sample: Sample) -> None:
        with self._lock:
            append_sample(self._writer, sample)
            self.known[sample.identity] = sample
            self._done += 1
            self._failed += sample.failed
            self._graded += not sample.failed
            self._correct += sample.correct
            numbers = {"accuracy": self._correct / max(1, self._graded)}
            if self._failed:
                numbers["errors"] = float(self._failed)
            self._progress.update(self._done, tokens=sample.tokens, **numbers)


def _next_prompt(one: _Planned, sample: Sample) -> list[Message] | None:
    """What the model reads after the answers so far; None where there is no more to say, or the last was cut off."""
    if not isinstance(one.task, Conversation):
        return None
    goes_on = ("stop", "turn") if one.task.ends_when_cut else ("stop", "turn", "length")
    return one.task.next_prompt(one.example, sample.text.split(TURN)) if sample.finish_reason in goes_on else None


def _answer_of(sample: Sample) -> dict[str, Any]:
    """What a stored sample knows of the answer itself."""
    names = ("text", "reasoning", "tokens", "prompt_tokens", "finish_reason", "latency_s")
    return {name: getattr(sample, name) for name in names}


def grade_sample(task: EvalTask, example: Example, sample: Sample) -> Sample:
    """The sample with its verdict; a scorer that raises is an outcome "error" that says so."""
    verdict = grade_recorded(task, example, sample.text, finished=sample.finish_reason != "length")
    return replace(
        sample,
        outcome=verdict.outcome,
        reward=verdict.reward,
        extracted=verdict.extracted,
        expected=verdict.expected,
        reason=verdict.reason,
        sandbox=verdict.sandbox,
        task_version=task.card.version,
    )
