"""What drafts are worth with one sequence at a time: tokens a CPU-second with and without, and what is accepted.

    PYTHONPATH=src python benchmarks/speculation.py runs/mtp-distill/stages/02-sft/checkpoint

The checkpoint needs MTP layers (`tafkir run mtp-distill`); the engine is the server's, weights are as they are stored.
It answers made-up word problems that no training reads, as chat; on `loops` the end of an answer is ignored, and a
small model soon repeats itself. All sides answer one prompt before the next, each time in another order; ratios are
within a repeat over all prompts. `same` says whether every token is that of plain decoding. At temperature 1
`rejection_sampling` is what Leviathan et al.'s rule would accept of the first drafted token, the mean of
sum(min(p, q)) along the same texts, beside what is accepted here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tafkir.checkpoint.packed import load_packed
from tafkir.cli.completer import checkpoint_of
from tafkir.data.chat import encode_prompt
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.drafters import NextnDrafter, NgramDrafter
from tafkir.engine.paged_engine import PagedEngine
from tafkir.engine.speculative import Speculation
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder
from tafkir.models.mtp import shift_documents
from tafkir.records import Request, SamplingParams

_UNSEEN_STORIES = 10**9  # seeds that no training stream derives

Prompts = list[tuple[int, ...]]
Sides = dict[str, Callable[[], Speculation | None]]
WORKLOADS: dict[str, dict[str, Any]] = {
    "answers, greedy": {"temperature": 0.0},
    "answers, temperature 1": {"temperature": 1.0},
    "loops, greedy": {"temperature": 0.0, "ends": False},
}


def sides_of(decoder: Decoder) -> Sides:
    """Plain decoding, and what drafts; all but `auto` draft at every step."""
    assert decoder.mtp is not None, "the checkpoint has no MTP layers: tafkir run mtp-distill"
    sides: Sides = {"plain": lambda: None}
    for count in (1, 2, 3):
        sides[f"nextn:{count}"] = lambda count=count: Speculation(NextnDrafter(decoder, count), adaptive=False)  # type: ignore[misc]
    sides["ngram:5"] = lambda: Speculation(NgramDrafter(5), adaptive=False)
    sides["auto nextn:3"] = lambda: Speculation(NextnDrafter(decoder, 3))
    sides["auto ngram:5"] = lambda: Speculation(NgramDrafter(5))
    return sides


class Side:
    """One way to decode: its engine, and what it took."""

    def __init__(self, decoder: Decoder, eos_ids: tuple[int, ...], spec: Speculation | None) -> None:
        options = {"eos_ids": eos_ids, "max_batch": 1, "prefix_caching": False, "speculation": spec}
        self.engine, self.spec = PagedEngine(decoder, **options), spec  # type: ignore[arg-type]
        self.texts: list[list[int]] = []
        self.total = self.prefill = 0.0

    def answer(self, prompt: tuple[int, ...], params: SamplingParams) -> None:
        """One text; CPU-seconds of all of it, and of the prompt."""
        self.engine.add_request(Request("", prompt, params))
        text: list[int] = []
        began = time.process_time()
        while self.engine.has_work:
            text += [event.token_id for event in self.engine.step()]
            if len(text) == 1:
                self.prefill += time.process_time() - began
        self.total += time.process_time() - began
        self.texts.append(text)

    def rates(self) -> dict[str, float]:
        """Tokens a CPU-second, of all and of all but the prompts and their first tokens."""
        count = sum(map(len, self.texts))
        decoded = count - len(self.texts)
        return {"tokens_per_s": count / self.total, "decode_tokens_per_s": decoded / (self.total - self.prefill)}


@torch.no_grad()
def rejection_sampling(decoder: Decoder, prompts: Prompts, texts: list[list[int]]) -> float:
    """Mean of sum(min(p, q)) over the texts' tokens, for the first MTP layer at temperature 1."""
    shares = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([*prompt, *text])
        bounds = [0, len(ids)]
        out = decoder(ids, torch.arange(len(ids)), VarlenCausal(bounds))
        batch = shift_documents(ids, torch.arange(len(ids)), ids, bounds, 1)[:1]
        drafted = next(decoder.mtp(out.hidden_ND, out.pre_norm_ND, decoder.embed_tokens, batch))  # type: ignore[misc]
        q_MV = decoder.logits(drafted.hidden_MD).softmax(-1)
        p_MV = decoder.logits(out.hidden_ND[1 : len(q_MV) + 1]).softmax(-1)
        # The first drafted token of a text is its second: the first comes from the prompt.
        shares.append(torch.minimum(p_MV, q_MV).sum(-1)[len(prompt) - 1 :])
    return float(torch.cat(shares).mean())


def measure(
    decoder: Decoder, prompts: Prompts, eos_ids: tuple[int, ...], *, max_tokens: int, repeats: int, temperature: float
) -> dict[str, Any]:
    """One workload, all sides in turn."""
    rates, found = [], {}
    for repeat in range(repeats):
        sides = {name: Side(decoder, eos_ids, spec()) for name, spec in sides_of(decoder).items()}
        names = list(sides)
        for i, prompt in enumerate(prompts):
            # All sides answer one prompt before the next: what else the machine does falls on all of them alike.
            for name in names[(repeat + i) % len(names) :] + names[: (repeat + i) % len(names)]:
                sides[name].answer(prompt, SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=i))
        rates.append({name: side.rates() for name, side in sides.items()})
        expected = sides["plain"].texts
        found = {name: (side.texts == expected, side.spec) for name, side in sides.items()}
        shown = {name: f"{rates[-1][name]['tokens_per_s']:.0f}" for name in sides}
        print(f"  {repeat + 1}/{repeats}: {shown}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {"tokens": sum(map(len, expected))}
    for name, (same, spec) in found.items():
        row: dict[str, Any] = {"same": same}
        for key in ("tokens_per_s", "decode_tokens_per_s"):
            row[key] = statistics.median(rate[name][key] for rate in rates)
            ratios = sorted(rate[name][key] / rate["plain"][key] for rate in rates)
            row[f"{key}_over_plain"] = {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
        if spec is not None:
            seen = spec.acceptance
            pairs = zip(seen.accepted_per_pos, seen.drafted_per_pos, strict=True)
            row["accepted_per_position"] = [a / d for a, d in pairs]
            row["tokens_per_step_with_draft"] = 1 + seen.num_accepted_tokens / max(1, seen.num_drafts)
        result[name] = row
    if temperature:
        result["rejection_sampling"] = rejection_sampling(decoder, prompts, expected)
    return result


def table(found: dict[str, Any]) -> str:
    """Markdown, a row a workload and side."""
    lines = ["| workload | drafts | tokens/s | times plain | decoding alone | accepted by position | same text |"]
    lines.append("|---|---|---|---|---|---|---|")
    for workload, sides in found.items():
        for name, row in sides.items():
            if isinstance(row, dict):
                places = " ".join(f"{share:.2f}" for share in row.get("accepted_per_position", []))
                ratio, decode = row["tokens_per_s_over_plain"], row["decode_tokens_per_s_over_plain"]
                lines.append(
                    f"| {workload} | {name} | {row['tokens_per_s']:.0f} | {ratio['median']:.2f} ({ratio['min']:.2f} to "
                    f"{ratio['max']:.2f}) | {decode['median']:.2f} | {places} | {'yes' if row['same'] else 'NO'} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder, run directory, or bundled name; with MTP layers")
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--out", type=Path, help="write the JSON to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = checkpoint_of(args.checkpoint)
    tokenizer = Tokenizer.load(folder)
    decoder = load_packed(folder).decoder
    prompts = [tuple(encode_prompt(tokenizer, make_story(_UNSEEN_STORIES + i).question)) for i in range(args.problems)]
    result: dict[str, Any] = {
        "benchmark": "speculation",
        "command": " ".join(["python", *sys.argv]),
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "problems": args.problems,
        "repeats": args.repeats,
        "workloads": {},
    }
    for name in args.workloads:
        print(name, file=sys.stderr, flush=True)
        setting = dict(WORKLOADS[name])
        ends = (tokenizer.turn_end_id, tokenizer.document_end_id) if setting.pop("ends", True) else ()
        result["workloads"][name] = measure(
            decoder, prompts, ends, max_tokens=args.max_tokens, repeats=args.repeats, **setting
        )
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["workloads"]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
