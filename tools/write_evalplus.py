"""Write the HumanEval+ and MBPP+ files of the package from EvalPlus' own; needs `evalplus`, which knows input types.

python tools/write_evalplus.py HumanEvalPlus.jsonl.gz MbppPlus.jsonl.gz src/tafkir/datasets/evalplus
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from evalplus.data.mbpp import mbpp_deserialize_inputs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src" / "tafkir" / "tasks"))
from sandbox_program import encode


def _row(task: dict[str, Any], is_mbpp: bool) -> dict[str, Any]:
    row = {name: task[name] for name in ("task_id", "prompt", "entry_point", "canonical_solution", "atol")}
    for part in ("base_input", "plus_input"):
        inputs = mbpp_deserialize_inputs(task["task_id"], task[part]) if is_mbpp else task[part]
        row[part] = [encode(tuple(arguments)) for arguments in inputs]
    return row


def main() -> None:
    human, mbpp, out = map(Path, sys.argv[1:])
    for path, name in ((human, "humaneval.jsonl.gz"), (mbpp, "mbpp.jsonl.gz")):
        tasks = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        lines = [json.dumps(_row(task, path == mbpp), ensure_ascii=False, separators=(",", ":")) for task in tasks]
        (out / name).write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
