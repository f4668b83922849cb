"""`tafkir eval` beside lm-evaluation-harness: one server, one checkpoint, the same prompts, greedy; item by item.

Both are whole commands against the same `tafkir serve`, in turn. lm-eval gets the prompts of our task as a task of its
own (a JSON file and a YAML); its score is `exact_match` of the last box. Its environment is another one, named by
`--lm-eval`.

    OMP_NUM_THREADS=1 python benchmarks/eval_vs_lm_eval.py base-tiny --lm-eval ../venv-peers/bin/lm_eval \\
        --out benchmarks/results/eval_vs_lm_eval.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from tafkir.eval.samples import load_samples
from tafkir.runlog.atomic import write_json
from tafkir.runlog.rundir import describe_environment
from tafkir.tasks.catalog import load_task

TASK = r"""task: gsm8k_boxed
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], do_sample: false, temperature: 0, max_gen_toks: {max_tokens}}}
filter_list:
  - name: boxed
    filter:
      - {{function: regex, regex_pattern: '\\boxed\{{([^}}]*)\}}', group_select: -1}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [","]}}
"""


def _serve(checkpoint: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tafkir.cli.main", "serve", checkpoint, "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=1).close()
            return process, url
        except OSError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit("the server does not start")


def _timed(command: list[str], **more: Any) -> tuple[float, float]:
    """Wall and CPU seconds of a command and its children."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, **more)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--lm-eval", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    task = load_task("gsm8k")
    examples = task.examples("test")[: options.limit]
    times: dict[str, list[tuple[float, float]]] = {"tafkir": [], "lm_eval": []}
    server, url = _serve(options.checkpoint)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = [
                {"id": example.id, "prompt": task.prompt(example)[-1].content, "answer": example.answer}
                for example in examples
            ]
            (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            (folder / "task.yaml").write_text(TASK.format(data=folder / "data.jsonl", max_tokens=options.max_tokens))
            model = json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["id"]
            offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": "x"}
            for number in range(options.repeats):
                theirs = [
                    options.lm_eval, "run", "--model", "local-chat-completions", "--model_args",
                    f"model={model},base_url={url}/v1/chat/completions,num_concurrent=32,max_retries=3",
                    "--include_path", str(folder), "--tasks", "gsm8k_boxed", "--apply_chat_template",
                    "--log_samples", "--output_path", str(folder / f"theirs-{number}"),
                ]  # fmt: skip
                ours = [
                    sys.executable, "-m", "tafkir.cli.main", "eval", f"{url}/v1", "--tasks", "gsm8k",
                    "--limit", str(options.limit), "--temperature", "0", "--max-tokens", str(options.max_tokens),
                    "--out", str(folder / f"ours-{number}"),
                ]  # fmt: skip
                times["tafkir"].append(_timed(ours))
                times["lm_eval"].append(_timed(theirs, env=offline))
                print(number, {side: found[-1] for side, found in times.items()}, flush=True)
            agreement = _agreement(folder)
    finally:
        server.terminate()
        server.wait()
    wall, cpu = ([[pair[i] for pair in times[side]] for side in ("tafkir", "lm_eval")] for i in (0, 1))
    result = {
        "items": len(examples),
        **agreement,
        "wall_s": {"tafkir": statistics.median(wall[0]), "lm_eval": statistics.median(wall[1])},
        "wall_ratio": statistics.median(a / b for a, b in zip(*wall, strict=True)),
        "cpu_s": {"tafkir": statistics.median(cpu[0]), "lm_eval": statistics.median(cpu[1])},
        "cpu_ratio": statistics.median(a / b for a, b in zip(*cpu, strict=True)),
        "times": times,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, {**result, "environment": describe_environment()})


def _agreement(folder: Path) -> dict[str, Any]:
    """Verdicts of the first runs of both, by item."""
    ours = {sample.item: sample for sample in load_samples(folder / "ours-0")}
    (path,) = (folder / "theirs-0").rglob("samples_*.jsonl")
    theirs = {row["doc"]["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    assert ours.keys() == theirs.keys()
    unequal = [item for item, row in theirs.items() if ours[item].correct != (row["exact_match"] == 1.0)]
    return {
        "accuracy": {
            "tafkir": statistics.fmean(sample.correct for sample in ours.values()),
            "lm_eval": statistics.fmean(row["exact_match"] for row in theirs.values()),
        },
        "same_verdict": len(ours) - len(unequal),
        "same_text": sum(theirs[item]["resps"][0][0].strip() == ours[item].text.strip() for item in ours),
        "unequal": [
            {"item": item, "ours": ours[item].text, "theirs": theirs[item]["resps"][0][0], "gold": ours[item].expected}
            for item in unequal
        ],
    }


if __name__ == "__main__":
    main()
