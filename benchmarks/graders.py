"""The graders of the published tasks: reference solutions, agreement with lm-eval's scorers, speed, hostile answers.

Solutions of GSM8K come with the package; those of MATH are read from `--math`, the JSON lines of its test part with
`problem` and `solution`. lm-evaluation-harness stands in an environment of its own, whose Python is `--reference`.
Answers for the comparison are made up from a seed: right and wrong ones in the forms that models write. Every answer on
which the two differ is listed with a reason where a rule explains it.

    python benchmarks/graders.py --math MATH/test.jsonl.gz --reference ../venv-peers/bin/python \\
        --out benchmarks/results/graders.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

from tafkir.records import Example
from tafkir.runlog.atomic import write_json
from tafkir.runlog.rundir import describe_environment
from tafkir.tasks import answers as reading
from tafkir.tasks.catalog import EvalTask, load_task
from tafkir.tasks.published.choice import ALPHABETS, choice_example
from tafkir.tasks.published.instructions import follow
from tafkir.tasks.published.math import MathRule, tidy
from tafkir.tasks.symbolic import SymbolicVerifier

Case = tuple[str, Example, str]
"""A family, an example, and an answer to it."""

HOSTILE = {
    "million digits": "9" * 10**6,
    "factorials": "9!!!!!!",
    "tower": "9^{9^{9^{9^{9}}}}",
    "nested roots": "\\sqrt{" * 150 + "2" + "}" * 150,
    "nested braces": "{" * 400 + "9" + "}" * 400,
    "nested brackets": "(" * 450 + "9" + ")" * 450,
    "long sum": "+".join(["x"] * 480),
    "huge power": "(x+y+z+w)^{99999}",
    "endless product": "\\prod_{i=1}^{10^{30}} i",
    "endless integral": "\\int_0^1 \\int_0^1 e^{\\sin(x^{y^x})} dx dy",
    "matrix": "\\begin{pmatrix}" + " & ".join(["9^{99}"] * 60) + "\\end{pmatrix}",
    "no LaTeX": "\\" * 900,
}


def _corrupt(answer: str) -> str | None:
    """An answer with one number changed; None where there is none."""
    numbers = list(re.finditer(r"\d+", answer))
    if not numbers:
        return None
    last = numbers[-1]
    return f"{answer[: last.start()]}{int(last[0]) + 1}{answer[last.end() :]}"


def _swap_box(solution: str, content: str) -> str:
    head, _, tail = solution.rpartition("\\boxed")
    depth = 0
    for place, character in enumerate(tail):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0 and character == "}":
            return f"{head}\\boxed{{{content}}}{tail[place + 1 :]}"
    return f"{head}\\boxed{{{content}}}"


def _solutions(math: Path | None) -> Iterator[tuple[str, EvalTask, Example, str, str]]:
    """Set, task, example, a reference solution, and the same with another answer."""
    task = load_task("gsm8k")
    for part in ("train", "test"):
        raw = (files("tafkir") / "datasets" / "gsm8k" / f"{part}.jsonl.gz").read_bytes()
        for number, line in enumerate(gzip.decompress(raw).decode().strip().split("\n")):
            row = json.loads(line)
            answer = row["answer"].rpartition("####")[2].strip()
            example = Example(f"{part}-{number}", "gsm8k", "test", row["question"], answer.replace(",", ""))
            wrong = row["answer"].replace(f"#### {answer}", f"#### {_corrupt(answer.replace(',', ''))}")
            yield "gsm8k", task, example, row["answer"], wrong
    if math is None:
        return
    task = load_task("math-test")
    rows = map(json.loads, gzip.decompress(math.read_bytes()).decode().strip().split("\n"))
    solutions = {row["problem"]: row["solution"] for row in rows}
    for example in task.examples("test"):
        solution, wrong = solutions[example.question], _corrupt(example.answer)
        yield "math", task, example, solution, _swap_box(solution, wrong) if wrong else ""


def grade_solutions(math: Path | None) -> dict[str, Any]:
    """Share of reference solutions that are graded correct (100 % is right), and of corrupted ones (0 is)."""
    counts: Counter[str] = Counter()
    exceptions = []
    for name, task, example, solution, wrong in _solutions(math):
        verdict = task.grade(example, solution)
        counts[f"{name} solutions"] += 1
        counts[f"{name} correct"] += verdict.correct
        if not verdict.correct:
            exceptions.append([example.id, example.answer, "solution", verdict.outcome, verdict.extracted])
        if wrong:
            verdict = task.grade(example, wrong)
            counts[f"{name} corrupted"] += 1
            counts[f"{name} corrupted correct"] += verdict.correct
            if verdict.outcome != "wrong":
                exceptions.append([example.id, example.answer, "corrupted", verdict.outcome, verdict.extracted])
    return {"counts": dict(counts), "exceptions": exceptions}


# ---- agreement -----------------------------------------------------------------------------------------------------

_SPELLINGS = ("{}", "{}.", "${}$", "{} ", "\\${}", "{}\\%", "{},000", "{}.0", "-{}", "0{}")


def _number_answers(random: Random, right: str, others: Sequence[str]) -> Iterator[str]:
    wrong = random.choice([str(int(right) + 1), random.choice(others), f"{right}0"] if right.isdecimal() else others)
    for value in (right, wrong):
        shown = f"{int(value):,}" if value.isdecimal() and random.random() < 0.5 else value
        yield random.choice(
            (
                f"First 3 * 4 = 12, then more.\n#### {shown}",
                f"So the answer is {shown}.",
                f"Therefore she needs ${shown}.",
                f"That makes {shown} apples",
                f"12 + 5 = 17 and at last we have {shown}",
                f"\\boxed{{{shown}}}",
                f"The total is **{shown}**.",
            )
        )


def _math_answers(random: Random, right: str, others: Sequence[str]) -> Iterator[str]:
    respelled = right.replace("\\frac", random.choice(("\\dfrac", "\\tfrac", "\\frac")))
    respelled = respelled.replace("\\left", "").replace("\\right", "").replace(" ", random.choice(("", " ", "\\!")))
    slashed = re.sub(r"^\\d?frac\{(\d+)\}\{(\d+)\}$", r"\1/\2", right)
    for value in (random.choice((right, respelled, slashed)), random.choice((_corrupt(right) or "0", *others[:2]))):
        yield f"We find that it is $\\boxed{{{value}}}$."


_LETTERS = (
    "the answer is ({})",
    "The answer is {}.",
    "Thus the answer is ({}), as said.",
    "answer is {}",
    "I think it is {}",
    "**the answer is ({})**",
)


def _choice_cases(random: Random, count: int) -> Iterator[Case]:
    card = load_task("aqua").card
    for number in range(count):
        options = [f"{random.randint(10, 99)} {unit}" for unit in ("cm", "kg", "s", "m", "N", "J", "W", "V", "A", "K")]
        right, named = random.randrange(10), random.randrange(10)
        row = {"question": "?", "options": options, "answer": right}
        example = choice_example(card, "made up", f"c-{number}", row)
        letter = ALPHABETS["en"][right if random.random() < 0.5 else named]
        yield "mmlu-pro", example, f"Let us see. {random.choice(_LETTERS).format(letter)}"


def _respond(random: Random, example: Example, prose: Sequence[str]) -> str:
    """A response that tries some of what is asked for, out of sentences of word problems."""
    sentences = random.sample(prose, random.randint(1, 12))
    kinds = [kind for kind, _ in example.extra["instructions"]]
    params = {key: value for _, given in example.extra["instructions"] for key, value in given.items()}
    text = random.choice((" ", "\n", "\n\n", "\n***\n")).join(sentences)
    tries: dict[str, Any] = {
        "punctuation:no_comma": lambda t: t.replace(",", ""),
        "startend:quotation": lambda t: f'"{t}"',
        "startend:end_checker": lambda t: f"{t} {params.get('end_phrase', '')}",
        "detectable_format:title": lambda t: f"<<A title>>\n{t}",
        "detectable_format:number_highlighted_sections": lambda t: "*one* " * random.randint(0, 6) + "**two** " + t,
        "detectable_format:number_bullet_lists": lambda t: "".join(f"* {s}\n" for s in sentences[:4]) + "- last",
        "detectable_format:json_format": lambda t: "```json\n" + json.dumps({"text": t}) + "\n```",
        "detectable_format:multiple_sections": lambda t: "".join(
            f"{params.get('section_spliter', 'Section')} {n}\n{s}\n" for n, s in enumerate(sentences, 1)
        ),
        "detectable_format:constrained_response": lambda t: random.choice(("My answer is yes.", "Yes.", t)),
        "detectable_content:postscript": lambda t: f"{t}\n{random.choice(('P.S.', 'P.P.S', 'p. s.'))} more",
        "detectable_content:number_placeholders": lambda t: t + " [name] [date]" * random.randint(0, 4),
        "change_case:english_capital": str.upper,
        "change_case:english_lowercase": str.lower,
        "change_case:capital_word_frequency": lambda t: " ".join(
            word.upper() if random.random() < 0.2 else word for word in t.split(" ")
        ),
        "combination:two_responses": lambda t: f"{t}\n******\n{random.choice((t, sentences[0]))}",
        "combination:repeat_prompt": lambda t: f"{params.get('prompt_to_repeat', '')}\n{t}",
        "keywords:existence": lambda t: f"{t} {' '.join(params.get('keywords', []))}.",
        "keywords:frequency": lambda t: t + f" {params.get('keyword', '')}" * random.randint(0, 6),
        "keywords:forbidden_words": lambda t: f"{t} {params.get('forbidden_words', [''])[0]}",
        "language:response_language": lambda t: random.choice(
            ("هذا جواب قصير عن السؤال المطروح", "Dies ist eine kurze Antwort auf die Frage", "यह एक छोटा उत्तर है", t)
        ),
    }
    for kind in kinds:
        if kind in tries and random.random() < 0.75:
            text = tries[kind](text)
    return text


def make_cases(seed: int, per_family: int) -> list[Case]:
    """Made-up answers of five families, `per_family` or more each."""
    random = Random(seed)
    cases: list[Case] = []
    for family, name, answers in (
        ("gsm8k", "gsm8k", _number_answers),
        ("aime", "aime24", _math_answers),
        ("math", "math-test", _math_answers),
    ):
        examples = load_task(name).examples("test")
        others = [example.answer for example in examples]
        for number in range(per_family // 2):
            example = examples[number % len(examples)]
            some = random.sample(others, 5)
            cases += [(family, example, text) for text in answers(random, example.answer, some)]
    cases += _choice_cases(random, per_family)
    prose = [s for e in load_task("gsm8k").examples("test") for s in re.split(r"(?<=[.?!]) ", e.question)]
    examples = load_task("ifeval").examples("test")
    cases += [("ifeval", e, _respond(random, e, prose)) for _ in range(2) for e in examples]
    return cases


def _ifeval_row(example: Example) -> dict[str, Any]:
    instructions = example.extra["instructions"]
    return {
        "key": example.id,
        "prompt": example.question,
        "instruction_id_list": [kind for kind, _ in instructions],
        "kwargs": [params for _, params in instructions],
    }


def _why(family: str, kind: str, ours: bool) -> str:
    """The rule by which the two differ, "" where none is known."""
    if family == "gsm8k":
        return "" if not ours else "a number with a trailing sign, .0 or a unit is the same number"
    if family == "math":
        if ours:
            return "equal as mathematics, spelled otherwise than Hendrycks' rule expects"
        return "equal to Hendrycks' rule only by dropping a unit, % or a sign"
    if family == "aime":
        return "the same integer, spelled otherwise" if ours else ""
    if family == "mmlu-pro":
        return "a letter in another place than after 'answer is' counts, as MMLU-Pro's own script takes the last one"
    if "letter_frequency" in kind:
        return "the reference draws a letter by chance where the one that is asked for is not a to z"
    return "sentences or capital words are counted without Punkt's trained tables"


def compare_with_references(python: str, seed: int, per_family: int) -> dict[str, Any]:
    """Verdicts of ours and of lm-eval's scorers on the same answers; for IFEval instruction by instruction."""
    cases = make_cases(seed, per_family)
    rows = [
        {"family": family, "text": text, "reference": _ifeval_row(e) if family == "ifeval" else e.answer}
        for family, e, text in cases
    ]
    script = str(Path(__file__).with_name("grader_references.py"))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    done = subprocess.run([python, script], input=lines, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    tasks = {"gsm8k": load_task("gsm8k"), "math": load_task("math-test"), "aime": load_task("aime24")}
    choice = load_task("mmlu-pro", _one_row())
    counts: dict[str, Counter[str]] = {}
    differ: list[dict[str, Any]] = []
    for (family, example, text), reference in zip(cases, theirs, strict=True):
        count = counts.setdefault(family, Counter())
        if family != "ifeval":
            ours = tasks.get(family, choice).grade(example, text).correct
            pairs = [("", ours, reference)]
        else:
            kinds = [kind for kind, _ in example.extra["instructions"]]
            strict, loose = follow(example, text), follow(example, text, loose=True)
            pairs = list(zip(kinds, strict, reference[0], strict=True))
            pairs += [(f"{kind} (loose)", a, b) for kind, a, b in zip(kinds, loose, reference[1], strict=True)]
        for kind, mine, wanted in pairs:
            count.update(answers=1, agree=mine == wanted, correct=mine)
            if mine != wanted:
                why = _why(family, kind, mine)
                row = {"family": family, "kind": kind, "ours": mine, "expected": example.answer, "answer": text[-160:]}
                differ.append({**row, "why": why})
    return {"families": {name: dict(count) for name, count in counts.items()}, "differ": differ}


def _one_row() -> Path:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"graders-{os.getpid()}.jsonl"
    row = {"question_id": 0, "question": "?", "options": ["a", "b"], "answer": "A", "category": "math"}
    path.write_text(json.dumps(row))
    return path


# ---- speed and hostile answers -------------------------------------------------------------------------------------


def _cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure_speed(repeats: int) -> dict[str, Any]:
    """Answers per second: plain numbers in one thread, and expressions that only algebra can compare."""
    task, examples = load_task("gsm8k"), load_task("gsm8k").examples("test")
    texts = [f"<think>\n{'12 + 5 = 17. ' * 40}\n</think>\nSo \\boxed{{{e.answer}}}" for e in examples]
    plain = []
    for _ in range(repeats):
        reading._read_value.cache_clear()
        began = time.process_time()
        for example, text in zip(examples, texts, strict=True):
            assert task.grade(example, text).correct
        plain.append(len(texts) / (time.process_time() - began))
    pairs = []
    for example in load_task("math-test").examples("test"):
        for given in (_corrupt(example.answer), _respell(example.answer)):
            if given and "\\" in example.answer and tidy(given) != tidy(example.answer) and "text" not in given:
                pairs.append((example, given))
    pairs = pairs[:: max(1, len(pairs) // 300)][:300]
    symbolic, wall = [], []
    for _ in range(repeats):
        verifier = SymbolicVerifier(max_workers=2, timeout_s=10)
        rule = MathRule(verifier)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(rule.check, *zip(*_HARD, strict=True)))  # starts both workers
            before, began = _worker_cpu(verifier) + time.process_time(), time.monotonic()
            list(threads.map(rule.check, *zip(*pairs, strict=True)))
            wall.append(len(pairs) / (time.monotonic() - began))
            symbolic.append(len(pairs) / (_worker_cpu(verifier) + time.process_time() - before))
        verifier.close()
    return {
        "plain_per_cpu_s": statistics.median(plain),
        "symbolic_per_cpu_s": statistics.median(symbolic),
        "symbolic_per_s_two_workers": statistics.median(wall),
        "repeats": repeats,
        "spread": {"plain": [min(plain), max(plain)], "symbolic": [min(symbolic), max(symbolic)], "wall": sorted(wall)},
    }


_HARD = [(Example(str(n), "own", "test", "q", "[0,\\infty)"), f"(0,{n})") for n in range(8)]


def _respell(answer: str) -> str | None:
    """The same number in another form, for algebra to find out: a fraction with twice its parts."""
    found = re.search(r"\\d?frac\{(\d+)\}\{(\d+)\}", answer)
    if found is None:
        return None
    twice = f"\\frac{{{2 * int(found[1])}}}{{{2 * int(found[2])}}}"
    return answer[: found.start()] + twice + answer[found.end() :]


def _worker_cpu(verifier: SymbolicVerifier) -> float:
    """CPU seconds of the idle workers so far, from /proc."""
    total = 0
    for worker in verifier._idle:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def measure_hostile() -> dict[str, Any]:
    """Outcome and wall seconds of each hostile answer, from a thread of its own, with a limit of 2 s a comparison."""
    verifier = SymbolicVerifier(timeout_s=2.0, max_workers=2)
    rule, example = MathRule(verifier), Example("h", "own", "test", "q", "\\frac{1}{7}x")
    found: dict[str, Any] = {}

    def check(name: str, answer: str) -> None:
        began = time.monotonic()
        outcome, reason = rule.check(example, answer)
        found[name] = {"outcome": outcome, "reason": reason[:80], "wall_s": round(time.monotonic() - began, 2)}

    for name, answer in HOSTILE.items():
        thread = threading.Thread(target=check, args=(name, answer))
        thread.start()
        thread.join()
    verifier.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--math", type=Path, help="MATH's test part with solutions, gzipped JSON lines")
    parser.add_argument("--reference", help="the Python of an environment with lm_eval")
    parser.add_argument("--answers", type=int, default=1000, help="made-up answers a family")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["benchmarks/graders.py", *sys.argv[1:]]),
        "environment": describe_environment(),
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "solutions": lambda: grade_solutions(arguments.math),
        "agreement": lambda: compare_with_references(arguments.reference, arguments.seed, arguments.answers),
        "speed": lambda: measure_speed(arguments.repeats),
        "hostile": measure_hostile,
    }
    for name, part in parts.items():
        if name != "agreement" or arguments.reference:
            result[name] = part()
            print(json.dumps(result[name], indent=1), flush=True)
            write_json(arguments.out, {**result, "cpu_s": round(_cpu_s(), 1)})


if __name__ == "__main__":
    main()
