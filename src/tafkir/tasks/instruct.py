"""Instruction following: a topic with constraints that a program verifies, in English or Arabic."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from tafkir.recipe.seeds import derive_seed
from tafkir.tasks.constraints import CONSTRAINTS
from tafkir.tasks.generated import RIGHT, Check, Puzzle, PuzzleKind
from tafkir.tasks.needle import FILLER

__all__ = ["INSTRUCTIONS", "check", "describe"]

MAX_LENGTH = 8000

Ask = dict[str, Any]
"""A constraint that is asked for: its `kind` and its parameters."""

_ARABIC = (
    "تفاح قارب خبز نهر كرسي سحاب غبار حقل نار أرض عشب تل ثلج مصباح ورق ضباب قمر ليل طريق مطر سقف رمل بحر حجر شمس موج"
).split()
_FILLER = {"en": FILLER, "ar": tuple(_ARABIC)}
_PHRASES = {
    "en": ("That is all.", "Thank you for reading.", "Is there anything else?"),
    "ar": ("هذا كل شيء.", "شكرا على القراءة.", "هل هناك شيء آخر؟"),
}
_OPENINGS = {"en": ("Dear reader", "Here it is"), "ar": ("عزيزي القارئ", "إليك الجواب")}
_TOPIC = {"en": "Write a short text about {topic}.", "ar": "اكتب نصا قصيرا عن {topic}."}
_LISTED = {"en": ", ", "ar": "، "}
_NAMES = {"en": {"en": "English", "ar": "Arabic"}, "ar": {"en": "الإنجليزية", "ar": "العربية"}}


def describe(ask: Ask, language: str) -> str:
    """The constraint as a sentence."""
    params = {**ask, "listed": _LISTED[language].join(ask.get("words", ()))}
    params["language_name"] = _NAMES[language].get(ask.get("language", ""), "")
    return CONSTRAINTS[ask["kind"]].says[language].format(**params)


def _draw(random: Random, kind: str, language: str) -> Ask:
    filler = _FILLER[language]
    match kind:
        case "min_words":
            return {"kind": kind, "n": random.randint(8, 30)}
        case "max_words":
            return {"kind": kind, "n": random.randint(6, 30)}
        case "keywords" | "forbidden_words":
            return {"kind": kind, "words": random.sample(filler, random.randint(1, 3))}
        case "word_frequency":
            return {"kind": kind, "word": random.choice(filler), "n": random.randint(2, 4)}
        case "letter_frequency":
            return {
                "kind": kind,
                "letter": random.choice("aeost" if language == "en" else "ابرمن"),
                "n": random.randint(3, 9),
            }
        case "sentences" | "paragraphs" | "bullets" | "highlights" | "placeholders":
            return {"kind": kind, "n": random.randint(2, 4)}
        case "language":
            return {"kind": kind, "language": language}
        case "case":
            return {"kind": kind, "case": random.choice(("lower", "upper"))}
        case "start":
            return {"kind": kind, "phrase": random.choice(_OPENINGS[language])}
        case "end":
            return {"kind": kind, "phrase": random.choice(_PHRASES[language])}
    return {"kind": kind}


def _answer(random: Random, asks: Sequence[Ask], language: str) -> str:
    """A text that tries to keep all constraints; some sets of them cannot be kept together."""
    by_kind = {ask["kind"]: ask for ask in asks}

    def number(kind: str, default: int) -> int:
        return int(by_kind[kind]["n"]) if kind in by_kind else default

    forbidden = by_kind.get("forbidden_words", {}).get("words", ())
    filler = [word for word in _FILLER[language] if word not in forbidden]
    content = list(by_kind.get("keywords", {}).get("words", ()))
    if "word_frequency" in by_kind:
        content += [by_kind["word_frequency"]["word"]] * number("word_frequency", 0)
    if "letter_frequency" in by_kind:
        letter = by_kind["letter_frequency"]["letter"]
        content += [word for word in filler if letter in word][: number("letter_frequency", 0)]
    content += random.choices(filler, k=max(0, number("min_words", min(8, number("max_words", 8))) - len(content)))
    for index in range(number("highlights", 0)):
        content[index % len(content)] = f"*{content[index % len(content)].strip('*')}*"
    content += ["[x]" if language == "en" else "[س]"] * number("placeholders", 0)
    if "json" in by_kind:
        return json.dumps({"text": " ".join(content)}, ensure_ascii=False)
    count = max(number("sentences", 1), number("paragraphs", 1), number("bullets", 1))
    count -= "end" in by_kind and "sentences" in by_kind
    parts = [" ".join(content[i::count]) + "." for i in range(count)] if count > 0 else []
    if "bullets" in by_kind:
        parts = [f"- {part}" for part in parts]
    text = ("\n\n" if "paragraphs" in by_kind else "\n").join(parts)
    if "start" in by_kind:
        text = f"{by_kind['start']['phrase']} {text}"
    if "title" in by_kind:
        text = f"<<{filler[0]}>>\n{text}"
    if "postscript" in by_kind:
        text += f"\nP.S. {filler[1]}" if language == "en" else f"\nملاحظة: {filler[1]}"
    if "end" in by_kind:
        text += f" {by_kind['end']['phrase']}"
    if "quoted" in by_kind:
        text = f'"{text}"'
    case = by_kind.get("case", {}).get("case")
    return text.lower() if case == "lower" else text.upper() if case == "upper" else text


def make_instructions(seed: int, level: int) -> Puzzle:
    """A topic with as many constraints as the level says, which can be kept together: `answer` keeps them."""
    random = Random(derive_seed(seed, "instructions"))
    language = random.choice(("en", "ar"))
    kinds = [kind for kind in CONSTRAINTS if language == "en" or kind != "case"]
    while True:
        asks = [_draw(random, kind, language) for kind in random.sample(kinds, level)]
        answer = _answer(random, asks, language)
        if check({"constraints": asks}, answer) == RIGHT:
            break
    topic = _TOPIC[language].format(topic=random.choice(_FILLER[language]))
    question = " ".join([topic, *(describe(ask, language) for ask in asks)])
    return Puzzle(question, answer, "", {"constraints": asks})


def check(data: Mapping[str, Any], text: str) -> Check:
    """Whether every constraint is kept; the reason names each that is not."""
    broken = [(ask["kind"], CONSTRAINTS[ask["kind"]].check(ask, text)) for ask in data["constraints"]]
    reasons = [f"{kind}: {reason}" for kind, reason in broken if reason]
    return ("wrong", "; ".join(reasons)) if reasons else RIGHT


INSTRUCTIONS = PuzzleKind("instructions", make_instructions, check, reads="text", max_length=MAX_LENGTH)
