"""Does YaRN let a model find what stands beyond the context it was trained on? A needle test on decoders trained here.

Tiny Ling decoders learn, from nothing and on at most 128 words, to repeat the one number that a haystack of words hides
(the passkey test by which the YaRN paper, arXiv 2309.00071, measures long context). Then the number is hidden in two
and four times as many words, and in eight, past what YaRN's factor 4 promises: with RoPE as trained, with YaRN and no
further training, and with both after the same short training on the 4x haystacks. All answer the same haystacks. RoPE's
base is 2.44 times the context, as in Ling's 4K stage (10,000 for 4,096); two variants say what hangs on that and on
rotating whole heads.

    python benchmarks/needle.py --out benchmarks/results/needle.json --picture docs/img/needle.png
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from tafkir.data.packing import Document
from tafkir.eval.metrics import avg_at_k, pooled_difference
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder, stretch_context
from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig, YarnConfig
from tafkir.recipe.schema import LanguageTable
from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.needle import FILLER, NAMES, NUMBERS, Haystack, make_haystack
from tafkir.train.language import language_step
from tafkir.train.loop import Trainer

WORDS = (*FILLER, *(f"{name}:" for name in NAMES), *(f"{number}." for number in NUMBERS))
"""The models' vocabulary: every word of a haystack is one token."""

WORD_IDS = {word: i for i, word in enumerate(WORDS)}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTOR = 4
EVAL_SEED = 10**6  # far from the training seeds
EVAL_TOKENS = 16_384


@dataclass(frozen=True)
class Setup:
    """A model and its training."""

    context: int = 128
    hidden_size: int = 64
    num_hidden_layers: int = 2
    rope_theta: float | None = None
    partial_rotary_factor: float = 1.0
    num_experts: int = 8
    steps: int = 120
    tokens_per_step: int = 2048
    finetune_steps: int = 30
    learning_rate: float = 5e-3

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=len(WORDS),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=self.hidden_size // 2,
            intermediate_size=2 * self.hidden_size,
            moe_intermediate_size=self.hidden_size // 2,
            num_experts=self.num_experts,
            n_group=min(4, self.num_experts) or 1,
            topk_group=2,
            partial_rotary_factor=self.partial_rotary_factor,
            rope_theta=self.rope_theta or self.context * 10_000 / 4096,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
        )


def document_of(haystack: Haystack) -> Document:
    """The haystack, the name again and its number; the number alone is a target."""
    ids = [WORD_IDS[word] for word in (*haystack.words, f"{haystack.name}:", f"{haystack.number}.")]
    return ids, [False] * (len(ids) - 1) + [True]


def training_documents(seed: int, step: int, context: int, tokens: int) -> list[Document]:
    """Haystacks of one length, drawn between half the context and all of it; needles at any depth."""
    random = Random(derive_seed(seed, "documents", context, step))
    length = random.randint(context // 2, context)
    return [
        document_of(make_haystack(random.getrandbits(62), num_words=length - 2, num_needles=1))
        for _ in range(max(1, tokens // length))
    ]


def train(decoder: Decoder, setup: Setup, seed: int, *, longest: int, steps: int) -> float:
    """Train in place, by the library's own step, on haystacks of up to `longest` words; returns the last loss.

    Fresh weights begin with short haystacks, which grow over the first 40 % of the steps. A decoder that knows the task
    (`longest` is more than the setup's context) begins at the full length, with a fifth of the learning rate.
    """
    fresh = longest == setup.context
    table = LanguageTable(
        steps=steps,
        learning_rate=setup.learning_rate if fresh else setup.learning_rate / 5,
        warmup_steps=steps // 10,
        schedule="linear",
        weight_decay=0.01,
    )
    trainer = Trainer(decoder, table)

    def documents(step: int) -> list[Document]:
        share = min(1.0, step / (0.4 * steps)) if fresh else 1.0
        context = round(16 + (longest - 16) * share)
        return training_documents(seed, step, context, setup.tokens_per_step)

    step = language_step(trainer, documents, label="needle")
    loss = 0.0
    for i in range(steps):
        trainer.set_step(i)
        loss = float(step(i).metrics["train/loss"])  # type: ignore[arg-type]
    return loss


def with_yarn(decoder: Decoder, setup: Setup) -> Decoder:
    """The same weights, stretched by YaRN."""
    scaling = YarnConfig(factor=FACTOR, original_max_position_embeddings=setup.context)
    return stretch_context(decoder, scaling, FACTOR * setup.context)


@torch.no_grad()
def found(decoder: Decoder, haystacks: Sequence[Haystack]) -> list[bool]:
    """For each haystack, whether the most probable word after its name is its number. All have one length."""
    results: list[bool] = []
    length = len(haystacks[0].words) + 1
    batch = max(1, EVAL_TOKENS // length)
    for start in range(0, len(haystacks), batch):
        part = haystacks[start : start + batch]
        documents = [document_of(haystack)[0] for haystack in part]
        ids = torch.tensor([token for document in documents for token in document[:-1]])
        bounds = list(range(0, len(ids) + 1, length))
        out = decoder(ids, torch.arange(length).repeat(len(part)), VarlenCausal(bounds))
        answers = decoder.logits(out.hidden_ND[length - 1 :: length]).argmax(-1).tolist()
        results += [answer == document[-1] for answer, document in zip(answers, documents, strict=True)]
    return results


def haystacks_of(length: int, depth: float, samples: int) -> list[Haystack]:
    """The held-out haystacks of one cell; with the asked name behind them they are `length - 1` tokens."""
    return [
        make_haystack(derive_seed(EVAL_SEED, f"{length} {depth}", i), num_words=length - 2, num_needles=1, depth=depth)
        for i in range(samples)
    ]


Scores = dict[tuple[int, float], list[bool]]


def score(decoder: Decoder, lengths: Sequence[int], samples: int) -> Scores:
    """Right or wrong for every haystack of every length and depth."""
    return {(n, d): found(decoder, haystacks_of(n, d, samples)) for n in lengths for d in DEPTHS}


def run_seed(setup: Setup, seed: int, lengths: Sequence[int], samples: int) -> tuple[dict[str, Scores], float]:
    """Train one model and score it in every way; also its last training loss."""
    decoder = build_decoder(setup.model, seed)
    loss = train(decoder, setup, seed, longest=setup.context, steps=setup.steps)
    arms: dict[str, Scores] = {}
    for name, model in (("unstretched", decoder), ("yarn", with_yarn(decoder, setup))):
        arms[name] = score(model, lengths, samples)
        if setup.finetune_steps:
            trained = copy.deepcopy(model)
            train(trained, setup, seed, longest=FACTOR * setup.context, steps=setup.finetune_steps)
            arms[f"{name}, then trained"] = score(trained, lengths, samples)
    return arms, loss


def as_problems(scores: Scores, length: int) -> dict[str, list[float]]:
    """Problem id to score, over all depths of a length."""
    return {
        f"{depth}/{i}": [float(right)]
        for (n, depth), results in scores.items()
        if n == length
        for i, right in enumerate(results)
    }


def summarise(by_seed: Sequence[dict[str, Scores]]) -> dict[str, Any]:
    """Accuracy of every way at every length and depth, and YaRN against the unstretched model, problem by problem."""
    arms: dict[str, Any] = {}
    for name in by_seed[0]:
        cells = [
            {
                "length": length,
                "depth": depth,
                "by_seed": [sum(arm[name][length, depth]) / len(arm[name][length, depth]) for arm in by_seed],
                **avg_at_k(list(zip(*(arm[name][length, depth] for arm in by_seed), strict=True))).to_dict(),
            }
            for length, depth in by_seed[0][name]
        ]
        arms[name] = {"cells": cells, "by_length": _by_length([arm[name] for arm in by_seed])}
    lengths = sorted({length for length, _ in by_seed[0]["unstretched"]})
    differences = {
        str(n): pooled_difference(
            [(as_problems(arm["unstretched"], n), as_problems(arm["yarn"], n)) for arm in by_seed]
        ).to_dict()
        for n in lengths
    }
    return {"arms": arms, "yarn_minus_unstretched": differences}


def _by_length(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    rows = []
    for length in sorted({length for length, _ in scores[0]}):
        problems = [as_problems(one, length) for one in scores]
        samples = [[one[key][0] for one in problems] for key in problems[0]]
        rows.append({"length": length, **avg_at_k(samples).to_dict()})
    return rows


def variants(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """What else RoPE may look like: each variant is trained anew, and not fine-tuned."""
    yield "RoPE's base 10,000", replace(setup, rope_theta=10_000.0, finetune_steps=0)
    yield "half of each head rotated, as in Ling", replace(setup, partial_rotary_factor=0.5, finetune_steps=0)


def table_of(summary: dict[str, Any]) -> str:
    """Accuracy in percent with its interval, one row a length and way."""
    lines = []
    for name, arm in summary["arms"].items():
        for row in arm["by_length"]:
            depths = [f"{100 * c['value']:4.0f}" for c in arm["cells"] if c["length"] == row["length"]]
            interval = f"{100 * row['value']:5.1f} % [{100 * row['low']:5.1f}, {100 * row['high']:5.1f}]"
            lines.append(f"{name:<27} {row['length']:>4}  {interval}   by depth {' '.join(depths)}")
    return "\n".join(lines)


def draw(summary: dict[str, Any], context: int, path: Path) -> None:
    """Heat maps, length by depth, one for each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = summary["arms"]
    figure, axes = plt.subplots(1, len(arms), figsize=(3.1 * len(arms), 3.1), sharey=True, layout="constrained")
    for axis, (name, arm) in zip(axes, arms.items(), strict=True):
        lengths = [row["length"] for row in arm["by_length"]]
        shares = {(cell["length"], cell["depth"]): cell["value"] for cell in arm["cells"]}
        grid = [[100 * shares[length, depth] for length in lengths] for depth in DEPTHS]
        axis.imshow(grid, vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                ink = "white" if value > 55 else "black"
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=9, color=ink)
        axis.set_xticks(range(len(lengths)), [f"{length}\n{length / context:g}x" for length in lengths])
        axis.set_yticks(range(len(DEPTHS)), [f"{100 * depth:.0f} %" for depth in DEPTHS])
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("context, tokens")
    axes[0].set_ylabel("depth of the needle")
    figure.suptitle("Needles found, %", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=40, help="haystacks for each length and depth")
    parser.add_argument("--steps", type=int, default=Setup.steps)
    parser.add_argument("--finetune-steps", type=int, default=Setup.finetune_steps)
    parser.add_argument("--context", type=int, default=Setup.context)
    parser.add_argument("--no-variants", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.process_time()
    setup = Setup(context=args.context, steps=args.steps, finetune_steps=args.finetune_steps)
    lengths = [setup.context * times for times in (1, 2, FACTOR, 2 * FACTOR)]
    runs, losses = [], []
    for seed in range(args.seeds):
        arms, loss = run_seed(setup, seed, lengths, args.samples)
        runs.append(arms)
        losses.append(loss)
        print(f"seed {seed}: loss {loss:.3f}, {time.process_time() - began:.0f} CPU-s", file=sys.stderr)
    summary = summarise(runs)
    print(table_of(summary))
    result: dict[str, Any] = {
        "benchmark": "needle",
        "command": "python benchmarks/needle.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "threads": 1,
        "cpu": platform.machine(),
        "versions": {"torch": torch.__version__},
        "setup": asdict(setup),
        "model": setup.model.model_dump(),
        "parameters": setup.model.num_parameters(),
        "seeds": args.seeds,
        "samples": args.samples,
        "last_loss": losses,
        **summary,
        "variants": {},
    }
    for name, variant in () if args.no_variants else variants(setup):
        ends = [setup.context, setup.context * FACTOR]
        summary = summarise([run_seed(variant, seed, ends, args.samples)[0] for seed in range(args.seeds)])
        print(f"\n{name}\n{table_of(summary)}")
        result["variants"][name] = {"setup": asdict(variant), **summary}
    result["cpu_s"] = round(time.process_time() - began, 1)
    if args.picture:
        draw(result, setup.context, args.picture)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
