"""Decode tokens/s at several numbers of sequences and the time to a first token, beside other engines in one run.

    python benchmarks/decode.py --prepare                # once: models, GGUF files, vLLM's compile cache
    python benchmarks/decode.py --quick --out benchmarks/results/decode.json      # 15 minutes on two quiet cores
    python benchmarks/decode.py --threads 1 --cpu --cells dense:bfloat16:1 --peers transformers --also nvfp4=FOLDER

Every engine is a process of its own (`decode_sides.py`, run by the Python of its environment: `--python vllm=...`) that
stays through the cells of a model and a dtype; while another one has its turn it is stopped, so that no thread of it
spins. Engines take turns, in another order each time. Prompts are random ids, greedy, nothing ends early; no prefix
cache.

`decode` is the rate of tokens after the first ones: all but one of each sequence over the time of a batch less that of
the same batch asked for one token. `all` counts every token and the whole time, prompts included. Ratios are Tafkir's
over the other's, within a turn; the table has their medians. `--cpu` takes CPU-seconds in place of the clock: for
machines that do something else as well, and one thread (idle threads that spin count, too).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KINDS = ("moe", "dense")
DTYPES = ("float32", "bfloat16")
PEERS = ("transformers", "vllm", "llama.cpp")
QUICK = {"output": 64, "repeats": 3}
FULL = {"output": 128, "repeats": 5}
HERE = Path(__file__).parent
# Byte-level BPE of Qwen2: what llama.cpp wants to read; prompts are ids, so how text is split does not matter.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def folder_of(models: Path, kind: str, dtype: str) -> Path:
    return models / dtype / f"tiny-qwen3-{kind}"


def make_models(models: Path, script: Path) -> None:
    """The two models of the serving issue in both dtypes, and their GGUF files."""
    for dtype in DTYPES:
        if not folder_of(models, "dense", dtype).exists():
            command = [sys.executable, str(script), "--out", str(models / dtype), "--dtype", dtype]
            subprocess.run(command, check=True, stdout=sys.stderr)
        for kind in KINDS:
            gguf = models / f"{kind}-{dtype}.gguf"
            if not gguf.exists():
                write_gguf(folder_of(models, kind, dtype), gguf, "f32" if dtype == "float32" else "bf16")


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """By `tafkir export gguf`, from a folder whose tokenizer splits text as llama.cpp knows it."""
    with tempfile.TemporaryDirectory() as temporary:
        for path in source.iterdir():
            (Path(temporary) / path.name).symlink_to(path.resolve())
        place = Path(temporary) / "tokenizer.json"
        tokenizer = json.loads(place.read_text(encoding="utf-8"))
        split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
        bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_]}
        place.unlink()
        place.write_text(json.dumps(tokenizer), encoding="utf-8")
        command = [sys.executable, "-m", "tafkir.cli.main", "export", "gguf", temporary, str(target), "--type", kind]
        subprocess.run(command, check=True, stdout=sys.stderr)


class Side:
    """An engine's process, stopped except in its turns."""

    def __init__(self, name: str, spec: dict[str, Any], python: str, log: Path) -> None:
        threads = str(spec["threads"])
        env = os.environ | {
            "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "active", "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
        }  # fmt: skip
        if python != sys.executable:
            env.pop("PYTHONPATH", None)
        self.name, self._log = name, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(HERE / "decode_sides.py"), json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env, text=True,
                start_new_session=True,
            )  # fmt: skip
        self.ready_s: float = self._answer()["ready_s"]
        os.killpg(self._process.pid, signal.SIGSTOP)

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed:\n{self._log.read_text(errors='replace')[-3000:]}")
        return dict(json.loads(line))

    def take_turn(self, job: dict[str, int]) -> dict[str, float]:
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        found = self._answer()
        os.killpg(self._process.pid, signal.SIGSTOP)
        return found

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def sides_of(args: argparse.Namespace, kind: str, dtype: str) -> dict[str, dict[str, Any]]:
    """Settings by name; ours comes first."""
    model = folder_of(args.models, kind, dtype)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    shared = {"model": str(model), "dtype": dtype, "vocab": vocab, "threads": args.threads}
    found = {"tafkir": {**shared, "side": "tafkir"}}
    for text in args.also:
        name, _, folder = text.partition("=")
        folder, *marks = folder.split("+")
        precision = next((mark for mark in ("high", "medium") if mark in marks), "highest")
        own = {"model": folder or str(model), "precision": precision, "options": {"int8_head": "int8-head" in marks}}
        found[f"tafkir {name}"] = {**shared, "side": "tafkir", **own}
    for peer in args.peers:
        spec = {**shared, "side": peer, "eager": args.eager, "unified": False}
        spec["gguf"] = str(args.models / f"{kind}-{dtype}.gguf")
        found[peer] = spec
    return found


def rates(run: dict[str, float], job: dict[str, int], unit: str) -> dict[str, float]:
    """Tokens a second, of all tokens and of those after the first ones."""
    first, whole = ("first_cpu_s", "cpu_s") if unit == "cpu" else ("first_s", "wall_s")
    return {
        "decode": job["sequences"] * (job["output"] - 1) / max(run[whole] - run[first], 1e-9),
        "all": job["sequences"] * job["output"] / run[whole],
    }


def measure(sides: list[Side], job: dict[str, int], repeats: int, unit: str) -> dict[str, Any]:
    """One cell: medians and spreads by the engine's name, and ours over each; a single output token: seconds."""
    found: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for repeat in range(repeats):
        turn = repeat % len(sides)
        for side in sides[turn:] + sides[:turn]:
            run = side.take_turn(job)
            seconds = {"ttft_s": run["first_cpu_s" if unit == "cpu" else "first_s"]}
            found[side.name].append(seconds if job["output"] == 1 else rates(run, job, unit))
    rows: dict[str, Any] = {}
    for name, runs in found.items():
        rows[name] = {}
        for key in runs[0]:
            values = [run[key] for run in runs]
            pairs = [ours[key] / run[key] for ours, run in zip(found[sides[0].name], runs, strict=True)]
            rows[name][key] = round(statistics.median(values), 4 if key == "ttft_s" else 1)
            rows[name][f"{key}_range"] = [round(min(values), 4), round(max(values), 4)]
            rows[name][f"ours_over_{key}"] = round(statistics.median(pairs), 3)
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row a cell: decode rates (seconds to the first token), and in brackets ours over them."""
    names = list(dict.fromkeys(name for result in results for name in result["engines"]))
    lines = [f"| cell | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for result in results:
        cells = []
        for name in names:
            row = result["engines"].get(name)
            key = "decode" if row and "decode" in row else "ttft_s"
            cells.append(f"{row[key]:g} ({row[f'ours_over_{key}']:.2f}x)" if row else "")
        lines.append(f"| {result['cell']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_group(
    args: argparse.Namespace, kind: str, dtype: str, counts: list[str], results: list[dict[str, Any]]
) -> None:
    """All cells of one model and dtype; an engine's ending is everybody's, whatever happens."""
    started: list[Side] = []
    try:
        for name, spec in sides_of(args, kind, dtype).items():
            python = dict(text.split("=", 1) for text in args.python).get(name, sys.executable)
            started.append(Side(name, spec, python, args.logs / f"{name.replace(' ', '-')}-{kind}-{dtype}.log"))
            print(f"{kind} {dtype}: {name} ready in {started[-1].ready_s:.1f} s", file=sys.stderr, flush=True)
        for count in counts:
            job = {"sequences": 1, "prompt": args.ttft, "output": 1}
            if count != "ttft":
                job = {"sequences": int(count), "prompt": args.prompt, "output": args.output}
            if args.prepare:
                continue
            found = measure(started, job, args.repeats, "cpu" if args.cpu else "wall")
            results.append({"cell": f"{kind}:{dtype}:{count}", **job, "engines": found})
            print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            if args.out:
                keys = ("prompt", "output", "repeats", "threads", "eager", "cpu")
                head = {"command": " ".join(["python", *sys.argv]), **{key: getattr(args, key) for key in keys}}
                args.out.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")
    finally:
        for side in started:
            side.end()


def parse() -> argparse.Namespace:
    cells = [f"{kind}:{dtype}:{n}" for kind in KINDS for dtype in DTYPES for n in ("1", "8", "32", "ttft")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/bench-models"), help="made there where they are not")
    parser.add_argument("--script", type=Path, default=Path("../shared/bench/make_models.py"), help="what makes them")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["transformers", "vllm", "llama.cpp"])
    parser.add_argument("--python", nargs="*", default=[], metavar="PEER=PYTHON", help="of each engine's environment")
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="NAME=FOLDER",
        help="our engine, too, on these (no folder: the cell's model); FOLDER+int8-head+medium: --weights int8-head, "
        "--matmul-precision medium"
    )  # fmt: skip
    parser.add_argument("--cells", nargs="+", default=cells, metavar="MODEL:DTYPE:N", help="N sequences, or ttft")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=FULL["output"])
    parser.add_argument("--repeats", type=int, default=FULL["repeats"])
    parser.add_argument("--ttft", type=int, default=1024, help="tokens of that cell's prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK['output']} tokens, {QUICK['repeats']} turns")
    parser.add_argument("--eager", action="store_true", help="vLLM without its compiler: 30 seconds to start, not 80")
    parser.add_argument("--cpu", action="store_true", help="CPU-seconds in place of the clock")
    parser.add_argument("--prepare", action="store_true", help="make what is missing, start every engine once, end")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for key, value in QUICK.items() if args.quick else ():
        setattr(args, key, value)
    return args


def main() -> None:
    args = parse()
    if args.prepare:
        make_models(args.models, args.script)
    groups: dict[tuple[str, str], list[str]] = {}
    for cell in args.cells:
        kind, dtype, count = cell.split(":")
        groups.setdefault((kind, dtype), []).append(count)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as logs:
        args.logs = Path(logs)
        for (kind, dtype), counts in groups.items():
            run_group(args, kind, dtype, counts, results)
    if results:
        print(table(results))


if __name__ == "__main__":
    main()
