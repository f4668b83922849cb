"""`tafkir serve --engine vllm|sglang|trtllm`: another engine on the planned layout, shown or started."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

__all__ = ["hand_over"]


def hand_over(checkpoint: Path, engine: str, hardware: str | None, port: int, *, print_only: bool) -> None:
    """Start an engine on the best layout that `tafkir plan` finds for a chat workload; this process becomes it.

    Requests as long as the model's context allows are planned for: no stretching unless the plan asks for it.

    Args:
        hardware: as `tafkir plan` takes it, such as `h100:8`.
        port: of the first server; each replica takes the next one.
        print_only: print the script instead.

    Raises:
        RecipeError: no such engine or chip, or none named.
        CapacityError: no layout holds the model.
        BackendUnavailable: the engine is not installed here.
    """
    from tafkir.cli.plan_question import deployment_of, look_up_chip, look_up_model
    from tafkir.errors import BackendUnavailable, CapacityError, RecipeError
    from tafkir.plan.advise import advise
    from tafkir.plan.launch import render_launch
    from tafkir.plan.launch.engines import server_of
    from tafkir.plan.workload import load_workload

    if hardware is None:
        raise RecipeError("on which chips?", where=f"--engine {engine}", fix="--hardware h100:8, or cpu")
    chip, count = look_up_chip(hardware, [], None)
    _, _, shape = look_up_model(str(checkpoint))
    deployment = deployment_of(shape, chip, None, engine, 2.0, None, 1.0, "datasheet")
    workload = load_workload("chat")
    share = min(1.0, shape.max_context / 2 / (workload.prompt_tokens + workload.output_tokens))
    prompt, output = (max(1, int(n * share)) for n in (workload.prompt_tokens, workload.output_tokens))
    workload = replace(workload, prompt_tokens=prompt, output_tokens=output)
    options, refusals = advise(deployment, workload, count, split=False)
    if not options:
        raise CapacityError(
            f"no layout holds it: {min(refusals, key=lambda refusal: refusal.missing).why}",
            where=f"--hardware {hardware}",
            fix=f"`tafkir plan {checkpoint} --hardware {hardware}` says what would",
        )
    script = render_launch(options[0], workload, str(checkpoint), engine)
    if print_only:
        print(script, end="")
        return
    program = server_of(options[0], workload, str(checkpoint), engine).program[0]
    if shutil.which(program) is None:
        raise BackendUnavailable(f"no {program} here", where=f"--engine {engine}", fix="install it, or add --print")
    sys.stdout.flush()
    os.execvpe("bash", ["bash", "-c", script], os.environ | {"PORT": str(port)})
