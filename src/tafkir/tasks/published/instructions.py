"""IFEval (arXiv 2311.07911): 541 prompts with 25 kinds of instructions that a program verifies, strict and loose.

The rules are those of the official checker, told by the paper; sentences and capital words are counted without its
trained tokenizer, so that nothing has to be downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tafkir.errors import BackendUnavailable
from tafkir.records import Example, Outcome
from tafkir.tasks.answers import Extraction, extract_text
from tafkir.tasks.published.base import (
    PublishedTask,
    TaskCard,
    TaskEntry,
    TaskSampling,
    bad_row,
    entry,
    find_file,
    read_rows,
)

__all__ = ["INSTRUCTIONS", "TASKS", "InstructionRule", "count_sentences", "follow"]

Params = Mapping[str, Any]

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr vs etc e.g i.e u.s u.k u.n a.m p.m inc ltd co corp no vol fig al approx dept est gen "
    "gov hon jan feb mar apr jun jul aug sep sept oct nov dec lt col sgt capt rev sen rep ph.d m.d b.a m.a d.c".split()
)
_END = re.compile(r"(\S*?)([.!?]+)[\"'”’)\]*_]*(?=\s|$)")


def count_sentences(text: str) -> int:
    """Sentences: a dot ends one unless an abbreviation or an initial stands before it or a small letter after it."""
    count, last = 0, 0
    for match in _END.finditer(text):
        word, sign, after = match[1].lstrip("\"'“(*_").lower(), match[2], text[match.end() :].lstrip()
        if sign == "." and (word in _ABBREVIATIONS or re.fullmatch(r"[a-z]", word) or after[:1].islower()):
            continue
        if len(sign) > 1 and set(sign) == {"."} and after[:1].islower():
            continue
        count, last = count + 1, match.end()
    return count + bool(text[last:].strip())


def _compare(params: Params, count: int, limit: str, relation: str = "relation") -> bool:
    return bool(count < params[limit] if params[relation] == "less than" else count >= params[limit])


def _is_language(text: str, language: str) -> bool:
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return bool(detect(text) == language)
    except LangDetectException:  # nothing to tell a language by, such as digits alone, counts as kept
        return True


def _json(_: Params, text: str) -> bool:
    text = re.sub(r"\A```(?:json|Json|JSON)?|```\Z", "", text.strip()).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parts(text: str, divider: str) -> list[str] | None:
    """What stands between dividers; None where nothing stands between two of them."""
    parts = [part.strip() for part in text.split(divider)]
    inner = parts[1:-1]
    return None if not all(inner) else [part for part in parts if part]


def _two_responses(_: Params, text: str) -> bool:
    parts = _parts(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _paragraphs(params: Params, text: str) -> bool:
    parts = _parts(text, "***")
    return parts is not None and len(parts) == params["num_paragraphs"]


def _first_word(params: Params, text: str) -> bool:
    paragraphs = text.split("\n\n")
    nth, filled = params["nth_paragraph"], sum(bool(part.strip()) for part in paragraphs)
    if nth > filled or filled != params["num_paragraphs"] or not paragraphs[nth - 1].strip():
        return False
    word = paragraphs[nth - 1].split()[0].lstrip("'").lstrip('"')
    return bool(re.split(r"[.,?!'\"]", word)[0].lower() == params["first_word"])


def _highlights(params: Params, text: str) -> bool:
    single = [found for found in re.findall(r"\*[^\n*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*([^\n*]*)\*\*", text) if found.strip()]
    return bool(len(single) + len(double) >= params["num_highlights"])


def _bullets(params: Params, text: str) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return bool(len(stars) + len(dashes) == params["num_bullets"])


def _postscript(params: Params, text: str) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = params["postscript_marker"].strip()
    return bool(re.search(known.get(marker, re.escape(marker.lower())), text.lower()))


def _letters(params: Params, text: str) -> bool:
    return _compare(params, text.lower().count(params["letter"].strip().lower()), "let_frequency", "let_relation")


def _keyword(params: Params, text: str) -> bool:
    found = re.findall(re.escape(params["keyword"].strip()), text, re.IGNORECASE)
    return _compare(params, len(found), "frequency")


def _capitals(params: Params, text: str) -> bool:
    tokens = re.findall(r"\w+(?:[-./&]\w+)*|['’]\w+", text)
    return _compare(params, sum(token.isupper() for token in tokens), "capital_frequency", "capital_relation")


def _title(_: Params, text: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


INSTRUCTIONS: Mapping[str, Callable[[Params, str], bool]] = {
    "change_case:capital_word_frequency": _capitals,
    "change_case:english_capital": lambda _, t: t.isupper() and _is_language(t, "en"),
    "change_case:english_lowercase": lambda _, t: t.islower() and _is_language(t, "en"),
    "combination:repeat_prompt": lambda p, t: t.strip().lower().startswith(p["prompt_to_repeat"].strip().lower()),
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": lambda p, t: len(re.findall(r"\[.*?\]", t)) >= p["num_placeholders"],
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda _, t: any(
        f"My answer is {w}." in t for w in ("yes", "no", "maybe")
    ),
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": lambda p, t: (
        len(re.findall(re.escape(p["section_spliter"].strip()) + r"\s?\d+", t)) >= p["num_sections"]
    ),
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "keywords:existence": lambda p, t: all(re.search(re.escape(word), t, re.IGNORECASE) for word in p["keywords"]),
    "keywords:forbidden_words": lambda p, t: (
        not any(re.search(rf"\b{re.escape(word)}\b", t, re.IGNORECASE) for word in p["forbidden_words"])
    ),
    "keywords:frequency": _keyword,
    "keywords:letter_frequency": _letters,
    "language:response_language": lambda p, t: _is_language(t, p["language"]),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": lambda p, t: _compare(p, count_sentences(t), "num_sentences"),
    "length_constraints:number_words": lambda p, t: _compare(p, len(re.findall(r"\w+", t)), "num_words"),
    "punctuation:no_comma": lambda _, t: "," not in t,
    "startend:end_checker": lambda p, t: t.strip().strip('"').lower().endswith(p["end_phrase"].strip().lower()),
    "startend:quotation": lambda _, t: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
}
"""The kinds of instructions: from parameters and a response to whether it is kept."""


def _variants(text: str) -> Iterator[str]:
    """The response as it is, and without its first line, its last, both, each also without asterisks."""
    lines = text.split("\n")
    for part in (text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()):
        yield part
        yield part.replace("*", "")


def follow(example: Example, response: str, *, loose: bool = False) -> list[bool]:
    """Whether each instruction of an example is kept, in order: the paper's instruction-level accuracy.

    Args:
        loose: one of eight variants of the response is enough.
    """
    kept = []
    for kind, params in example.extra["instructions"]:
        texts = _variants(response) if loose else [response]
        kept.append(any(bool(text.strip()) and INSTRUCTIONS[kind](params, text) for text in texts))
    return kept


class InstructionRule:
    """Prompt-level accuracy: every instruction is kept. A response that was cut off is never judged."""

    def __init__(self, *, loose: bool) -> None:
        self._loose = loose

    def extract(self, example: Example, text: str, *, finished: bool) -> Extraction:
        return extract_text(text, finished=finished, boxed=False)

    def check(self, example: Example, answer: str) -> tuple[Outcome, str]:
        kept = follow(example, answer, loose=self._loose)
        broken = [kind for (kind, _), good in zip(example.extra["instructions"], kept, strict=True) if not good]
        return ("wrong", f"not kept: {', '.join(broken)}") if broken else ("correct", "")


def _build(card: TaskCard, data: Path | None) -> PublishedTask:
    if importlib.util.find_spec("langdetect") is None:
        raise BackendUnavailable(
            "langdetect, by which IFEval tells languages, is not installed",
            where=card.name,
            fix="pip install 'tafkir[eval]'",
        )
    path = find_file(card, data, ["ifeval.jsonl*", "input_data.jsonl*", "*.jsonl*"], shipped="ifeval/ifeval.jsonl.gz")

    def read() -> Iterator[Example]:
        for place, row in read_rows(path, ("key", "prompt", "instruction_id_list", "kwargs")):
            kinds: Sequence[str] = row["instruction_id_list"]
            unknown = next((kind for kind in kinds if kind not in INSTRUCTIONS), None)
            if unknown is not None or len(kinds) != len(row["kwargs"]):
                raise bad_row(place, f"known instructions with one kwargs each, not {unknown or len(row['kwargs'])}")
            params = [{key: value for key, value in given.items() if value} for given in row["kwargs"]]
            instructions = list(zip(kinds, params, strict=True))
            subject = kinds[0].partition(":")[0] if len(kinds) == 1 else "several"
            difficulty = f"{len(kinds)} instruction{'s' if len(kinds) > 1 else ''}"
            id, extra = f"ifeval-{row['key']}", {"instructions": instructions}
            yield Example(id, card.name, "test", row["prompt"], "; ".join(kinds), extra, subject, difficulty)

    rule = InstructionRule(loose=card.name.endswith("-loose"))
    return PublishedTask(card, read, lambda example: example.question, rule)


TASKS: Sequence[TaskEntry] = tuple(
    entry(
        f"ifeval{suffix}",
        f"IFEval: verifiable instructions, prompt level, {suffix.lstrip('-') or 'strict'}",
        541,
        _build,
        sampling=TaskSampling(0.0, 1.0, 4096, 1),
        license="Apache-2.0",
        source="arXiv 2311.07911",
    )
    for suffix in ("", "-loose")
)
