"""`tafkir plan`: what a model takes to serve and to train, term by term, before anything is rented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tafkir.cli.plan_question import Asked, deployment_of, look_up_chip, look_up_model, other_precisions
from tafkir.cli.plan_show import (
    chip_cells,
    chip_json,
    print_table,
    print_terms,
    serving_json,
    show_curve,
    show_model,
    show_options,
    show_terms,
    train_cells,
)

if TYPE_CHECKING:
    from tafkir.plan.advise import Refusal
    from tafkir.plan.hardware import Chip
    from tafkir.plan.shapes import ModelShape

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
    typer.Option(
        "--router",
        help="With --simulate: all replicas behind random, round_robin, least_loaded or prefix_aware.",
    ),
]
Prefixes = Annotated[
    int, typer.Option("--prefixes", min=0, help="With --router: distinct prefixes that requests share (all are found).")
]
DayRate = Annotated[
    float, typer.Option("--day", min=0.0, metavar="RATE", help="Show a day whose traffic peaks at RATE requests/s.")
]
Emit = Annotated[
    str | None,
    typer.Option(
        "--emit",
        metavar="TARGET",
        help="Print the file that starts it: vllm, sglang, trtllm; slurm, k8s, ray, skypilot with --engine; "
        "torchrun with --train.",
    ),
]
Image = Annotated[str | None, typer.Option("--image", help="With --emit k8s: of the container.")]
HtmlFile = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Write a page to pick other models, chips and workloads in, with curves."
    ),
]
CheckpointName = Annotated[
    str | None, typer.Option("--checkpoint", help="With --emit: folder or hub name to serve (MODEL).")
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Preset, published shape, checkpoint folder, run, or recipe.")
]


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
    prefixes: Prefixes = 0,
    day: DayRate = 0.0,
    emit: Emit = None,
    checkpoint: CheckpointName = None,
    image: Image = None,
    html: HtmlFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the terms that every number is made of.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a model takes to serve, or with --train to train: what fits, how fast, and what it costs.

    \b
    tafkir plan ring-flash-2.0 --hardware h20:4 --precision fp8
    tafkir plan deepseek-r1 --hardware b200:8 --precision nvfp4 --workload reasoning --explain
    tafkir plan qwen3-32b --hardware h100:2 --simulate 20000  percentiles, and the load where waiting begins
    tafkir plan qwen3-32b --hardware h100:2 --html plan.html  a page with pickers and curves
    tafkir plan ./my-model --hardware cpu                     this machine, measured on the spot
    tafkir plan deepseek-v3 --hardware h800:2048 --train --precision fp8 --tokens 14.8e12
    tafkir plan qwen3-32b --hardware h100:4 --emit vllm --checkpoint Qwen/Qwen3-32B > serve.sh
    tafkir plan deepseek-r1 --hardware h200:16 --precision fp8 --emit k8s --engine sglang > serve.yaml
    tafkir plan hardware | claims

    \b
    layout     TP splits matrices, PP layers, DP copies attention, EP spreads experts; `2 x` is replicas
    users      requests at once that keep the workload's longest waits (means; --simulate gives percentiles)
    TTFT       to the first token; TPOT between tokens after that
    dollars    for a million tokens, low / mid / high as prices are quoted
    """
    chip, count = look_up_chip(hardware, hardware_file or [], price)
    name, kind, shape = look_up_model(model)
    if train:
        asked_training = (precision, tokens, sequence, batch_tokens, mfu, train_engine)
        recipe = model if kind == "recipe" else None
        _plan_training(name, shape, chip, count, *asked_training, explain, as_json, emit, recipe)
        return
    deployment = deployment_of(shape, chip, precision, engine, kv_bytes, speculate, skew, coefficients)
    from tafkir.plan.layout import parse_layout
    from tafkir.plan.workload import load_workload

    only = parse_layout(layout) if layout else None
    asked = Asked(name, kind, count, deployment, load_workload(workload), workload, only)
    if emit:
        _emit(asked, objective, emit, checkpoint or model, image)
        return
    if html:
        from tafkir.cli.plan_html import write_page

        write_page(asked, html, simulate or 1500, hardware_file or [])
        return
    if day:
        _plan_day(asked, objective, day, as_json)
        return
    _plan_serving(asked, objective, top, explain, as_json, simulate, router, prefixes)


@app.command("hardware")
def hardware(hardware_file: HardwareFile = None, as_json: AsJson = False) -> None:
    """List the chips that are known: dense peaks, memory, links, prices, and where each figure is from.

    One's own files, later ones on top: ~/.config/tafkir/hardware.toml, ./tafkir-hardware.toml, those that
    TAFKIR_HARDWARE names, --hardware-file.
    """
    from tafkir.plan.hardware import load_chips

    chips = load_chips(hardware_file or [])
    if as_json:
        print(json.dumps([chip_json(chip) for chip in chips.values()], indent=2))
        return
    head = ("chip", "TFLOPS dense", "GB", "TB/s", "link GB/s", "W", "$/h low/mid/high", "from")
    print_table(head, [chip_cells(chip) for chip in chips.values()], left=(0, 1, 7))


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


@app.command("monitoring")
def monitoring(
    alerts: Annotated[bool, typer.Option("--alerts", help="The alerts, as a PrometheusRule in YAML.")] = False,
) -> None:
    """Print the Grafana dashboard, or the Prometheus alerts, of servers that count under vLLM's names.

    \b
    tafkir plan monitoring > dashboard.json                     import it into Grafana
    tafkir plan monitoring --alerts | kubectl apply -f -
    """
    from tafkir.serve.monitoring import read_monitoring

    print(read_monitoring("alerts" if alerts else "dashboard"), end="")


@app.command("proxy")
def proxy(
    kind: Annotated[str, typer.Argument(metavar="nginx|haproxy")],
    replicas: Annotated[list[str], typer.Argument(metavar="HOST:PORT...", help="Servers that are the same.")],
    listen: Annotated[str, typer.Option(help="The proxy's own address.")] = "127.0.0.1:8000",
    answer_timeout: Annotated[int, typer.Option(min=1, help="Longest silence of a server, in seconds.")] = 3600,
    status_port: Annotated[int, typer.Option(min=1, help="Of HAProxy's page and metrics.")] = 8404,
) -> None:
    """Print the configuration of a proxy before several servers, so that one of them may die or be restarted.

    \b
    tafkir plan proxy haproxy 127.0.0.1:8001 127.0.0.1:8002 > haproxy.cfg && haproxy -f haproxy.cfg
    tafkir plan proxy nginx 10.0.0.1:8000 10.0.0.2:8000 --listen 0.0.0.0:80 > nginx.conf
    """
    from tafkir.plan.launch.proxy import render_proxy

    text = render_proxy(kind, replicas, listen=listen, answer_s=answer_timeout, status_port=status_port)
    print(text, end="")


def _plan_serving(
    asked: Asked,
    objective: str,
    top: int,
    explain: bool,
    as_json: bool,
    simulate: int,
    router: str | None,
    prefixes: int,
) -> None:
    from tafkir.errors import RecipeError
    from tafkir.plan.advise import OBJECTIVES, advise
    from tafkir.plan.simulate import load_curve

    if objective not in OBJECTIVES:
        raise RecipeError("no such objective", where=f"--objective {objective}", expected=", ".join(OBJECTIVES))
    options, refusals = advise(asked.deployment, asked.workload, asked.chips, objective=objective, only=asked.only)
    if not options:
        _refuse(asked, refusals)
    whole = options[0] if simulate else None
    curve = load_curve(whole, asked.workload, simulate, router=router, prefixes=prefixes) if whole else []
    if as_json:
        print(json.dumps(serving_json(asked, options[:top], refusals, curve), indent=2))
        return
    show_model(asked)
    show_options(asked, options[:top], refusals)
    if whole:
        show_curve(whole, curve, router)
    if explain:
        show_terms(asked, options[0])


def _plan_day(asked: Asked, objective: str, peak: float, as_json: bool) -> None:
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
    print_table(head, rows, left=(0,))


def _emit(asked: Asked, objective: str, target: str, checkpoint: str, image: str | None) -> None:
    """The best layout that one kind of worker serves, as a file."""
    from tafkir.plan.advise import advise
    from tafkir.plan.launch import render_launch

    options, refusals = advise(
        asked.deployment, asked.workload, asked.chips, objective=objective, split=False, only=asked.only
    )
    if not options:
        _refuse(asked, refusals)
    engine = asked.deployment.engine
    print(render_launch(options[0], asked.workload, checkpoint, target, engine=engine, image=image), end="")


def _refuse(asked: Asked, refusals: list[Refusal]) -> None:
    """Say which limit is missed by how much, and what would do.

    Raises:
        CapacityError: always.
    """
    from tafkir.errors import CapacityError
    from tafkir.plan.advise import minimum_chips, nearest_change

    d = asked.deployment
    nearest = min(refusals, key=lambda refusal: refusal.missing)
    ways = nearest_change(d, asked.workload, asked.chips, other_precisions(d))
    least = minimum_chips(d.shape, d.precision, d.chip)
    raise CapacityError(
        f"no layout of {asked.chips} chips carries {asked.workload_name}: {nearest.limit} is missed by "
        f"{nearest.missing:.0%} in the nearest, {nearest.layout} ({nearest.why}); weights in {d.precision.name} want "
        f"{least} chips",
        where=f"{asked.name} on {asked.chips} x {d.chip.name}",
        fix="; or ".join(ways) if ways else "another chip or a smaller model",
    )


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
    emit: str | None,
    recipe: str | None,
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
    if emit:
        if emit != "torchrun" or recipe is None:
            raise RecipeError("only a recipe is trained from here", where=f"--emit {emit}", expected="torchrun")
        from tafkir.plan.launch import render_torchrun

        print(render_torchrun(options, job, recipe), end="")
        return
    if as_json:
        print(json.dumps([asdict(option) for option in options[:6]], indent=2))
        return
    flops = train_flops_per_token(shape, sequence)
    print(f"training {name} on {chips} x {chip.name}: {tokens:.3g} tokens of {flops / 1e9:,.1f} GFLOP, {software}")
    head = ("layout", "GB a chip", "tok/s/chip", "MFU", "goodput", "days", "chip hours", "$M low/mid/high")
    print_table(head, [train_cells(option) for option in options[:6]], left=(0,))
    if explain:
        best = options[0]
        print_terms("memory of one chip, GB", [(part, size / 1e9, "") for part, size in best.memory.items()])
        print_terms("one step, s", [(t.name, t.seconds, f"{t.formula}  [{t.source}]") for t in best.step])
        print(
            f"  a checkpoint every {best.checkpoint_every_s / 60:.0f} minutes (Young); MFU is of the bf16 peak, causal"
        )
        print("  not modelled: data loading, stragglers, evaluation, restarts of the whole job, storage and egress")
