"""What a checkpoint makes of problems that it has read, of tellings it has not, and of held-out ones; and why it fails.

Greedy answers, as solutions after the plain question (`--form document`, what a base writes) or as turns of a chat.
Failures on problems of one step fall into kinds: more or fewer steps than the problem has, the wrong operation, the
wrong two numbers, or a slip in calculation.

    python benchmarks/reading.py base-tiny
    python benchmarks/reading.py runs/wordmath-tiny/stages/02-sft/checkpoint --form chat --out reading.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tafkir.checkpoint.load import load_checkpoint
from tafkir.cli.completer import checkpoint_of
from tafkir.data.chat import encode_prompt
from tafkir.data.corpus import Corpus, load_corpus
from tafkir.data.sources import Problem
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.eval.metrics import accuracy
from tafkir.recipe.load import load_recipe
from tafkir.records import Request, SamplingParams
from tafkir.tasks.math import WordProblems

_OPERATION = re.compile(r"(\d+(?:\.\d+)?)\s*([-+*/])\s*(\d+(?:\.\d+)?)")
_UNSEEN_STORIES = 10**9  # seeds that no training stream derives


def problem_sets(corpus: Corpus, count: int) -> dict[str, list[Problem]]:
    """Training problems, tellings that no training reads, and validation problems; at most `count` of each."""

    def pick(problems: Sequence[Problem], source: str, max_steps: int) -> list[Problem]:
        chosen = [p for p in problems if p.source == source and len(p.steps) <= max_steps]
        Random(0).shuffle(chosen)
        return chosen[:count]

    return {
        "svamp, training": pick(corpus.train, "svamp", 9),
        "gsm8k, training, at most 2 steps": pick(corpus.train, "gsm8k", 2),
        "stories, unseen": [make_story(_UNSEEN_STORIES + i) for i in range(count)],
        "svamp, validation": pick(corpus.validation, "svamp", 9),
        "gsm8k, validation": pick(corpus.validation, "gsm8k", 9),
    }


def failure_kind(problem: Problem, text: str) -> str:
    """What is wrong with a wrong answer to a problem of one step."""
    expected, given = _OPERATION.search(problem.steps[0].expression), _OPERATION.findall(text)
    if expected is None or len(given) != 1:
        return "more steps" if len(given) > 1 else "no step"
    left, operator, right = given[0]
    if operator != expected[2]:
        return "wrong operation"
    return "wrong numbers" if {left, right} != {expected[1], expected[3]} else "calculation"


def answer_all(
    engine: Engine, tokenizer: Tokenizer, encode: Callable[[Problem], list[int]], problems: Sequence[Problem]
) -> dict[str, Any]:
    """Accuracy with its 95 % interval, and the kinds of failures on problems of one step."""
    params, task = SamplingParams(temperature=0, max_tokens=96), WordProblems()
    requests = [Request(str(i), tuple(encode(problem)), params) for i, problem in enumerate(problems)]
    done = {completion.request_id: completion for completion in engine.complete(requests)}
    verdicts, kinds = [], Counter[str]()
    for i, problem in enumerate(problems):
        text = tokenizer.decode(list(done[str(i)].token_ids))
        verdict = task.grade(problem.as_example(), text, finished=done[str(i)].finish_reason == "stop")
        verdicts.append(verdict.correct)
        if not verdict.correct and len(problem.steps) == 1:
            kinds[failure_kind(problem, text)] += 1
    return {"accuracy": accuracy(verdicts).to_dict(), "failures_of_one_step": dict(kinds.most_common())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder, run directory, or bundled name")
    parser.add_argument("--form", choices=("document", "chat"), default="document")
    parser.add_argument("--count", type=int, default=300, help="problems of each set, at most")
    parser.add_argument("--out", type=Path, help="write the JSON to this file, too")
    args = parser.parse_args()

    folder = checkpoint_of(args.checkpoint)
    tokenizer = Tokenizer.load(folder)
    decoder = load_checkpoint(folder).decoder
    engine = Engine(decoder, eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id), tokenizer=tokenizer)

    def encode(problem: Problem) -> list[int]:
        chat = args.form == "chat"
        return encode_prompt(tokenizer, problem.question) if chat else tokenizer.encode(problem.question + "\n")

    rows = {}
    for name, problems in problem_sets(load_corpus(load_recipe(["base-tiny"]).recipe.data), args.count).items():
        rows[name] = row = answer_all(engine, tokenizer, encode, problems)
        score = row["accuracy"]
        kinds = ", ".join(f"{kind} {count}" for kind, count in row["failures_of_one_step"].items())
        print(
            f"{name:<34}{score['value']:>6.1%} ({score['low']:.1%} to {score['high']:.1%}) of {len(problems)}   {kinds}"
        )
    outcome = {"benchmark": "reading", "command": " ".join(["python", *sys.argv]), "form": args.form, "sets": rows}
    if args.out:
        args.out.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
