"""Counters of the server in Prometheus' text format, without a client library."""

from __future__ import annotations

from tafkir.serve.worker import EngineWorker

__all__ = ["render_metrics"]


def render_metrics(worker: EngineWorker) -> str:
    """The page behind /metrics. Names follow vLLM's, with our prefix."""
    stats = worker.stats
    gauges = {
        "num_requests_running": ("Sequences that are being generated.", worker.num_running),
        "num_requests_waiting": ("Sequences that wait for a place.", worker.num_waiting),
        "kv_cache_bytes": ("Bytes of the key-value cache.", worker.engine.cache_bytes),
    }
    counters = {
        "requests_total": ("Sequences accepted.", stats.requests),
        "admission_rejections_total": ("Sequences refused because the queue was full.", stats.refused),
        "prompt_tokens_total": ("Prompt tokens of sequences that started.", stats.prompt_tokens),
        "generation_tokens_total": ("Tokens sampled.", stats.generation_tokens),
    }
    lines = []
    for kind, table in (("gauge", gauges), ("counter", counters)):
        for name, (meaning, value) in table.items():
            lines += [f"# HELP tafkir_{name} {meaning}", f"# TYPE tafkir_{name} {kind}", f"tafkir_{name} {value}"]
    lines += [
        "# HELP tafkir_request_success_total Sequences ended, by reason.",
        "# TYPE tafkir_request_success_total counter",
    ]
    lines += [f'tafkir_request_success_total{{finished_reason="{k}"}} {n}' for k, n in stats.finished.items()]
    lines += [
        "# HELP tafkir_time_to_first_token_seconds Wall time from arrival to the first token.",
        "# TYPE tafkir_time_to_first_token_seconds summary",
        f"tafkir_time_to_first_token_seconds_sum {stats.time_to_first_token_s:.6f}",
        f"tafkir_time_to_first_token_seconds_count {stats.first_tokens}",
    ]
    return "\n".join(lines) + "\n"
