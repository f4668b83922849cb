"""The dashboard and the alerts name only metrics that the server's page or vLLM's has."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator

from tafkir.serve import app
from tafkir.serve.metrics import ServerMetrics
from tafkir.serve.monitoring import FILES, read_monitoring
from tests.conftest import ROOT

SCHEMAS = Path(ROOT) / "tests" / "plan" / "schemas" / "kubernetes.json"


def test_every_metric_exists() -> None:
    named = {metric for name in FILES for metric in re.findall(r"(?:vllm|tafkir):\w+", read_monitoring(name))}
    metrics = ServerMetrics()
    metrics.responses.add("200")
    for gauge in (metrics.canary_light, metrics.canary_drift, metrics.canary_round_time):
        gauge.values["x"] = 1.0
    page = metrics.render(
        "m", [(name, "", 0.0) for name in re.findall(r'"((?:vllm|tafkir):\w+)"', inspect.getsource(app))]
    )
    served = set(re.findall(r"^([a-z]+:\w+)", page, re.M))
    assert len(served) > 20 and len(named) > 12
    assert named <= served, named - served


def test_files_are_what_their_readers_take() -> None:
    table = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    schema = {**table["kinds"]["monitoring.coreos.com/v1 PrometheusRule"], "$defs": table["$defs"]}
    Draft202012Validator(schema).validate(yaml.safe_load(read_monitoring("alerts")))
    dashboard = json.loads(read_monitoring("dashboard"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 8
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    for expression in (target["expr"] for panel in panels for target in panel["targets"]):
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")
