"""Files for schedulers: held to their own schemas with unknown fields refused, parsed, and run where that is cheap."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tafkir.errors import CapacityError, RecipeError
from tafkir.plan.advise import Option
from tafkir.plan.hardware import load_chips
from tafkir.plan.launch import engine_flags, render_launch, render_torchrun
from tafkir.plan.launch.yaml import render_yaml
from tafkir.plan.layout import Layout
from tafkir.plan.references import find_shape
from tafkir.plan.serving import Speculation
from tafkir.plan.training import TrainJob, search_training
from tafkir.plan.workload import WORKLOADS
from tests.plan.test_launch import flags_of, option

CHAT = WORKLOADS["chat"]
SCHEMAS = Path(__file__).parent / "schemas"


@cache
def wide(number_bytes: float = 2.0) -> Option:
    return option("deepseek-r1", "h200", "fp8", 16, Layout(dp=16, ep=16), cache_dtype_bytes=number_bytes)


@cache
def small() -> Option:
    return option("qwen3-32b", "h100", "bf16", 8, Layout(tp=2))


@cache
def kinds() -> dict[str, Draft202012Validator]:
    table = json.loads((SCHEMAS / "kubernetes.json").read_text(encoding="utf-8"))
    return {kind: Draft202012Validator({**schema, "$defs": table["$defs"]}) for kind, schema in table["kinds"].items()}


def manifests(text: str) -> dict[str, Any]:
    """The documents of a file by kind, each held to the schema of its kind."""
    found = {}
    for document in yaml.safe_load_all(text):
        kinds()[f"{document['apiVersion']} {document['kind']}"].validate(document)
        # What no schema says: names are DNS labels (RFC 1123).
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"])
        found[document["kind"]] = document
    return found


def chips_of(pod: dict[str, Any]) -> int:
    return int(pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])


def bash_accepts(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)


def test_a_deployment_and_what_belongs_around_it() -> None:
    found = manifests(render_launch(small(), CHAT, "Qwen/Qwen3-32B", "k8s"))
    kinds_found = {"Deployment", "Service", "PodDisruptionBudget", "ServiceMonitor", "ScaledObject", "HTTPRoute"}
    assert set(found) == kinds_found
    spec = found["Deployment"]["spec"]
    pod = spec["template"]
    assert spec["replicas"] * chips_of(pod) == 8
    container = pod["spec"]["containers"][0]
    bash_accepts(container["args"][0])
    flags = flags_of(container["args"][0].replace("\\\n", "").split())
    assert flags["--tensor-parallel-size"] == "2" and set(flags) - {"--port"} <= engine_flags("vllm")
    startup = container["startupProbe"]
    # The weights take 66 s to read at 1 GB/s; the pod is not killed before.
    assert startup["periodSeconds"] * startup["failureThreshold"] > 2 * 65
    labels = pod["metadata"]["labels"]
    for kind in ("Service", "PodDisruptionBudget"):
        selector = found[kind]["spec"]["selector"]
        assert (selector if kind == "Service" else selector["matchLabels"]).items() <= labels.items()
    watched = found["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert watched.items() <= found["Service"]["metadata"]["labels"].items()
    target = found["ScaledObject"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", found["Deployment"]["metadata"]["name"])


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_replica_over_nodes_is_a_leader_worker_set(engine: str, tmp_path: Path) -> None:
    found = manifests(render_launch(wide(), CHAT, "/models/r1", "k8s", engine=engine))
    spec = found["LeaderWorkerSet"]["spec"]
    group = spec["leaderWorkerTemplate"]
    assert spec["replicas"] * group["size"] * chips_of(group["workerTemplate"]) == 16
    leader, worker = (group[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    assert "readinessProbe" in leader and "readinessProbe" not in worker
    assert found["Service"]["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    said = run_with_fakes(worker["args"][0], tmp_path, LWS_WORKER_INDEX="1", LWS_LEADER_ADDRESS="leader-0")
    flags = flags_of(said[0])
    if engine == "vllm":
        assert {"--data-parallel-start-rank": "8", "--data-parallel-address": "leader-0"}.items() <= flags.items()
        assert "--headless" in flags and "--port" not in flags
        assert {"--data-parallel-size": "16", "--data-parallel-size-local": "8"}.items() <= flags.items()
        assert set(flags) <= engine_flags("vllm")
    else:
        assert {"--node-rank": "1", "--dist-init-addr": "leader-0:20000", "--tp-size": "16"}.items() <= flags.items()


def run_with_fakes(script: str, folder: Path, **env: str) -> list[list[str]]:
    """Run a script with programs that only write down how they were called."""
    log = folder / "calls"
    for name in ("vllm", "python", "ray", "trtllm-serve", "trtllm-llmapi-launch"):
        fake = folder / name
        fake.write_text(f'#!/bin/bash\nprintf "%s\\t" "{name}" "$@" >> "{log}"; echo >> "{log}"\n')
        fake.chmod(0o755)
    (folder / "scontrol").write_text("#!/bin/bash\nset -e\necho n7; sleep 0.2; echo n8\n")
    (folder / "srun").write_text(
        '#!/bin/bash\nshift; while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=1 exec "$@"\n'
    )
    for name in ("scontrol", "srun"):
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **env}
    subprocess.run(["bash", "-c", script], env=environment, check=True, timeout=30, capture_output=True)
    return [line.rstrip("\t\n").split("\t") for line in log.read_text().splitlines()]


def test_schemas_refuse_what_they_do_not_know() -> None:
    text = render_launch(small(), CHAT, "q", "k8s")
    for right, wrong in (
        ("replicas: 4", "replica: 4"),
        ("replicas: 4", 'replicas: "four"'),
        ("interval:", "intervall:"),
    ):
        with pytest.raises(Exception, match=r"replica|intervall|four"):
            manifests(text.replace(right, wrong))
    lws = render_launch(wide(), CHAT, "q", "k8s")
    with pytest.raises(Exception, match="siz"):
        manifests(lws.replace("size: 2", "siz: 2"))
    task = yaml.safe_load(render_launch(small(), CHAT, "q", "skypilot"))
    with pytest.raises(Exception, match="num_node"):
        sky_accepts({**task, "num_node": 2})


def sky_accepts(task: dict[str, Any]) -> None:
    Draft202012Validator(json.loads((SCHEMAS / "skypilot.json").read_text(encoding="utf-8"))).validate(task)


def test_slurm_starts_every_node_of_every_replica(tmp_path: Path) -> None:
    script = render_launch(small(), CHAT, "Qwen/Qwen3-32B", "slurm")
    bash_accepts(script)
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.M))
    assert directives["array"] == "0-3" and directives["gpus-per-node"] == "2"
    (call,) = run_with_fakes(script, tmp_path, SLURM_ARRAY_TASK_ID="2", SLURM_JOB_NODELIST="n7")
    assert call[:3] == ["vllm", "serve", "Qwen/Qwen3-32B"] and flags_of(call)["--port"] == "8002"
    over = render_launch(wide(1), CHAT, "/models/r1", "slurm", engine="trtllm")
    assert "--mpi=pmix" in over and "#SBATCH --ntasks-per-node=8" in over
    (tmp_path / "mpi").mkdir()
    (call,) = run_with_fakes(over, tmp_path / "mpi", SLURM_JOB_NODELIST="n")
    assert call[:3] == ["trtllm-llmapi-launch", "trtllm-serve", "serve"]
    flags = flags_of(call)
    assert set(flags) - {"--port"} <= engine_flags("trtllm")
    options = yaml.safe_load(Path(flags["--extra_llm_api_options"]).read_text())
    cache = {"dtype": "fp8", "free_gpu_memory_fraction": 0.9}
    assert options == {"enable_attention_dp": True, "kv_cache_config": cache}


def test_skypilot_takes_the_task() -> None:
    for chosen, nodes in ((small(), 1), (wide(), 2)):
        task = yaml.safe_load(render_launch(chosen, CHAT, "q", "skypilot"))
        sky_accepts(task)
        bash_accepts(task["run"])
        accelerators = task["resources"]["accelerators"]
        assert task["num_nodes"] == nodes
        assert nodes * sum(accelerators.values()) == chosen.fleet.chips
    with pytest.raises(RecipeError, match="no cloud's catalogue"):
        render_launch(option("ring-flash-2.0", "h20", "fp8", 4, Layout(tp=4)), CHAT, "q", "skypilot")


def fields_of(path: str, name: str) -> set[str]:
    """Annotated fields of a class in a file of the installed Ray, read as text."""
    found = importlib.util.find_spec("ray")
    if found is None or not found.submodule_search_locations:
        pytest.skip("Ray is not installed")
    tree = ast.parse((Path(found.submodule_search_locations[0]) / path).read_text(encoding="utf-8"))
    (node,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)
    return {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def test_ray_serve_knows_every_key() -> None:
    config = yaml.safe_load(render_launch(small(), CHAT, "Qwen/Qwen3-32B", "ray"))
    assert set(config) <= fields_of("serve/schema.py", "ServeDeploySchema")
    (application,) = config["applications"]
    assert set(application) <= fields_of("serve/schema.py", "ServeApplicationSchema")
    (model,) = application["args"]["llm_configs"]
    llm = "llm/_internal/serve/core/configs/llm_config.py"
    assert set(model) <= fields_of(llm, "LLMConfig")
    assert set(model["model_loading_config"]) <= fields_of(llm, "ModelLoadingConfig")
    assert set(model["deployment_config"]["autoscaling_config"]) <= fields_of("serve/config.py", "AutoscalingConfig")
    flags = {f"--{name.replace('_', '-')}" for name in model["engine_kwargs"]}
    assert flags <= engine_flags("vllm") and model["engine_kwargs"]["tensor_parallel_size"] == 2
    for chosen, engine, message in ((wide(), "vllm", "copies attention"), (small(), "sglang", "starts vLLM")):
        with pytest.raises(RecipeError, match=message):
            render_launch(chosen, CHAT, "q", "ray", engine=engine)


def test_vllm_over_nodes(tmp_path: Path) -> None:
    script = render_launch(wide(), CHAT, "r1", "vllm")
    (call,) = run_with_fakes(script, tmp_path, NODE_RANK="0", MASTER_ADDR="a")
    assert flags_of(call)["--port"] == "8000" and "--headless" not in call
    piped = option("deepseek-r1", "h100", "fp8", 16, Layout(tp=8, pp=2, ep=8))
    leader = run_with_fakes(render_launch(piped, CHAT, "r1", "vllm"), tmp_path, NODE_RANK="0", MASTER_ADDR="a")
    assert leader[-2][:3] == ["ray", "start", "--head"]
    assert flags_of(leader[-1])["--distributed-executor-backend"] == "ray"
    worker = run_with_fakes(render_launch(piped, CHAT, "r1", "vllm"), tmp_path, NODE_RANK="1", MASTER_ADDR="a")
    assert worker[-1] == ["ray", "start", "--address=a:6379", "--block"]


def test_trtllm_on_a_node(tmp_path: Path) -> None:
    drafting = option("deepseek-r1", "b200", "nvfp4", 8, Layout(tp=8, ep=8), speculation=Speculation(1))
    script = render_launch(drafting, CHAT, "r1", "trtllm")
    (call,) = run_with_fakes(script, tmp_path)
    flags = flags_of(call)
    assert set(flags) - {"--port"} <= engine_flags("trtllm") and flags["--ep_size"] == "8"
    options = yaml.safe_load(Path(flags["--extra_llm_api_options"]).read_text())
    assert options == {"speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 1}}
    with pytest.raises(RecipeError, match="started by MPI"):
        render_launch(wide(), CHAT, "r1", "trtllm")
    long = replace(CHAT, prompt_tokens=2.0 * drafting.fleet.decode.shape.max_context)
    with pytest.raises(CapacityError, match="does not stretch"):
        render_launch(drafting, long, "r1", "trtllm")


def test_torchrun_gets_layouts_that_tafkir_trains() -> None:
    job = TrainJob(find_shape("ring-flash-2.0"), load_chips(own_only=True)["h100"], 64, 1e12)
    script = render_torchrun(search_training(job), job, "ring.toml")
    bash_accepts(script)
    sizes = {name: int(value) for name, value in re.findall(r"parallel\.(\w+)=(\d+)", script)}
    assert "--nnodes=8" in script and "--nproc-per-node=8" in script
    assert 64 % (sizes["expert_parallel"] * sizes["tensor_parallel"]) == 0


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, True, None, "", "yes", "null", "1e3", "x: y", "# no", "-", "ok/word-1"], "b": {}, "c": []},
        {"script": "if x; then\n\n  echo 'a: b'\nfi\n", "end": "no\nnewline"},
        {"list": [{"a": {"b": [1]}}, [[1], ["z"]], "two\nlines\n"]},
        {"quoted key/x": "a\tb", "unicode": "تفكير", "leaderworkerset.sigs.k8s.io/worker-index": "0"},
    ],
)
def test_yaml_reads_back(value: dict[str, Any]) -> None:
    assert yaml.safe_load(render_yaml(value)) == value
