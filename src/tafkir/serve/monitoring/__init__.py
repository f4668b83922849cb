"""A Grafana dashboard and Prometheus alerts for servers that count under vLLM's names, as Tafkir and vLLM do."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FILES", "read_monitoring"]

_HERE = Path(__file__).resolve().parent

FILES = {"dashboard": "dashboard.json", "alerts": "alerts.yaml"}
"""What there is: a dashboard to import into Grafana, and a PrometheusRule."""


def read_monitoring(name: str) -> str:
    """The text of a file of `FILES`, by its name there."""
    return (_HERE / FILES[name]).read_text(encoding="utf-8")
