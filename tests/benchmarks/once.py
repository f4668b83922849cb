"""Comparisons with TRL, one after the other, in a process that imports TRL once: their children are forks of it.

`python once.py '[["rl_vs_trl", "--repeats", "1"], ...]'`
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def in_fork(script: ModuleType, spec: dict[str, Any], threads: int) -> dict[str, Any]:
    """What `alternate.in_child` gives, from a fork of this process."""
    import torch

    with tempfile.NamedTemporaryFile("r") as result:
        if (pid := os.fork()) == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                torch.set_num_threads(threads)
                Path(result.name).write_text(json.dumps(script.work(**spec)))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            sys.exit(f"{spec} failed")
        return dict(json.load(result))


def main() -> None:
    import torch._dynamo  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.grpo_trainer
    import trl.trainer.reward_trainer  # noqa: F401

    for name, *args in json.loads(sys.argv[1]):
        script = import_module(name)
        script.in_child = lambda _, spec, *, threads=1, script=script: in_fork(script, spec, threads)  # type: ignore[attr-defined]
        sys.argv = [name, *args]
        script.main()
        sys.stdout.flush()


if __name__ == "__main__":
    main()
