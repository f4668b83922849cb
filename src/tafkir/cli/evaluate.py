"""`tafkir eval MODEL...`: scores on published tasks, on held-out problems, on puzzles, or on needles in long texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tafkir.cli import eval_options as o
from tafkir.cli.serve import CacheNumbers
from tafkir.errors import RecipeError

__all__ = ["evaluate"]


def evaluate(
    models: o.ModelNames = None,
    task: o.OldTask = "problems",
    overrides: o.Overrides = None,
    name: o.RunName = None,
    runs_dir: o.RunsDir = Path("runs"),
    kv_cache: o.KvCache = CacheNumbers.AUTO,
    as_json: o.AsJson = False,
    lengths: o.Lengths = None,
    depths: o.Depths = None,
    samples: o.Samples = None,
    needles: o.Needles = None,
    list_: o.ListTasks = False,
    tasks: o.TaskNames = None,
    data: o.DataPaths = None,
    question_only: o.QuestionOnlyFlag = False,
    out: o.OutFolder = None,
    limit: o.Limit = 0,
    seed: o.Seed = 0,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    max_tokens: o.MaxTokens = None,
    until_settled: o.UntilSettled = None,
    curve: o.Curve = None,
    fail_on_error: o.FailOnError = False,
    max_total_tokens: o.MaxTotalTokens = None,
    max_seconds: o.MaxSeconds = None,
    max_cost: o.MaxCost = None,
    price: o.Price = None,
    concurrency: o.Concurrency = 32,
    timeout: o.Timeout = 3600,
    retries: o.Retries = 5,
    api_key_env: o.ApiKeyEnv = "OPENAI_API_KEY",
    extra_body: o.ExtraBody = None,
    sandbox: o.SandboxTier = None,
    unsafe: o.Unsafe = False,
    judge: o.Judge = None,
) -> None:
    """Score models on published tasks, on held-out problems, on puzzles, or on what they find in long texts.

    Answers and scores go to a run directory; the same command goes on where it was stopped.

        tafkir eval --list

        tafkir eval base-tiny runs/mine http://127.0.0.1:8000/v1#m --tasks gsm8k,svamp --limit 100

    With --tasks, all models and tasks share one results file: samples.jsonl, a line an answer. Answers that failed
    are no zeros: they are shown, and asked for again by the next call. docs/evaluation.md tells more.
    """
    if list_:
        _list(as_json)
        return
    of_tasks = {
        "data": data, "out": out, "limit": limit, "seed": seed, "temperature": temperature, "top_p": top_p,
        "max_tokens": max_tokens, "until_settled": until_settled, "curve": curve, "max_total_tokens": max_total_tokens,
        "max_seconds": max_seconds, "max_cost": max_cost, "price": price, "fail_on_error": fail_on_error,
        "extra_body": extra_body, "sandbox": sandbox, "unsafe": unsafe, "judge": judge,
        "question_only": question_only,
    }  # fmt: skip
    of_needle = {"lengths": lengths, "depths": depths, "num_needles": needles}
    if tasks is None:
        _refuse([name for name, value in of_tasks.items() if value], "to --tasks")
        _other(
            models or [], task, {**of_needle, "samples": samples}, overrides or [], name, runs_dir, kv_cache, as_json
        )
        return
    of_others = {"set": overrides, **of_needle, "task": task != "problems"}
    _refuse([name for name, value in of_others.items() if value], "without --tasks")
    of_tasks |= {"out": out or runs_dir / (name or "eval"), "samples": samples, "as_json": as_json}
    of_tasks |= {"concurrency": concurrency, "timeout": timeout, "retries": retries, "api_key_env": api_key_env}
    _tasks(models or [], tasks, {**of_tasks, "kv_cache": kv_cache.value})


def _list(as_json: bool) -> None:
    from tafkir.cli.eval_tasks import show_tasks

    show_tasks(as_json)


def _other(
    models: Sequence[str],
    task: str,
    of_needle: Mapping[str, Any],
    overrides: list[str],
    name: str | None,
    runs_dir: Path,
    kv_cache: CacheNumbers,
    as_json: bool,
) -> None:
    """Held-out problems, needles or puzzles, by one model."""
    if len(models) != 1:
        raise RecipeError(f"{len(models)} models given", where="eval", expected="one, or --tasks for several")
    given = {key: value for key, value in of_needle.items() if value is not None}
    if task == "needle":
        _refuse(["set"] if overrides else [], "to --task problems")
        _needle(models[0], given, name, runs_dir, as_json, kv_cache)
        return
    _refuse(list(given), "to --task needle")
    if task != "problems":
        from tafkir.cli.card import show_card

        _refuse(["set"] if overrides else [], "to --task problems")
        _refuse(["kv-cache"] if kv_cache is not CacheNumbers.AUTO else [], "to --task problems")
        show_card([models[0]], task, name=name, runs_dir=runs_dir, as_json=as_json)
    else:
        chosen = [] if kv_cache is CacheNumbers.AUTO else [f"eval.kv_cache={json.dumps(kv_cache.value)}"]
        _problems(models[0], [*chosen, *overrides], name, runs_dir, as_json)


def _refuse(given: Sequence[str], where: str) -> None:
    """Refuse options that belong elsewhere."""
    if given:
        options = ", ".join(f"--{name.removeprefix('num_').replace('_', '-')}" for name in given)
        verb = "belongs" if len(given) == 1 else "belong"
        fix = f"add {where.removeprefix('to ')}" if where.startswith("to --task ") else "see tafkir eval --help"
        raise RecipeError(f"{options} {verb} {where}", where="eval", fix=fix)


def _tasks(models: Sequence[str], names: str, given: Mapping[str, Any]) -> None:
    """Published tasks and one's own, by any number of models."""
    from tafkir.cli.eval_tasks import Ending, Models, evaluate_tasks, load_tasks
    from tafkir.eval.endpoint import EndpointOptions
    from tafkir.eval.harness import Budget, EvalSettings
    from tafkir.tasks.backends import Backends, choose_backends

    budget = Budget(given["max_total_tokens"], given["max_seconds"], given["max_cost"], _prices(given))
    options = EndpointOptions(
        given["concurrency"], given["timeout"], given["retries"], extra_body=_object(given["extra_body"])
    )
    limits = (budget.max_tokens, budget.max_seconds, budget.max_cost)
    backends = Backends(
        given["sandbox"], given["unsafe"], given["judge"] or "", judge_cache=given["out"] / "judged.jsonl"
    )
    with choose_backends(backends):
        evaluate_tasks(
            models,
            load_tasks(names, given["data"] or (), question_only=given["question_only"]),
            EvalSettings(
                samples=given["samples"],
                limit=given["limit"],
                seed=given["seed"],
                temperature=given["temperature"],
                top_p=given["top_p"],
                max_tokens=given["max_tokens"],
                until_settled=given["until_settled"],
            ),
            budget,
            Models(options, given["api_key_env"], given["kv_cache"], stops_early=any(limit for limit in limits)),
            Ending(
                [int(budget) for budget in _numbers(given["curve"], int, "--curve")] if given["curve"] else (),
                given["fail_on_error"],
                given["as_json"],
            ),
            given["out"],
        )


def _prices(given: Mapping[str, Any]) -> tuple[float, float]:
    if given["price"] is None:
        if given["max_cost"] is not None:
            raise RecipeError("a budget of money needs prices", where="--max-cost", fix="add --price IN,OUT")
        return 0.0, 0.0
    prices = _numbers(given["price"], float, "--price")
    if len(prices) != 2:
        raise RecipeError(f"{len(prices)} prices", where="--price", expected="two: of prompt and of answer tokens")
    return prices[0], prices[1]


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise RecipeError(f"not JSON ({error})", where="--extra-body", expected='an object: {"top_k": 20}') from None
    if not isinstance(value, dict):
        raise RecipeError("no JSON object", where="--extra-body", expected='such as {"top_k": 20}')
    return value


def _problems(checkpoint: str, overrides: list[str], name: str | None, runs_dir: Path, as_json: bool) -> None:
    """The recipe `eval`: held-out problems."""
    from tafkir.cli.completer import checkpoint_of
    from tafkir.cli.pipeline import run_recipe, select_stages
    from tafkir.recipe.load import load_recipe
    from tafkir.recipe.resolve import resolve_recipe
    from tafkir.runlog.rundir import RunDir

    folder = checkpoint_of(checkpoint)
    loaded = resolve_recipe(load_recipe(["eval"], [f"base={json.dumps(str(folder))}", *overrides]))
    run = RunDir(runs_dir / (name or _run_name("eval", folder)))
    result = run_recipe(loaded, run, select_stages(loaded.recipe))["eval"]
    if as_json:
        print(json.dumps({"run": str(run.path), **result}, indent=2))
        return
    for source, scores in result["stages"]["base"].items():
        print(f"{source:<8} {_scores_line(scores)}")
    for baseline, by_source in result["baselines"].items():
        print(f"baseline {baseline}: {_percent(by_source['all'])}")
    print(f"Report: {run.report_html}")


def _needle(
    checkpoint: str, given: dict[str, Any], name: str | None, runs_dir: Path, as_json: bool, kv_cache: CacheNumbers
) -> None:
    """Needles by length and depth; the answers in `eval/needle.jsonl`, the scores in `eval/needle.json`."""
    from tafkir.checkpoint.load import load_config
    from tafkir.cli.completer import checkpoint_of
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.eval.needle import NeedleSettings, evaluate_needles, render_needles
    from tafkir.runlog.atomic import write_json
    from tafkir.runlog.rundir import RunDir
    from tafkir.serve.loading import build_engine

    for key, kind in (("lengths", int), ("depths", float)):
        if key in given:
            given[key] = _numbers(given[key], kind, f"--{key}")
    folder = checkpoint_of(checkpoint)
    run = RunDir.create(runs_dir / (name or _run_name("needle", folder)))
    with run.lock():
        result = evaluate_needles(
            folder,
            NeedleSettings(**given),
            context=load_config(folder).max_position_embeddings,
            build_completer=lambda batch: build_engine(
                folder, Tokenizer.load(folder), None, max_batch=batch, kv_cache=kv_cache.value
            ),
            path=run.eval_dir / "needle.jsonl",
        )
        write_json(run.eval_dir / "needle.json", result)
    if as_json:
        print(json.dumps({"run": str(run.path), **result}, indent=2))
        return
    print(render_needles(result))
    print(f"Answers: {run.eval_dir / 'needle.jsonl'}")


def _numbers(text: str, kind: type[int] | type[float], option: str) -> tuple[float, ...]:
    """The numbers of an option, separated by commas."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"{text!r} is no list of numbers", where=option, expected="numbers with commas") from error


def _run_name(kind: str, checkpoint: Path) -> str:
    """`<kind>-<folder>`, or `<kind>-<run>-<stage>` for a checkpoint inside a run directory."""
    path = checkpoint.resolve()
    if path.name == "checkpoint" and path.parent.parent.name == "stages":
        return f"{kind}-{path.parents[2].name}-{path.parent.name.partition('-')[2]}"
    return f"{kind}-{path.name}"


def _scores_line(scores: dict[str, Any]) -> str:
    """Greedy and sampled accuracy of one source."""
    parts = [f"{metric} {_percent(scores[metric])}" for metric in ("greedy", "average") if metric in scores]
    return f"{'   '.join(parts)}   ({scores['greedy']['num_problems']:,} problems)"


def _percent(estimate: dict[str, Any]) -> str:
    return f"{100 * estimate['value']:.1f} % [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"
