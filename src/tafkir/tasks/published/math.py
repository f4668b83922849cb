"""Mathematics with one right answer: GSM8K, SVAMP, MATH, AIME, Omni-MATH, OlymMATH, MGSM, PolyMath in Arabic.

Answers may stand in Latin, Arabic-Indic or Persian digits in every one of them, and after an Arabic marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

from tafkir.data.sources import read_source
from tafkir.records import Example, Outcome
from tafkir.tasks.answers import (
    MAX_ANSWER_LENGTH,
    Extraction,
    extract_answer,
    extract_text,
    is_unevaluated,
    normalize,
    read_value,
)
from tafkir.tasks.published.base import (
    PublishedTask,
    TaskCard,
    TaskSampling,
    bad_row,
    entry,
    find_file,
    read_rows,
)
from tafkir.tasks.published.numeric import compare
from tafkir.tasks.symbolic import SymbolicVerifier, default_verifier

__all__ = ["TASKS", "MathRule", "NumberRule", "find_box", "numbers_equal", "tidy"]

# ---- where the answer stands ---------------------------------------------------------------------------------------

_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*")
_STATED = re.compile(
    r"(?:(?:final\s+answer|answer)\s*(?:is|:|=)|(?:الجواب|الإجابة|الاجابة|الناتج)(?:\s+النهائية?)?\s*(?:هو|هي|:|=))"
    r"[ \t:]*([^\n]+)",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
_TAIL, _MAX_DEPTH = 20_000, 40


def find_box(text: str) -> Extraction | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}`, or of a `\boxed 5` without braces; None without a box.

    Escaped braces, as in `\{1, 2\}`, do not count.
    """
    found = list(_BOX.finditer(text))
    if not found:
        return None
    start = found[-1].end()
    if not text.startswith("{", start):
        bare = re.match(r"[^\s$.,;]+", text[start:])
        return Extraction(bare[0], "box") if bare else Extraction(None, "box", "the box is empty")
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                content = text[start + 1 : position].strip()
                return Extraction(content, "box") if content else Extraction(None, "box", "the box is empty")
        position += 1
    return Extraction(None, "box", "the box is never closed")


def _find_expression(text: str, *, finished: bool) -> Extraction:
    """Box, else what follows the last "answer is", else the last formula, else the last number; after the thought."""
    answer = extract_text(text, boxed=False)
    if answer.text is None:
        return answer
    box = find_box(answer.text)
    if box is not None:
        return box
    if not finished:
        return Extraction(None, "", "cut off before an answer")
    tail = answer.text[-_TAIL:]
    stated = [match[1].strip(" *") for match in _STATED.finditer(tail)]
    if stated and stated[-1]:
        formula = _FORMULA.search(stated[-1])
        inside = next(filter(None, formula.groups()), "") if formula else stated[-1].split(". I hope")[0]
        return Extraction(inside.strip(), "answer is")
    formulas = [next(filter(None, match.groups()), "").strip() for match in _FORMULA.finditer(tail)]
    if formulas and formulas[-1]:
        return Extraction(formulas[-1].rpartition("=")[2].strip() or formulas[-1], "text")
    numbers = _NUMBER.findall(normalize(tail))
    return Extraction(numbers[-1], "last number") if numbers else Extraction(None, "", "there is no answer")


# ---- whether it is right -------------------------------------------------------------------------------------------

_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=.)\\(?:text|mbox|mathrm)\{\s[^{}]*\}(?:\^\{?\d\}?)?\s*$")
_AND = re.compile(r"\\(?:text|mbox)\{\s*and\s*\}")
_BASE = re.compile(r"(-?[\dA-F.]+)_\{?(\d+)\}?")
_SPACING = re.compile(r"(?<!\\)\\(?:[,;:!> ]|quad|qquad|displaystyle|left|right|big|Big|bigg|Bigg)(?![A-Za-z])|~|\s+")
_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_FRAC = re.compile(rf"\\[dtc]?frac\s*({_GROUP}|\\pi|\w)\s*({_GROUP}|\d|[a-zA-Z](?![a-zA-Z]))")
_SQRT = re.compile(r"\\sqrt\s*(\d|[a-zA-Z])(?![a-zA-Z])")
_SLASH = re.compile(r"(-?)(\d+)/(\d+)")
_NAMED = re.compile(r"\\?[A-Za-zء-ي]{1,2}(?:\([A-Za-z]\))?(?:=|\\in(?![a-z]))")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ -][^\W\d_]+)*")


def _braced(part: str) -> str:
    return part if part.startswith("{") else f"{{{part}}}"


def tidy(text: str) -> str:
    """An answer in one spelling: Latin digits, no spacing, delimiters, units or `x =`, fractions and roots with braces.

    Two answers that are equal afterwards are equal; the reverse does not hold.
    """
    text = normalize(text).replace("،", ",").replace("؛", ";").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            text = text[len(opening) : -len(closing)]
    text = text.strip().rstrip(".").replace("\\$", "").replace("\\%", "%").replace("{,}", ",").replace("\\\\", "\\\\ ")
    text = _AND.sub(",", text).replace(",,", ",")
    text = _TEXT.sub(r"\1", _UNIT.sub("", text)).replace("^\\circ", "").replace("^{\\circ}", "")
    text = _SPACING.sub("", text).replace("\\le", "\\leq").replace("\\leqq", "\\leq")
    text = text.replace("\\ge", "\\geq").replace("\\geqq", "\\geq")
    text = _SQRT.sub(lambda match: f"\\sqrt{{{match[1]}}}", text)
    text = _FRAC.sub(lambda match: f"\\frac{_braced(match[1])}{_braced(match[2])}", text)
    named = _NAMED.match(text)
    text = text[named.end() :] if named and len(text) > named.end() and text.count("=") < 2 else text
    slash = _SLASH.fullmatch(text)
    text = f"{slash[1]}\\frac{{{slash[2]}}}{{{slash[3]}}}" if slash else text
    return re.sub(r"(?<!\d)\.(?=\d)", "0.", text)


def numbers_equal(expected: str, answer: str) -> bool | None:
    """Whether two plain numbers are equal, 10% being 10 and 0.1 alike; None where one of them is no plain number."""
    gold, given = read_value(expected), read_value(answer)
    if gold is None or given is None:
        return None
    return given.equals(gold.number) or (gold.percent and given.number * 100 == gold.number)


class NumberRule:
    """A number: the last box, else `#### N`, else "answer is N" (also in Arabic), else the last number; exactly equal.

    GSM8K's own rule (arXiv 2110.14168: the number after `####`, commas taken out) with the flexible extraction of
    lm-evaluation-harness behind it.
    """

    def extract(self, example: Example, text: str, *, finished: bool) -> Extraction:
        return extract_answer(text, finished=finished)

    def check(self, example: Example, answer: str) -> tuple[Outcome, str]:
        equal = numbers_equal(example.answer, answer)
        if equal is None:
            return MathRule().check(example, answer)
        return ("correct", "") if equal else ("wrong", "not equal to the expected answer")


class MathRule:
    """An expression: the last box, else what follows "answer is", else the last formula; equal by three steps.

    The same spelling (`tidy`, in the manner of Hendrycks et al., arXiv 2103.03874), the same plain number, else equal
    for math-verify in a process with a time limit, unless their values tell (`compare`). An answer that
    takes longer is a "timeout".
    """

    def __init__(self, verifier: SymbolicVerifier | None = None) -> None:
        self._verifier = verifier

    def extract(self, example: Example, text: str, *, finished: bool) -> Extraction:
        return _find_expression(text, finished=finished)

    def check(self, example: Example, answer: str) -> tuple[Outcome, str]:
        if len(answer) > MAX_ANSWER_LENGTH:
            return "wrong", f"the answer has {len(answer)} characters; at most {MAX_ANSWER_LENGTH} are read"
        if max(accumulate({"{": 1, "}": -1}.get(character, 0) for character in answer), default=0) > _MAX_DEPTH:
            return "wrong", f"braces are nested deeper than {_MAX_DEPTH}"
        gold, given = tidy(example.answer), tidy(answer)
        if given.casefold() == gold.casefold() if _WORDS.fullmatch(gold) else given == gold:
            return "correct", ""
        base = _BASE.fullmatch(gold)
        if base is not None:  # math-verify drops the base
            other = _BASE.fullmatch(given)
            same = other.groups() == base.groups() if other else given == base[1]
            return ("correct", "") if same else ("wrong", "not the expected digits and base")
        equal = numbers_equal(example.answer, answer)
        equal = numbers_equal(gold, given) if equal is None else equal
        if equal is None and _AND.search(example.answer):
            equal = sorted(filter(None, gold.split(","))) == sorted(filter(None, given.split(",")))
        if equal is None and ("\\text" in example.answer or _WORDS.fullmatch(gold)) and len(gold) > 3:
            equal = _bare(given) == _bare(gold)  # words are no product of their letters
        elif equal is None and is_unevaluated(answer) and read_value(example.answer) is not None:
            return "wrong", "an expression that is not worked out"
        if equal is not None:
            return ("correct", "") if equal else ("wrong", "not equal to the expected answer")
        equal = compare(gold, given)
        if equal is not None:
            return ("correct", "") if equal else ("wrong", "not equal to the expected answer")
        result = (self._verifier or default_verifier()).compare(example.answer, _readable(answer))
        if result.equal is None:
            if result.reason == "not a mathematical expression":
                return "wrong", result.reason
            return "timeout" if result.timed_out else "error", result.reason
        return ("correct", "") if result.equal else ("wrong", "not equal to the expected answer")


def _bare(text: str) -> str:
    return re.sub(r"[\W_]", "", text.casefold())


def _readable(answer: str) -> str:
    return normalize(answer).replace("،", ",").strip().strip("$").removesuffix(".")


# ---- MGSM ----------------------------------------------------------------------------------------------------------


@cache
def _mgsm_prompts() -> Mapping[str, Mapping[str, str]]:
    prompts: dict[str, dict[str, str]] = json.loads(
        (files("tafkir") / "datasets" / "mgsm" / "prompts.json").read_text("utf-8")
    )
    return prompts


# 1.234 in languages that divide thousands so; every answer of MGSM is a whole number.
_DOTS = re.compile(r"(?<=\d)\.(?=\d{3}(?!\d))")
_SPACES = re.compile(r"(?<=\d)[ ’'](?=\d{3}(?!\d))")
_DOTTED, _SPACED = frozenset({"de", "es"}), frozenset({"fr", "ru"})


class MarkedNumber:
    """MGSM (arXiv 2210.03057) by simple-evals' rule: the last number after the last marker, such as "Antwort".

    A box counts before that. Unlike there, a sign and a language's own way to divide thousands are read.
    """

    def extract(self, example: Example, text: str, *, finished: bool) -> Extraction:
        answer = extract_text(text, boxed=False)
        if answer.text is None:
            return answer
        box = find_box(answer.text)
        if box is not None:
            return box
        marker = _mgsm_prompts()[example.subject]["marker"]
        _, found, rest = answer.text.rpartition(marker)
        if not finished or not found:
            return Extraction(None, "", f"nothing says {marker!r}" if finished else "cut off before an answer")
        rest = normalize(rest)
        if example.subject in _DOTTED:
            rest = _DOTS.sub("", rest)
        elif example.subject in _SPACED:
            rest = _SPACES.sub("", rest)
        numbers = _NUMBER.findall(rest)
        return Extraction(numbers[-1], "answer is") if numbers else Extraction(None, "", "there is no number")

    def check(self, example: Example, answer: str) -> tuple[Outcome, str]:
        return NumberRule().check(example, answer)


def _mgsm(card: TaskCard, data: Path | None) -> PublishedTask:
    only = card.name.partition("-")[2]

    def read() -> Iterator[Example]:
        path = find_file(card, data, ["mgsm.jsonl*"], shipped="mgsm/mgsm.jsonl.gz")
        seen = dict.fromkeys(_mgsm_prompts(), 0)
        for place, row in read_rows(path, ("question", "answer", "language")):
            language = row["language"]
            if language not in seen:
                raise bad_row(place, f"a language of MGSM, not {language!r}")
            id = f"mgsm-{language}-{seen[language]}"
            seen[language] += 1
            if only in ("", language):
                yield Example(id, card.name, "test", row["question"], str(row["answer"]), subject=language)

    def ask(example: Example) -> str:
        return _mgsm_prompts()[example.subject]["prompt"].replace("{question}", example.question)

    return PublishedTask(card, read, ask, MarkedNumber())


# ---- the sets ------------------------------------------------------------------------------------------------------

_BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
_BOXED_ZH = "{question}\n请逐步推理，并在 \\boxed{} 内给出您的最终答案。"
_BOXED_AR = "{question}\nفكر خطوة بخطوة، وضع الجواب النهائي داخل \\boxed{}."
_R1 = "prompt and sampling of the DeepSeek-R1 model card"


def _bundled(card: TaskCard, data: Path | None) -> PublishedTask:
    """GSM8K and SVAMP: the test part of the package's own split, or every row of the user's file."""

    def read() -> Iterator[Example]:
        if data is None and card.name == "svamp":
            yield from (problem.as_example() for problem in read_source(card.name)[0] if problem.split == "test")
            return
        # `read_source` would read the equations of the training part first, which takes seconds.
        path = find_file(
            card, data, ["test.jsonl*", f"{card.name}*.jsonl*", "SVAMP.json"], shipped="gsm8k/test.jsonl.gz"
        )
        if card.name == "gsm8k":
            for number, (_, row) in enumerate(read_rows(path, ("question", "answer"))):
                answer = row["answer"].rpartition("####")[2].strip()
                yield Example(f"gsm8k-test-{number}", "gsm8k", "test", row["question"], answer)
            return
        for _, row in read_rows(path, ("ID", "Body", "Question", "Answer")):
            question = f"{row['Body'].rstrip()} {row['Question']}"
            yield Example(f"svamp-{row['ID']}", "svamp", "test", question, f"{row['Answer']:g}")

    return PublishedTask(card, read, lambda example: _BOXED.replace("{question}", example.question), NumberRule())


@dataclass(frozen=True, slots=True)
class _Set:
    """Where a set of problems is and what its rows hold; `names` are what it may be called in the user's folder."""

    names: Sequence[str]
    shipped: str = ""
    columns: Sequence[str] = ("problem|question|Problem", "answer|expected_answer|Answer")
    prompt: str = _BOXED
    subject: Callable[[Mapping[str, Any]], str] = lambda row: str(row.get("subject") or row.get("type") or "")
    difficulty: Callable[[Mapping[str, Any]], str] = lambda row: ""
    whole: bool = False

    def build(self, card: TaskCard, data: Path | None) -> PublishedTask:
        path = find_file(card, data, self.names, shipped=self.shipped)

        def read() -> Iterator[Example]:
            for number, (place, row) in enumerate(read_rows(path, self.columns)):
                answer = _reference(str(row["answer"]).strip())
                if self.whole and not re.fullmatch(r"0*\d{1,3}", answer):
                    raise bad_row(place, f"an integer from 0 to 999 as the answer, not {answer[:40]!r}")
                id = str(row.get("unique_id") or row.get("id") or row.get("idx") or number)
                id, subject, difficulty = f"{card.name}-{id}", self.subject(row), self.difficulty(row)
                yield Example(id, card.name, "test", row["problem"], answer, {}, subject, difficulty)

        ask = self.prompt
        return PublishedTask(card, read, lambda example: ask.replace("{question}", example.question), MathRule())


def _reference(answer: str) -> str:
    """A reference answer alone: out of its box or its sentence, and with the braces closed that the data leaves open.

    Omni-MATH holds all three kinds.
    """
    answer += "}" * (len(re.findall(r"(?<!\\){", answer)) - len(re.findall(r"(?<!\\)}", answer)))
    box = find_box(answer)
    if box is not None and box.text is not None:
        return box.text
    words = re.sub(r"\\[A-Za-z]+", "", _FORMULA.sub("", answer))
    formulas = [next(filter(None, match.groups()), "").strip() for match in _FORMULA.finditer(answer)]
    return formulas[-1] if formulas and (not words.strip() or len(re.findall(r"[A-Za-z]{2,}", words)) > 2) else answer


def _level(row: Mapping[str, Any]) -> str:
    level = str(row.get("level") or "")
    return level if not level.isdecimal() else f"Level {level}"


def _domain(row: Mapping[str, Any]) -> str:
    first = (row.get("domain") or [""])[0]
    return str(first).removeprefix("Mathematics -> ").partition(" -> ")[0]


def _part(row: Mapping[str, Any]) -> str:
    return str(row.get("source", "")).replace("_", " ")


_GREEDY = TaskSampling(0.0, 1.0, 2048, 1)


def _thinking(samples: int) -> TaskSampling:
    """DeepSeek-R1's sampling: temperature 0.6, top_p 0.95, 32,768 tokens."""
    return TaskSampling(0.6, 0.95, 32_768, samples)


_MATH500 = (
    "download test.jsonl of huggingface.co/datasets/HuggingFaceH4/MATH-500 and pass it as --data; "
    "the 4,500 other test problems of MATH are in the package as math-test"
)
_AIME25 = "download test.jsonl (30 problems) of huggingface.co/datasets/math-ai/aime25, and pass it as --data"
_POLYMATH = (
    "download the four ar/*.parquet of huggingface.co/datasets/Qwen/PolyMath, join them to one JSONL with question, "
    "answer, level, and pass it as --data"
)

TASKS = (
    entry(
        "gsm8k",
        "GSM8K: grade-school word problems, rows 0 to 659 of the test file",
        660,
        _bundled,
        sampling=_GREEDY,
        license="MIT",
        source=f"data: arXiv 2110.14168; {_R1}, greedy",
    ),
    entry(
        "svamp",
        "SVAMP: varied word problems, the package's test part (all 1,000 with --data svamp.jsonl.gz)",
        300,
        _bundled,
        sampling=_GREEDY,
        license="MIT",
        source=f"data: arXiv 2103.07191; {_R1}, greedy",
    ),
    entry(
        "math-500",
        "MATH-500: the subset of Lightman et al.",
        500,
        _Set(["test.jsonl*", "*math*500*.jsonl*"], difficulty=_level).build,
        sampling=_thinking(4),
        license="MIT",
        source=f"data: arXiv 2305.20050; {_R1}; rule: arXiv 2103.03874, then math-verify",
        how_to_get=_MATH500,
    ),
    entry(
        "math-test",
        "MATH: the 4,500 test problems that MATH-500 leaves out",
        4500,
        _Set(["test_less_500.jsonl*"], "math/test_less_500.jsonl.gz", difficulty=_level).build,
        sampling=_thinking(1),
        license="MIT",
        source=f"data: arXiv 2103.03874; {_R1}; rule: the same paper, then math-verify",
    ),
    entry(
        "aime24",
        "AIME 2024 I and II",
        30,
        _Set(["*aime*24*.jsonl*", "test.jsonl*"], "aime/aime24.jsonl.gz", subject=_part, whole=True).build,
        sampling=_thinking(64),
        license="Apache-2.0 (problems: MAA)",
        source=_R1,
    ),
    entry(
        "aime25",
        "AIME 2025 I and II",
        30,
        _Set(["*aime*25*.jsonl*", "test.jsonl*", "*.parquet"], subject=_part, whole=True).build,
        sampling=_thinking(64),
        license="problems: MAA",
        source=_R1,
        how_to_get=_AIME25,
    ),
    entry(
        "omni-math-rule",
        "Omni-MATH: the olympiad problems that a rule can grade",
        2821,
        _Set(
            ["*omni*.jsonl*"],
            "omni_math/rule.jsonl.gz",
            subject=_domain,
            difficulty=lambda row: f"{row['difficulty']:g}",
        ).build,
        sampling=_thinking(1),
        license="Apache-2.0",
        source=f"data: arXiv 2410.07985; {_R1}; rule: math-verify",
    ),
    *(
        entry(
            f"olymmath-{language}-{level}",
            f"OlymMATH, {'English' if language == 'en' else 'Chinese'}, {level}",
            100,
            _Set(
                [f"*{language}-{level}*.jsonl*", f"*{language.upper()}-{level.upper()}*.jsonl*"],
                f"olymmath/{language}-{level}.jsonl.gz",
                prompt=_BOXED if language == "en" else _BOXED_ZH,
            ).build,
            sampling=_thinking(64),
            license="MIT",
            source="arXiv 2503.21380",
            language=language,
        )
        for language in ("en", "zh")
        for level in ("easy", "hard")
    ),
    *(
        entry(
            f"mgsm-{language}" if language else "mgsm",
            f"MGSM: 250 problems of GSM8K {'in ' + language if language else 'in each of 11 languages'}",
            250 if language else 2750,
            _mgsm,
            sampling=_GREEDY,
            license="CC BY 4.0 (prompts: MIT)",
            source="data: arXiv 2210.03057; prompt and rule: simple-evals mgsm_eval.py",
            language=language or "multi",
        )
        for language in ("", "bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
    ),
    entry(
        "polymath-ar",
        "PolyMath in Arabic: 4 levels of 125 problems",
        None,
        _Set(
            ["*ar*.jsonl*", "*.jsonl*", "*.parquet"], prompt=_BOXED_AR, difficulty=lambda row: str(row.get("level", ""))
        ).build,
        sampling=_thinking(16),
        license="Apache-2.0",
        source="data: arXiv 2504.18428; prompt: its boxed instruction in Arabic",
        language="ar",
        how_to_get=_POLYMATH,
    ),
)
