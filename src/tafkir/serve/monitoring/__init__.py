"""A Grafana dashboard and Prometheus alerts for servers that count under vLLM's names, as Tafkir and vLLM do."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ENGINE_METRICS", "FILES", "read_monitoring"]

_HERE = Path(__file__).resolve().parent

FILES = {"dashboard": "dashboard.json", "alerts": "alerts.yaml"}
"""What there is: a dashboard to import into Grafana, and a PrometheusRule."""

ENGINE_METRICS = (
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
)
"""Metrics that vLLM has (github.com/vllm-project/vllm, vllm/v1/metrics/loggers.py) and `tafkir serve` need not."""


def read_monitoring(name: str) -> str:
    """The text of a file of `FILES`, by its name there."""
    return (_HERE / FILES[name]).read_text(encoding="utf-8")
