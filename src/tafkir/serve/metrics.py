"""What the server counts, and its page in Prometheus' text format. Names are vLLM's wherever it has one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tafkir.engine.engine import Engine
    from tafkir.engine.speculative import Acceptance

__all__ = ["Counter", "Gauge", "Histogram", "ServerMetrics"]

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _labels(pairs: Sequence[tuple[str, str]]) -> str:
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in pairs) + "}" if pairs else ""


class Counter:
    """A number a label that only grows."""

    def __init__(self, name: str, meaning: str, label: str = "", values: Iterable[str] = ("",)) -> None:
        self.name, self._meaning, self._label = name, meaning, label
        self.values: dict[str, float] = dict.fromkeys(values, 0)

    def add(self, value: str = "", amount: float = 1) -> None:
        self.values[value] = self.values.get(value, 0) + amount

    def lines(self, common: Sequence[tuple[str, str]]) -> list[str]:
        name = f"{self.name}_total"
        out = [f"# HELP {name} {self._meaning}", f"# TYPE {name} counter"]
        for value, number in list(self.values.items()):
            own = [(self._label, value)] if self._label else []
            out.append(f"{name}{_labels([*common, *own])} {number:.15g}")
        return out


class Gauge(Counter):
    """A number a label that goes up and down; none until it is set."""

    def __init__(self, name: str, meaning: str, label: str = "") -> None:
        super().__init__(name, meaning, label, ())

    def lines(self, common: Sequence[tuple[str, str]]) -> list[str]:
        first, second, *samples = super().lines(common)
        samples = [line.replace("_total{", "{", 1) for line in samples]
        return [first.replace("_total ", " ", 1), second.replace("_total counter", " gauge"), *samples]


class Histogram:
    """Counts of observations at or below each bound."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float]) -> None:
        self.name, self._meaning, self._bounds = name, meaning, tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def lines(self, common: Sequence[tuple[str, str]]) -> list[str]:
        counts, below, out = list(self._counts), 0, []
        out += [f"# HELP {self.name} {self._meaning}", f"# TYPE {self.name} histogram"]
        for bound, count in zip((*(f"{bound:g}" for bound in self._bounds), "+Inf"), counts, strict=True):
            below += count
            out.append(f"{self.name}_bucket{_labels([*common, ('le', bound)])} {below}")
        return [*out, f"{self.name}_sum{_labels(common)} {self.sum:.9g}", f"{self.name}_count{_labels(common)} {below}"]


class ServerMetrics:
    """Written by the worker's thread and the gateway, read by /metrics."""

    def __init__(self) -> None:
        self.accepted = Counter("tafkir:requests", "Sequences accepted.")
        self.refused = Counter("vllm:admission_rejections", "Sequences refused because the queue was full.")
        self.finished = Counter(
            "vllm:request_success", "Sequences ended, by reason.", "finished_reason", ("stop", "length", "abort")
        )
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens of sequences that started.")
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens sampled.")
        self.prefix_queries = Counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = Counter("vllm:prefix_cache_hits", "Prompt tokens found there.")
        self.preemptions = Counter("vllm:num_preemptions", "Sequences that had to give their cache back.")
        self.weight_updates = Counter(
            "tafkir:weight_updates", "Checkpoints that were to be served.", "outcome", ("replaced", "refused")
        )
        self.responses = Counter("tafkir:http_responses", "HTTP answers, by status.", "code", ())
        self.ttft = Histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self.inter_token = Histogram("vllm:inter_token_latency_seconds", "Between tokens of a sequence.", _SECONDS)
        self.per_token = Histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time a token after the first, of a request.", _SECONDS
        )
        self.latency = Histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS)
        self.request_prompt = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_generated = Histogram("vllm:request_generation_tokens", "Tokens sampled for a request.", _TOKENS)
        self.iteration = Histogram("vllm:iteration_tokens_total", "Tokens sampled in an engine step.", _TOKENS)

        drafts = "vllm:spec_decode_num"
        self.drafts = Counter(f"{drafts}_drafts", "Drafts that were checked.")
        self.draft_tokens = Counter(f"{drafts}_draft_tokens", "Tokens of those drafts.")
        self.accepted_tokens = Counter(f"{drafts}_accepted_tokens", "Drafted tokens that were kept.")
        self.accepted_per_pos = Counter(
            f"{drafts}_accepted_tokens_per_pos", "Drafted tokens that were kept, by their place.", "position", ()
        )

        self.canary_rounds = Counter("tafkir:canary_rounds", "Times that all canaries were asked.")
        self.canary_round_time = Gauge("tafkir:canary_last_round_timestamp_seconds", "When the last round ended.")
        self.canary_light = Gauge("tafkir:canary_light", "0 green, 1 amber, 2 red, by signal.", "signal")
        self.canary_drift = Gauge("tafkir:canary_drift", "How far canaries are from the baseline.", "signal")
        self.canary_mean = Gauge("tafkir:canary_mean", "Means of the newest readings of all canaries.", "reading")

    def forget_canaries(self) -> None:
        """Other weights are served: what was read says nothing of them."""
        for gauge in (self.canary_light, self.canary_drift, self.canary_mean):
            gauge.values.clear()

    def note_drafts(self, seen: Acceptance) -> None:
        """Take over what speculative decoding has counted."""
        self.drafts.values[""] = seen.num_drafts
        self.draft_tokens.values[""] = seen.num_draft_tokens
        self.accepted_tokens.values[""] = seen.num_accepted_tokens
        self.accepted_per_pos.values.update({str(i): n for i, n in enumerate(list(seen.accepted_per_pos))})

    def note_cache(self, engine: Engine) -> None:
        """Take over what the engine has counted."""
        self.prefix_queries.values[""] = engine.prefix_queries
        self.prefix_hits.values[""] = engine.prefix_hits
        self.preemptions.values[""] = engine.num_preemptions

    def render(self, model: str, gauges: Sequence[tuple[str, str, float]]) -> str:
        """The page behind /metrics; `gauges` are (name, meaning, value) of this moment."""
        common = [("model_name", model)]
        lines = []
        for name, meaning, value in gauges:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} gauge", f"{name}{_labels(common)} {value:.12g}"]
        for metric in vars(self).values():
            lines += metric.lines(common)
        return "\n".join(lines) + "\n"
