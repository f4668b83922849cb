"""`tafkir plan`: what a model takes to serve and to train, term by term, before anything is rented."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from tafkir.plan.advise import Option, Refusal
    from tafkir.plan.hardware import Chip
    from tafkir.plan.layout import Layout
    from tafkir.plan.precision import Precision
    from tafkir.plan.serving import Deployment
    from tafkir.plan.shapes import ModelShape
    from tafkir.plan.simulate import SimulatedLoad
    from tafkir.plan.training import TrainOption
    from tafkir.plan.workload import Workload

__all__ = ["app"]

_DEFAULT = "model"


class _PlanGroup(TyperGroup):
    """`tafkir plan NAME` means `tafkir plan model NAME` unless NAME is a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_PlanGroup,
    help="Plan what a model takes: `tafkir plan MODEL --hardware h20:4`. See also `claims` and `hardware`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with exact numbers.")]
HardwareFile = Annotated[
    list[Path] | None,
    typer.Option("--hardware-file", metavar="FILE", help="TOML that adds chips or replaces keys; repeatable."),
]

HardwareName = Annotated[
    str, typer.Option("--hardware", metavar="CHIP[:COUNT]", help="Such as h20:4; cpu measures this machine.")
]
PrecisionName = Annotated[
    str | None, typer.Option("--precision", help="bf16, fp8, int8, nvfp4, nvfp4-v1, w4a16 or fp32 (bf16).")
]
WorkloadName = Annotated[str, typer.Option("--workload", metavar="NAME|FILE", help="chat, reasoning, or a TOML file.")]
Objective = Annotated[str, typer.Option("--objective", help="cost, latency or chips: what is ranked first.")]
LayoutText = Annotated[
    str | None, typer.Option("--layout", metavar="SIZES", help="Look at one alone, such as tp8,ep8 or tp2,pp2.")
]
KvBytes = Annotated[
    float, typer.Option("--kv-bytes", min=0.5, max=4, help="Of one number in the cache: 2, or 1 for FP8.")
]
Speculate = Annotated[
    str | None, typer.Option("--speculate", metavar="TOKENS[:ACCEPTANCE]", help="Drafted tokens a step, as 1:0.85.")
]
Skew = Annotated[float, typer.Option("--skew", min=1.0, help="The busiest expert group's load over the mean's.")]
DollarsPerHour = Annotated[
    float | None, typer.Option("--price", min=0.0, help="Dollars for one chip and hour, in place of the table's.")
]
Level = Annotated[
    str, typer.Option("--coefficients", metavar="LEVEL|FILE", help="fitted, datasheet, or one's own bench JSON.")
]
Mfu = Annotated[
    float | None, typer.Option("--mfu", min=0.001, max=1.0, help="With --train: instead of the computed one.")
]
TrainEngine = Annotated[
    str | None, typer.Option("--train-engine", help="With --train: megatron, torchtitan or mindspeed.")
]
Simulate = Annotated[
    int,
    typer.Option("--simulate", min=0, metavar="N", help="Show percentiles under load, from N simulated requests."),
]
Router = Annotated[
    str | None,
    typer.Option("--router", help="With --simulate: all replicas behind random, round_robin or least_loaded."),
]
DayRate = Annotated[
    float, typer.Option("--day", min=0.0, metavar="RATE", help="Show a day whose traffic peaks at RATE requests/s.")
]
Emit = Annotated[
    str | None, typer.Option("--emit", metavar="ENGINE", help="Print the script that starts it: vllm or sglang.")
]
CheckpointName = Annotated[
    str | None, typer.Option("--checkpoint", help="With --emit: folder or hub name to serve (MODEL).")
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Preset, published shape, checkpoint folder, run, or recipe.")
]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the command line means, looked up."""

    name: str
    kind: str
    chips: int
    deployment: Deployment
    workload: Workload
    workload_name: str
    only: Layout | None


@app.command(_DEFAULT)
def plan_model(
    model: ModelName,
    hardware: HardwareName = "h100:8",
    precision: PrecisionName = None,
    workload: WorkloadName = "chat",
    objective: Objective = "cost",
    layout: LayoutText = None,
    engine: Annotated[str, typer.Option("--engine", help="Whose constants: sglang, trtllm or vllm.")] = "vllm",
    kv_bytes: KvBytes = 2.0,
    speculate: Speculate = None,
    skew: Skew = 1.0,
    price: DollarsPerHour = None,
    coefficients: Level = "fitted",
    top: Annotated[int, typer.Option("--top", min=1, help="Layouts to show.")] = 6,
    hardware_file: HardwareFile = None,
    train: Annotated[bool, typer.Option("--train", help="Plan training instead of serving.")] = False,
    tokens: Annotated[float, typer.Option("--tokens", min=1.0, help="With --train: of the whole run.")] = 1e12,
    sequence: Annotated[int, typer.Option("--sequence", min=1, help="With --train: tokens of one.")] = 4096,
    batch_tokens: Annotated[float, typer.Option("--batch-tokens", min=1.0, help="With --train: of one step.")] = 16e6,
    mfu: Mfu = None,
    train_engine: TrainEngine = None,
    simulate: Simulate = 0,
    router: Router = None,
    day: DayRate = 0.0,
    emit: Emit = None,
    checkpoint: CheckpointName = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the terms that every number is made of.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a model takes to serve, or with --train to train: what fits, how fast, and what it costs.

    \b
    tafkir plan ring-flash-2.0 --hardware h20:4 --precision fp8
    tafkir plan deepseek-r1 --hardware b200:8 --precision nvfp4 --workload reasoning --explain
    tafkir plan qwen3-32b --hardware h100:2 --simulate 20000  percentiles, and the load where waiting begins
    tafkir plan ./my-model --hardware cpu                     this machine, measured on the spot
    tafkir plan deepseek-v3 --hardware h800:2048 --train --precision fp8 --tokens 14.8e12
    tafkir plan qwen3-32b --hardware h100:4 --emit vllm --checkpoint Qwen/Qwen3-32B > serve.sh
    tafkir plan hardware | claims

    \b
    layout     TP splits matrices, PP layers, DP copies attention, EP spreads experts; `2 x` is replicas
    users      requests at once that keep the workload's longest waits (means; --simulate gives percentiles)
    TTFT       to the first token; TPOT between tokens after that
    dollars    for a million tokens, low / mid / high as prices are quoted
    """
    chip, count = _hardware(hardware, hardware_file or [], price)
    name, kind, shape = _find_shape(model)
    if train:
        _plan_training(
            name, shape, chip, count, precision, tokens, sequence, batch_tokens, mfu, train_engine, explain, as_json
        )
        return
    deployment = _deployment(shape, chip, precision, engine, kv_bytes, speculate, skew, coefficients)
    from tafkir.plan.layout import parse_layout
    from tafkir.plan.workload import load_workload

    only = parse_layout(layout) if layout else None
    asked = _Asked(name, kind, count, deployment, load_workload(workload), workload, only)
    if emit:
        _emit(asked, objective, emit, checkpoint or model)
        return
    if day:
        _plan_day(asked, objective, day, as_json)
        return
    _plan_serving(asked, objective, top, explain, as_json, simulate, router)


@app.command("hardware")
def hardware(hardware_file: HardwareFile = None, as_json: AsJson = False) -> None:
    """List the chips that are known: dense peaks, memory, links, prices, and where each figure is from.

    One's own files, later ones on top: ~/.config/tafkir/hardware.toml, ./tafkir-hardware.toml, those that
    TAFKIR_HARDWARE names, --hardware-file.
    """
    from tafkir.plan.hardware import load_chips

    chips = load_chips(hardware_file or [])
    if as_json:
        print(json.dumps([_chip_json(chip) for chip in chips.values()], indent=2))
        return
    head = ("chip", "TFLOPS dense", "GB", "TB/s", "link GB/s", "W", "$/h low/mid/high", "from")
    _print_table(head, [_chip_cells(chip) for chip in chips.values()], left=(0, 1, 7))


@app.command("claims")
def claims(as_json: AsJson = False) -> None:
    """Recompute what five systems say of themselves: claim, inputs, computed value, verdict."""
    from dataclasses import asdict

    from tafkir.plan.claims import check_claims

    found = check_claims()
    if as_json:
        print(json.dumps([asdict(claim) for claim in found], indent=2, ensure_ascii=False))
        return
    system = ""
    for claim in found:
        if claim.system != system:
            system = claim.system
            print(f"\n{system}")
        print(f"  {claim.verdict:<14} {claim.claim}")
        print(f"  {'':<14} computed: {claim.computed}")
        print(f"  {'':<14} from: {claim.inputs}")


def _find_shape(name: str) -> tuple[str, str, ModelShape]:
    """A model of `tafkir model show`, or a published shape that only the planner knows.

    Raises:
        RecipeError: there is none of that name.
    """
    from tafkir.cli.model import find_model
    from tafkir.errors import RecipeError
    from tafkir.plan.references import find_shape
    from tafkir.plan.shapes import list_shapes, load_shape, shape_of

    if name in list_shapes():
        return name, "published shape", load_shape(name)
    plain = _plain_checkpoint(Path(name))
    if plain:
        return name, "checkpoint", plain
    try:
        found, kind, config = find_model(name)
    except RecipeError as error:
        if "/" in name and not Path(name).exists():
            return name, "published shape", find_shape(name)
        import difflib

        near = difflib.get_close_matches(name.lower(), list_shapes(), n=2, cutoff=0.5)
        if near:
            raise RecipeError(error.what, where=error.where, fix=f"did you mean {' or '.join(near)}?") from None
        raise
    if kind == "recipe":
        from tafkir.recipe.load import load_recipe

        recipe = load_recipe([name]).recipe
        if recipe.trm and not recipe.pretrain and not recipe.base:
            fix = f"`tafkir run {name} --dry-run` says what it takes"
            raise RecipeError("a recursive model is not planned here", where=name, fix=fix)
    return found, kind, shape_of(config, found)


def _plain_checkpoint(path: Path) -> ModelShape | None:
    """A checkpoint folder of a dense architecture that Tafkir counts and does not build.

    Raises:
        CheckpointError: a size is missing or no positive number.
    """
    from tafkir.errors import CheckpointError
    from tafkir.plan.shapes import PLAIN_ARCHITECTURES, shape_of_table

    config = path / "config.json" if path.is_dir() else path
    if config.name != "config.json" or not config.is_file():
        return None
    try:
        keys = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        # Whoever reads the families' files says what is wrong with it.
        return None
    if not isinstance(keys, dict) or not set(keys.get("architectures") or ()) & set(PLAIN_ARCHITECTURES):
        return None
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    wrong = [key for key in needed if not isinstance(keys.get(key), int) or keys[key] < 1]
    if wrong:
        raise CheckpointError(f"no sizes: {', '.join(wrong)}", where=str(config), fix="take the model's own file")
    heads = keys["num_attention_heads"]
    whole = {"head_dim": keys["hidden_size"] // heads, "num_key_value_heads": heads}
    return shape_of_table(str(path), whole | {key: value for key, value in keys.items() if value is not None})


def _hardware(text: str, files: list[Path], price: float | None) -> tuple[Chip, int]:
    from tafkir.errors import RecipeError
    from tafkir.plan.hardware import find_chip, load_chips

    name, _, number = text.partition(":")
    if number and not (number.isdigit() and int(number)):
        raise RecipeError(f"{number!r} is no count", where=f"--hardware {text}", expected="CHIP:COUNT, such as h20:4")
    if name == "cpu":
        from tafkir.plan.machine import measure_machine

        chip = measure_machine()
    else:
        chip = find_chip(name, load_chips(files))
    return chip if price is None else chip.with_price(price), int(number or 1)


def _deployment(
    shape: ModelShape,
    chip: Chip,
    precision: str | None,
    engine: str,
    kv_bytes: float,
    speculate: str | None,
    skew: float,
    level: str,
) -> Deployment:
    from tafkir.errors import RecipeError
    from tafkir.plan.calibrate import load_coefficients
    from tafkir.plan.coefficients import ENGINES
    from tafkir.plan.layout import Layout
    from tafkir.plan.precision import find_precision
    from tafkir.plan.serving import Deployment, Speculation

    if engine not in ENGINES:
        raise RecipeError("no such engine", where=f"--engine {engine}", expected=f"one of {', '.join(ENGINES)}")
    chosen = find_precision(precision or ("fp32" if chip.key == "cpu" else "bf16"))
    for number_format in (chosen.computes, chosen.rest_computes):
        chip.peak(number_format)
    draft = Speculation()
    if speculate:
        number, _, acceptance = speculate.partition(":")
        try:
            draft = Speculation(int(number), float(acceptance or 0.85))
        except ValueError:
            raise RecipeError(f"{speculate!r} is not TOKENS[:ACCEPTANCE]", where="--speculate") from None
        if draft.tokens < 0 or not 0 <= draft.acceptance <= 1:
            raise RecipeError(f"{speculate!r} is out of range", where="--speculate", expected="as 1:0.85")
    deployment = Deployment(
        shape, chip, chosen, Layout(), load_coefficients("datasheet"), engine, kv_bytes, skew, draft
    )
    return replace(deployment, coefficients=load_coefficients(level, deployment))


def _plan_serving(
    asked: _Asked, objective: str, top: int, explain: bool, as_json: bool, simulate: int, router: str | None
) -> None:
    from tafkir.errors import RecipeError
    from tafkir.plan.advise import OBJECTIVES, advise
    from tafkir.plan.simulate import load_curve

    if objective not in OBJECTIVES:
        raise RecipeError("no such objective", where=f"--objective {objective}", expected=", ".join(OBJECTIVES))
    options, refusals = advise(asked.deployment, asked.workload, asked.chips, objective=objective, only=asked.only)
    if not options:
        _refuse(asked, refusals)
    whole = next((option for option in options if option.fleet.prompts is None), None) if simulate else None
    curve = load_curve(whole, asked.workload, simulate, router=router) if whole else []
    if as_json:
        print(json.dumps(_serving_json(asked, options[:top], refusals, curve), indent=2))
        return
    _show_model(asked)
    _show_options(asked, options[:top], refusals)
    if whole:
        _show_curve(whole, curve, router)
    if explain:
        _explain(asked, options[0])


def _plan_day(asked: _Asked, objective: str, peak: float, as_json: bool) -> None:
    """A day of as many replicas of the best layout as the traffic wants: as many as at noon, or scaled."""
    from dataclasses import asdict

    from tafkir.plan.advise import advise
    from tafkir.plan.day import Scaler, Traffic, run_day
    from tafkir.plan.precision import checkpoint_bytes
    from tafkir.plan.training import Failures

    options, refusals = advise(asked.deployment, asked.workload, asked.chips, objective=objective, only=asked.only)
    if not options:
        _refuse(asked, refusals)
    best, d = options[0], asked.deployment
    capacity = best.point.tokens_per_s / asked.workload.output_tokens
    nodes = max(1.0, best.fleet.chips / 8)
    # A minute of starting up, and the weights at 2 GB/s a node; nodes fail as Llama-3's did.
    start_s = 60 + checkpoint_bytes(d.shape, d.precision) / nodes / 2e9
    failures = Failures().per_node_day * nodes
    fixed = Scaler(start_s=start_s).wanted(peak, capacity, 1)
    scalers = {
        "as at noon": Scaler(start_s=start_s, fixed=fixed),
        "scaled": Scaler(start_s=start_s),
        "scaled, halving": Scaler(start_s=start_s, consolidates=False),
    }
    days = {
        name: run_day(Traffic(peak), scaler, capacity, failures_per_day=failures, days=2)
        for name, scaler in scalers.items()
    }
    if as_json:
        print(json.dumps({name: asdict(day) for name, day in days.items()}, indent=2))
        return
    price = d.chip.price
    print(
        f"a day of {best.name} ({best.fleet.chips} chips a replica, {capacity:.2f} requests/s each, {start_s:.0f} s to "
        f"start), traffic from {Traffic(peak).trough * peak:,.1f} to {peak:,.1f} requests/s"
    )
    rows: list[tuple[str, ...]] = []
    for name, day in days.items():
        hours = day.replica_hours * best.fleet.chips
        dollars = "no price" if price is None else "/".join(f"{level:,.0f}" for level in price.scaled(hours))
        line = (f"{day.late:.1%}", f"{day.longest_wait_s:,.0f}", f"{day.changes:,}", f"{day.turns:,}")
        rows.append((name, f"{day.most * best.fleet.chips:,}", f"{hours:,.0f}", dollars, *line))
    head = ("replicas", "chips at most", "chip hours", "$ low/mid/high", "in line", "longest s", "changes", "turns")
    _print_table(head, rows, left=(0,))


def _emit(asked: _Asked, objective: str, engine: str, checkpoint: str) -> None:
    """The best layout that one kind of worker serves, as a shell script."""
    from tafkir.plan.advise import advise
    from tafkir.plan.launch import render_launch

    options, refusals = advise(
        asked.deployment, asked.workload, asked.chips, objective=objective, split=False, only=asked.only
    )
    if not options:
        _refuse(asked, refusals)
    print(render_launch(options[0], asked.workload, checkpoint, engine), end="")


def _refuse(asked: _Asked, refusals: list[Refusal]) -> None:
    """Say which limit is missed by how much, and what would do.

    Raises:
        CapacityError: always.
    """
    from tafkir.errors import CapacityError
    from tafkir.plan.advise import minimum_chips, nearest_change

    d = asked.deployment
    nearest = min(refusals, key=lambda refusal: refusal.missing)
    ways = nearest_change(d, asked.workload, asked.chips, _other_precisions(d))
    least = minimum_chips(d.shape, d.precision, d.chip)
    raise CapacityError(
        f"no layout of {asked.chips} chips carries {asked.workload_name}: {nearest.limit} is missed by "
        f"{nearest.missing:.0%} in the nearest, {nearest.layout} ({nearest.why}); weights in {d.precision.name} want "
        f"{least} chips",
        where=f"{asked.name} on {asked.chips} x {d.chip.name}",
        fix="; or ".join(ways) if ways else "another chip or a smaller model",
    )


def _other_precisions(d: Deployment) -> list[Precision]:
    """Smaller formats that the chip computes in, largest first."""
    from tafkir.plan.precision import PRECISIONS

    return [
        other
        for other in PRECISIONS.values()
        if other.experts < d.precision.experts
        and other.computes in d.chip.flops
        and other.rest_computes in d.chip.flops
    ]


def _show_model(asked: _Asked) -> None:
    from tafkir.plan.advise import minimum_chips
    from tafkir.plan.precision import checkpoint_bytes

    d, w = asked.deployment, asked.workload
    shape = d.shape
    cached = f" ({w.cached:.0%} cached)" if w.cached else ""
    print(
        f"{asked.name} ({asked.kind}) on {asked.chips} x {d.chip.name}, {d.precision.name}; {asked.workload_name}: "
        f"{w.prompt_tokens:,.0f} tokens in{cached}, {w.output_tokens:,.0f} out"
    )
    context = w.prompt_tokens + w.output_tokens / 2
    rows = [
        ("parameters", f"{_count(shape.total)} in all; a token meets {_active(shape)}"),
        ("checkpoint", f"{_bytes(checkpoint_bytes(shape, d.precision))} in {d.precision.name} ({d.precision.what})"),
        ("KV cache", f"{shape.kv_bytes_per_token(d.cache_dtype_bytes):,.0f} B a token; {_state(shape)}"),
        (
            "FLOPs",
            f"prefill {_flops(shape.forward_flops(w.prompt_tokens / 2, head=False))} a token, decode "
            f"{_flops(shape.forward_flops(context, absorbed=True))} at {context:,.0f} tokens",
        ),
        (
            "weights want",
            f"{minimum_chips(shape, d.precision, d.chip)} chips at least (a tenth in reserve, a quarter for caches)",
        ),
    ]
    if w.prompt_tokens + w.output_tokens > shape.max_context:
        rows.append(("context", f"{shape.max_context:,} tokens: the requests do not fit without stretching it"))
    for key, text in rows:
        print(f"{key:<13} {text}")


def _active(shape: ModelShape) -> str:
    return (
        f"{_count(shape.active)} with both embedding tables, {_count(shape.active_without_input)} without the "
        f"input's, {_count(shape.active_non_embedding)} without either"
    )


def _flops(number: float) -> str:
    size, unit = (1e9, "GFLOP") if number >= 1e8 else (1e6, "MFLOP")
    return f"{number / size:,.1f} {unit}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:,.2f}{unit}"
    return f"{number:,.0f}"


def _state(shape: ModelShape) -> str:
    return f"{_bytes(shape.state_bytes)} a sequence besides" if shape.state_bytes else "nothing besides"


def _show_options(asked: _Asked, options: list[Option], refusals: list[Refusal]) -> None:
    head = (
        "layout",
        "users",
        "TTFT s",
        "TPOT ms",
        "tok/s",
        "tok/s/chip",
        "$/M in",
        "$/M out",
        "cache free",
        "bound by",
    )
    print()
    _print_table(head, [_option_cells(option) for option in options], left=(0, 9))
    best = options[0]
    print(f"\n{_reason(best)}")
    shown = sorted(refusals, key=lambda refusal: refusal.missing)[:3]
    for refusal in shown:
        print(f"not {refusal.layout}: {refusal.why}")
    if len(refusals) > len(shown):
        print(f"and {len(refusals) - len(shown)} more layouts do not do")
    print(_confidence(asked.deployment))


def _reason(option: Option) -> str:
    """Which term weighs most in the best layout."""
    heaviest = max(option.point.tpot, key=lambda term: term.seconds)
    share = heaviest.seconds / option.point.tpot_s
    unused = f"; {option.unused} chips stay unused" if option.unused else ""
    return (
        f"{option.name}: {share:.0%} of a token's time is {heaviest.name} ({heaviest.formula}); more users are kept "
        f"out by {option.limit}{unused}"
    )


def _confidence(d: Deployment) -> str:
    from tafkir.plan.calibrate import left_out_errors

    c = d.coefficients
    errors = left_out_errors()
    if c.source.startswith("fitted"):
        return (
            f"coefficients {c.source}; rows the fit did not see were off by {errors['tpot']:.0%} in TPOT and "
            f"{errors['ttft']:.0%} in TTFT (medians). Means; --simulate gives percentiles"
        )
    return f"coefficients: {c.source}. Means; --simulate gives percentiles"


def _option_cells(option: Option) -> tuple[str, ...]:
    count = f"{option.replicas} x " if option.replicas > 1 else ""
    return (
        f"{count}{option.name}",
        f"{option.point.concurrency * option.replicas:,.0f}",
        f"{option.point.ttft_s:.2f}",
        f"{option.point.tpot_s * 1e3:.1f}",
        f"{option.tokens_per_s:,.0f}",
        f"{option.tokens_per_s_per_chip:,.0f}",
        _dollars(option.dollars_in),
        _dollars(option.dollars_out),
        f"{option.headroom:.0%}",
        option.limit,
    )


def _dollars(levels: tuple[float, float, float] | None) -> str:
    """Low / mid / high, or why there is none."""
    if levels is None:
        return "no price"
    low, mid, high = levels
    return f"{mid:.3f}" if low == high else f"{low:.3f}/{mid:.3f}/{high:.3f}"


def _explain(asked: _Asked, option: Option) -> None:
    """Every number of the best layout by its terms, with sources, and what is left out."""
    from tafkir.plan.precision import mtp_bytes, part_bytes
    from tafkir.plan.serving import NOT_MODELLED

    d, chip = asked.deployment, asked.deployment.chip
    print(f"\nEvery number of {option.name}, by its terms")
    parts = {**part_bytes(d.shape, d.precision), "multi-token prediction": mtp_bytes(d.shape, d.precision)}
    _terms("checkpoint, GB", [(name, size / 1e9, "") for name, size in parts.items() if size])
    m = option.memory
    held = [*m.weights.items(), ("activations of a chunk", m.activations), ("runtime", m.other)]
    held.append((f"cache of {option.batch} sequences", option.batch * m.sequence))
    _terms("one chip's memory, GB", [(name, size / 1e9, "") for name, size in held])
    print(f"    {m.usable / 1e9:.1f} of {chip.memory_bytes / 1e9:.0f} GB are usable; {m.sequences} sequences would fit")
    for title, terms in (("TTFT, ms", option.point.ttft), ("TPOT, ms", option.point.tpot)):
        _terms(title, [(t.name, t.seconds * 1e3, f"{t.formula}  [{t.source}]") for t in terms])
    if chip.price:
        p = chip.price
        print(f"  price: {p.low:.2f} / {p.mid:.2f} / {p.high:.2f} dollars a chip and hour ({p.source}, {p.date})")
    else:
        print("  price: none known for this chip; --price gives one")
    print(f"  hardware: {chip.source} ({chip.date}); table of {chip.origin}")
    print("  not modelled:")
    for line in NOT_MODELLED:
        print(f"    {line}")


def _terms(title: str, rows: list[tuple[str, float, str]]) -> None:
    print(f"  {title}: {sum(value for _, value, _ in rows):,.2f}")
    for name, value, words in rows:
        if value:
            print(f"    {value:>10,.2f}  {name:<24} {words}".rstrip())


def _show_curve(option: Option, curve: list[SimulatedLoad], router: str | None) -> None:
    """Percentiles of one replica of a layout, or of all behind a router, as the load grows."""
    price = option.fleet.decode.chip.price
    replicas = option.replicas if router else 1
    head = ("req/s", "TTFT s p50", "p90", "p99", "TPOT ms p50", "p90", "p99", "tok/s", "decoding", "in line", "$/M out")
    rows = []
    for load in curve:
        ttft = (f"{load.ttft.p50:.2f}", f"{load.ttft.p90:.2f}", f"{load.ttft.p99:.2f}")
        tpot = tuple(f"{seconds * 1e3:.1f}" for seconds in (load.tpot.p50, load.tpot.p90, load.tpot.p99))
        dollars = (
            f"{price.mid * replicas * option.fleet.chips / 3600 / load.tokens_per_s * 1e6:.3f}" if price else "no price"
        )
        numbers = (f"{load.tokens_per_s:,.0f}", f"{load.batch:.0f}", f"{load.waiting:,}", dollars)
        rows.append((f"{load.rate:.2f}", *ttft, *tpot, *numbers))
    requests = sum(load.requests for load in curve) // max(1, len(curve))
    who = f"{replicas} x {option.name} behind {router}" if router else f"one replica of {option.name}"
    print(f"\n{who}, {requests:,} random requests a line; answers carry all dollars")
    _print_table(head, rows, left=())


def _serving_json(
    asked: _Asked, options: list[Option], refusals: list[Refusal], curve: list[SimulatedLoad]
) -> dict[str, Any]:
    from dataclasses import asdict

    from tafkir.plan.advise import minimum_chips
    from tafkir.plan.calibrate import left_out_errors
    from tafkir.plan.precision import checkpoint_bytes
    from tafkir.plan.serving import NOT_MODELLED

    d = asked.deployment
    return {
        "model": asked.name,
        "hardware": _chip_json(d.chip) | {"count": asked.chips},
        "precision": d.precision.name,
        "workload": asdict(asked.workload),
        "parameters": _parameters_json(d.shape),
        "checkpoint_bytes": checkpoint_bytes(d.shape, d.precision),
        "kv_bytes_per_token": d.shape.kv_bytes_per_token(d.cache_dtype_bytes),
        "minimum_chips": minimum_chips(d.shape, d.precision, d.chip),
        "coefficients": asdict(d.coefficients),
        "left_out_errors": left_out_errors(),
        "options": [_option_json(option) for option in options],
        "refused": [asdict(refusal) | {"layout": str(refusal.layout)} for refusal in refusals],
        "simulated": [asdict(load) for load in curve],
        "not_modelled": list(NOT_MODELLED),
    }


def _parameters_json(shape: ModelShape) -> dict[str, int]:
    names = ("total", "active", "active_without_input", "active_non_embedding", "embeddings", "mtp")
    return {name: getattr(shape, name) for name in names}


def _option_json(option: Option) -> dict[str, Any]:
    from dataclasses import asdict

    fleet = option.fleet
    return {
        "name": option.name,
        "layout": asdict(fleet.decode.layout),
        "prefill_layout": asdict(fleet.prompts.layout) if fleet.prompts else None,
        "prefill_workers": fleet.num_prefill,
        "replicas": option.replicas,
        "chips_per_replica": fleet.chips,
        "unused_chips": option.unused,
        "batch": option.batch,
        "tokens_per_s": option.tokens_per_s,
        "tokens_per_s_per_chip": option.tokens_per_s_per_chip,
        "point": asdict(option.point),
        "memory": asdict(option.memory) | {"sequences": option.memory.sequences},
        "cache_free": option.headroom,
        "bound_by": option.limit,
        "dollars_per_million_in": option.dollars_in,
        "dollars_per_million_out": option.dollars_out,
    }


def _plan_training(
    name: str,
    shape: ModelShape,
    chip: Chip,
    chips: int,
    precision: str | None,
    tokens: float,
    sequence: int,
    batch_tokens: float,
    mfu: float | None,
    engine: str | None,
    explain: bool,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from tafkir.errors import RecipeError
    from tafkir.plan.training import TrainJob, search_training, train_flops_per_token

    if precision not in (None, "bf16", "fp8"):
        raise RecipeError(f"nothing is trained in {precision}", where="--precision", expected="bf16 or fp8")
    chip.peak(precision or "bf16")
    software = engine or ("mindspeed" if chip.key.startswith("ascend") else "megatron")
    job = TrainJob(shape, chip, chips, tokens, sequence, batch_tokens, precision == "fp8", mfu, software)
    options = search_training(job)
    if as_json:
        print(json.dumps([asdict(option) for option in options[:6]], indent=2))
        return
    flops = train_flops_per_token(shape, sequence)
    print(f"training {name} on {chips} x {chip.name}: {tokens:.3g} tokens of {flops / 1e9:,.1f} GFLOP, {software}")
    head = ("layout", "GB a chip", "tok/s/chip", "MFU", "goodput", "days", "chip hours", "$M low/mid/high")
    _print_table(head, [_train_cells(option) for option in options[:6]], left=(0,))
    if explain:
        best = options[0]
        _terms("memory of one chip, GB", [(part, size / 1e9, "") for part, size in best.memory.items()])
        _terms("one step, s", [(t.name, t.seconds, f"{t.formula}  [{t.source}]") for t in best.step])
        print(
            f"  a checkpoint every {best.checkpoint_every_s / 60:.0f} minutes (Young); MFU is of the bf16 peak, causal"
        )
        print("  not modelled: data loading, stragglers, evaluation, restarts of the whole job, storage and egress")


def _train_cells(option: TrainOption) -> tuple[str, ...]:
    dollars = "no price"
    if option.dollars:
        dollars = "/".join(f"{level / 1e6:.3g}" for level in option.dollars)
    return (
        str(option.layout),
        f"{sum(option.memory.values()) / 1e9:.0f}",
        f"{option.tokens_per_s_per_chip:,.0f}",
        f"{option.mfu:.1%}",
        f"{option.goodput:.1%}",
        f"{option.days:,.1f}",
        f"{option.chip_hours:,.0f}",
        dollars,
    )


def _chip_cells(chip: Chip) -> tuple[str, ...]:
    price = (
        "none"
        if chip.price is None
        else "/".join(f"{x:.2f}" for x in (chip.price.low, chip.price.mid, chip.price.high))
    )
    return (
        chip.key,
        " ".join(f"{name} {rate / 1e12:g}" for name, rate in chip.flops.items()),
        f"{chip.memory_bytes / 1e9:g}",
        f"{chip.bandwidth / 1e12:g}",
        f"{chip.link / 1e9:g}",
        f"{chip.power_w:g}",
        price,
        f"{chip.source} ({chip.date})" + ("" if chip.origin == "tafkir" else f"; {chip.origin}"),
    )


def _chip_json(chip: Chip) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(chip)


def _bytes(number: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]], *, left: tuple[int, ...]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = (
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
