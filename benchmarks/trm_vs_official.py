"""Training steps and solves of Tafkir's recursive model beside those of the official code, on the CPU.

git clone https://github.com/SamsungSAILMontreal/TinyRecursiveModels && cd TinyRecursiveModels && git checkout e7b6871
python benchmarks/trm_vs_official.py PATH-OF-TinyRecursiveModels --out benchmarks/results/trm_vs_official.json

Both sides take the same puzzles and use the same pure-torch AdamATan2 (the official one is a CUDA extension), EMA and
sign-SGD of puzzle vectors; they take turns in one process, which needs no other work beside it. Peak memory comes from
a process of its own for each side, less what one takes that imports both and does nothing. "paper" is the paper's
Sudoku network, T = 3, n = 6, 81 cells and 16 prefix positions, the same weights on both sides. "sudoku4", "sudoku6",
"maze" are the shipped recipes' networks; the official code has them with its prefix and with SwiGLU widths rounded up
to 256 ("as shipped"), or without the prefix, which its options allow ("no prefix").
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import write_between
from torch import Tensor

from tafkir.data.puzzles.sets import Samples
from tafkir.models.trm import Trm, build_trm
from tafkir.models.trm_names import official_names
from tafkir.ops.native import select_kernels
from tafkir.recipe.load import load_recipe
from tafkir.recipe.tables import EmaConfig
from tafkir.recipe.trm import TrmConfig, TrmModelConfig
from tafkir.train.deep_supervision import RecursiveTrainer, deep_supervision_step
from tafkir.train.loop import peak_rss_bytes
from tafkir.train.optim import AdamATan2

Step = Callable[[], float]

# Below this, a training step fits into what importing torch had taken for a moment.
LEAST_BYTES = 50_000_000


@dataclass(frozen=True)
class Case:
    """One comparison: our network, and how the official code has it.

    Attributes:
        model: ours.
        cells: of a grid.
        vocab: symbols, padding among them.
        batch: puzzles of a training step.
        prefix: prefix positions of the official code; 0 takes its options to their ends.
    """

    model: TrmModelConfig
    cells: int
    vocab: int
    batch: int
    prefix: int

    @property
    def same(self) -> bool:
        """Whether both sides are the same network."""
        return self.model.intermediate_multiple == 256 and self.model.prefix_length == self.prefix


def paper_model() -> TrmModelConfig:
    return TrmModelConfig(mixer="mlp", position_encoding="none", puzzle_embedding_size=512)


def maze_model() -> TrmModelConfig:
    """Of both sides' mixers, for 9x9 mazes; the shipped recipe's mixer is not in the official code."""
    return TrmModelConfig(
        mixer="mlp",
        position_encoding="none",
        hidden_size=96,
        intermediate_multiple=32,
        prefix_length=0,
        num_recursions=1,
        num_latent_steps=2,
        max_supervision_steps=6,
    )


def cases() -> dict[str, Case]:
    """The paper's network, those of the shipped recipes for Sudoku, and one for mazes."""
    found = {"paper": Case(paper_model(), 81, 11, 8, 16)}
    small: dict[str, tuple[TrmModelConfig, int, int, int]] = {}
    for name, vocab in (("sudoku4", 6), ("sudoku6", 8)):
        config = load_recipe([f"trm-{name}"]).recipe.trm
        assert config is not None and config.puzzles.num_cells is not None
        small[name] = config.model, config.puzzles.num_cells, vocab, config.batch_size
    small["maze"] = maze_model(), 81, 6, 96
    for name, (model, cells, vocab, batch) in small.items():
        for prefix, word in ((16, "as shipped"), (0, "no prefix")):
            found[f"{name}, {word}"] = Case(model, cells, vocab, batch, prefix)
    return found


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    """Random symbols: what is asked and answered does not change the work."""
    generator = torch.Generator().manual_seed(0)
    size = (case.batch, case.cells)
    return torch.randint(1, case.vocab, size, generator=generator), torch.randint(
        1, case.vocab, size, generator=generator
    )


# ---- ours --------------------------------------------------------------------------------------------------------


def our_model(case: Case) -> Trm:
    return build_trm(case.model.for_puzzles(case.vocab, case.cells), 0)


def our_step(case: Case, dtype: str) -> tuple[Step, Trm]:
    """A training step as the stage takes it."""
    config = TrmConfig(
        batch_size=case.batch,
        optimizer="adam_atan2",
        learning_rate=1e-4,
        weight_decay=1.0,
        warmup_steps=0,
        schedule="constant",
        precision=dtype,  # type: ignore[arg-type]  # one of the two
        ema=EmaConfig(decay=0.999, warmup=False),
        select="last",
        model=case.model,
    )
    model = our_model(case)
    inputs, labels = (x.to(torch.uint8).numpy() for x in batch_of(case))

    def take(first: int, size: int) -> Samples:
        return Samples(inputs[:size], labels[:size], np.zeros(size, dtype=np.int64))

    trainer = RecursiveTrainer(model, config)
    step = deep_supervision_step(trainer, take, seed=0, label="benchmark")
    count = iter(range(1 << 30))

    def run() -> float:
        number = next(count)
        trainer.set_step(number)
        return float(step(number).metrics["train/token_loss"])  # type: ignore[arg-type]

    return run, model


def our_solve(case: Case, dtype: str, puzzles: int) -> Step:
    model = our_model(case).eval()
    model.dtype = getattr(torch, dtype)
    inputs = batch_of(case)[0][:puzzles]

    def run() -> float:
        return float([out.q_halt for out in model.steps(inputs)][-1].sum())

    return run


# ---- theirs ------------------------------------------------------------------------------------------------------


def official(path: Path) -> None:
    """Make the official modules importable; they use einops for two transpositions only."""
    sys.path.insert(0, str(path))
    if importlib.util.find_spec("einops") is None:
        shim = types.ModuleType("einops")
        shim.rearrange = lambda x, how: x.transpose(1, 2)  # type: ignore[attr-defined]
        sys.modules["einops"] = shim


def official_model(case: Case, dtype: str) -> Any:
    from models.recursive_reasoning.trm import TinyRecursiveReasoningModel_ACTV1  # type: ignore[import-not-found]

    model = case.model
    return TinyRecursiveReasoningModel_ACTV1(
        {
            "batch_size": case.batch,
            "seq_len": case.cells,
            "num_puzzle_identifiers": 1,
            "vocab_size": case.vocab,
            "puzzle_emb_ndim": model.hidden_size if case.prefix else 0,
            "puzzle_emb_len": case.prefix,
            "H_cycles": model.num_recursions,
            "L_cycles": model.num_latent_steps,
            "H_layers": 0,
            "L_layers": model.num_hidden_layers,
            "hidden_size": model.hidden_size,
            "expansion": model.expansion,
            "num_heads": model.num_attention_heads,
            "pos_encodings": model.position_encoding,
            "halt_max_steps": model.max_supervision_steps,
            "halt_exploration_prob": 0.1,
            "forward_dtype": dtype,
            "mlp_t": model.mixer == "mlp",
        }
    )


def official_step(case: Case, dtype: str, weights: Trm | None) -> Step:
    """A training step as its `train_batch` takes it, on the CPU and without W&B."""
    from models.ema import EMAHelper  # type: ignore[import-not-found]
    from models.losses import ACTLossHead  # type: ignore[import-not-found]
    from models.sparse_embedding import CastedSparseEmbeddingSignSGD_Distributed  # type: ignore[import-not-found]

    model = official_model(case, dtype)
    if weights is not None:
        copy_weights(weights, model)
    head = ACTLossHead(model, "stablemax_cross_entropy").train()
    optimizers: list[Any] = [AdamATan2(head.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1.0)]
    if case.prefix:
        table = model.puzzle_emb.buffers()
        optimizers.append(CastedSparseEmbeddingSignSGD_Distributed(table, world_size=1, lr=1e-2, weight_decay=0.1))
    average = EMAHelper(0.999)
    average.register(head)
    inputs, labels = batch_of(case)
    batch = {"inputs": inputs.int(), "labels": labels.int()}
    batch["puzzle_identifiers"] = torch.zeros(case.batch, dtype=torch.int32)
    carry: Any = None

    def run() -> float:
        nonlocal carry
        carry = head.initial_carry(batch) if carry is None else carry
        carry, loss, metrics, _, _ = head(carry=carry, batch=batch, return_keys=[])
        (loss / case.batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(head)
        return float(metrics["lm_loss"]) / case.batch

    return run


def official_solve(case: Case, dtype: str, puzzles: int) -> Step:
    """As its `evaluate`: one forward after the other until N_sup."""
    from models.losses import ACTLossHead

    head = ACTLossHead(official_model(case, dtype), "stablemax_cross_entropy").eval()
    inputs, labels = (x[:puzzles].int() for x in batch_of(case))
    batch = {"inputs": inputs, "labels": labels, "puzzle_identifiers": torch.zeros(puzzles, dtype=torch.int32)}

    @torch.inference_mode()
    def run() -> float:
        carry, done = head.initial_carry(batch), False
        while not done:
            carry, _, _, shown, done = head(carry=carry, batch=batch, return_keys=["q_halt_logits"])
        return float(shown["q_halt_logits"].sum())

    return run


@torch.no_grad()
def copy_weights(ours: Trm, theirs: Any) -> None:
    state = ours.state_dict()
    own = dict(theirs.inner.named_parameters()) | dict(theirs.inner.named_buffers())
    for name, other in official_names(list(state), ours.shape).items():
        own[other].copy_(state[name])


# ---- the comparison ----------------------------------------------------------------------------------------------


def seconds(step: Step, times: int) -> float:
    """CPU-seconds of one call."""
    began = time.process_time()
    for _ in range(times):
        step()
    return (time.process_time() - began) / times


def alternate(ours: Step, theirs: Step, repeats: int, least_s: float) -> dict[str, Any]:
    """Turns of at least `least_s` CPU-seconds each; medians, and the median and range of the ratios."""
    times = [max(1, round(least_s / seconds(step, 1))) for step in (ours, theirs)]
    pairs = [(seconds(ours, times[0]), seconds(theirs, times[1])) for _ in range(repeats)]
    ratios = [b / a for a, b in pairs]
    return {
        "ours_cpu_s": statistics.median(a for a, _ in pairs),
        "official_cpu_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "repeats": repeats,
    }


def compare(name: str, case: Case, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Training and solving of one case."""
    ours, model = our_step(case, dtype)
    theirs = official_step(case, dtype, model if case.same else None)
    losses = [ours(), theirs()]
    train = alternate(ours, theirs, args.repeats, args.least_s)
    train["ours_samples_per_cpu_s"] = case.batch / train["ours_cpu_s"]
    train["official_samples_per_cpu_s"] = case.batch / train["official_cpu_s"]
    solved = alternate(our_solve(case, dtype, 1), official_solve(case, dtype, 1), args.repeats, args.least_s)
    return {
        "case": name,
        "dtype": dtype,
        "batch": case.batch,
        "same_network": case.same,
        "first_losses": losses if case.same else None,
        "train": train,
        "solve_one_puzzle": solved,
        **memory(args, name, dtype),
    }


def memory(args: argparse.Namespace, name: str, dtype: str) -> dict[str, Any]:
    """Peak memory of training one case, by side."""
    peaks = {side: peak(args, name, dtype, side) for side in ("neither", "ours", "official")}
    taken = {side: peaks[side] - peaks["neither"] for side in ("ours", "official")}
    return {
        "peak_rss_bytes": peaks,
        "process_memory_ratio": peaks["ours"] / peaks["official"],
        "memory_ratio": taken["ours"] / taken["official"] if taken["official"] > LEAST_BYTES else None,
    }


def peak(args: argparse.Namespace, name: str, dtype: str, side: str) -> int:
    """Peak memory of a process that trains three steps; of one that does nothing but import, for "neither"."""
    command = [sys.executable, __file__, str(args.path), "--cases", name, "--dtypes", dtype, "--only", side]
    command += ["--threads", str(args.threads), "--kernels", args.kernels]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def only(name: str, dtype: str, side: str) -> None:
    if side != "neither":
        step = our_step(cases()[name], dtype)[0] if side == "ours" else official_step(cases()[name], dtype, None)
        for _ in range(3):
            step()
    print(peak_rss_bytes())


def render(rows: list[dict[str, Any]]) -> str:
    """As Markdown has it."""
    lines = [
        "| network | dtype | ours, samples per CPU-s | official | training | solving | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        train = row["train"]
        low, high = train["ratio_range"]
        taken = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}x"
        lines.append(
            f"| {row['case']} | {row['dtype']} | {train['ours_samples_per_cpu_s']:.1f} | "
            f"{train['official_samples_per_cpu_s']:.1f} | {train['ratio']:.2f}x ({low:.2f} to {high:.2f}) | "
            f"{row['solve_one_puzzle']['ratio']:.2f}x | {taken} |"
        )
    return "\n".join(lines)


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The table, then the JSON line; the table into the page, too."""
    text = render(result["rows"])
    print(json.dumps(result) if args.json else text)
    if args.page:
        write_between(args.page, "trm_vs_official", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="checkout of the official code")
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--kernels", choices=("auto", "native", "torch"), default="auto", help="ours")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--least-s", type=float, default=1.0, help="CPU-seconds of a turn, at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("neither", "ours", "official"), help="print one side's peak memory alone")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing, show what is there")
    parser.add_argument("--memory", type=Path, metavar="JSON", help="measure the memory of what is there anew")
    parser.add_argument("--page", type=Path, help="write the table into this page, too: docs/trm.md")
    args = parser.parse_args()
    if args.render:
        show(args, json.loads(args.render.read_text(encoding="utf-8")))
        return
    if args.path is None:
        parser.error("the path of a checkout of the official code is missing")
    torch.set_num_threads(args.threads)
    kernels = select_kernels(args.kernels)
    official(args.path)
    if args.only:
        only(args.cases[0], args.dtypes[0], args.only)
        return
    if args.memory:
        result = json.loads(args.memory.read_text(encoding="utf-8"))
        for row in result["rows"]:
            row.update(memory(args, row["case"], row["dtype"]))
        args.memory.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        show(args, result)
        return
    rows = [compare(name, cases()[name], dtype, args) for name in args.cases for dtype in args.dtypes]
    result = {
        "benchmark": "trm_vs_official",
        "command": " ".join(["python", *sys.argv]),
        "threads": args.threads,
        "kernels": kernels,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    show(args, result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
