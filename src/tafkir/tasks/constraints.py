"""Constraints on a text that a program can verify, in the manner of IFEval (arXiv 2311.07911), in English and Arabic.

Words are runs of letters and digits, joined by apostrophes and hyphens; Arabic vowel marks and the tatweel are no
letters.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CONSTRAINTS", "Constraint", "count_sentences", "has_word", "plain", "words"]

Params = Mapping[str, Any]

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"(?<![.!?؟۔])[.!?؟۔]++(?=[\s\"'”»)\]*]|$)")
_BULLET = re.compile(r"[ \t]*[-*•][ \t]+\S")
_ALEF = str.maketrans("أإآٱ", "اااا")
_PREFIXES = r"(?:[وف]?(?:ال|لل|بال|كال|[بلك])?)"
_MIN_SHARE = 0.9


def plain(text: str) -> str:
    """The text without vowel marks and tatweel, in composed form."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(c for c in composed if c != "\u0640" and unicodedata.category(c) != "Mn")


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(plain(text))


def has_word(word: str, text: str) -> int:
    """How often a word stands in a text; case, vowel marks and forms of the alef do not matter.

    An Arabic word also counts with the article and the particles that are written together with it (والكتاب, بكتاب).
    """
    word, text = (plain(each).casefold().translate(_ALEF) for each in (word, text))
    prefix = _PREFIXES if "\u0600" <= word[0] <= "\u06ff" else ""
    return len(re.findall(rf"(?<!\w){prefix}{re.escape(word)}(?!\w)", text))


def count_sentences(text: str) -> int:
    """Sentences by their final signs (. ! ? ؟ ۔), and a last one without; 3.5 ends none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(words(rest))


def _paragraphs(text: str) -> int:
    lines = [bool(line.strip()) for line in text.splitlines()]
    return sum(line and not before for line, before in zip(lines, [False, *lines], strict=False))


def _share(text: str, first: str, last: str) -> float:
    letters = [c for c in text if c.isalpha()]
    return sum(first <= c <= last for c in letters) / len(letters) if letters else 0.0


@dataclass(frozen=True, slots=True)
class Constraint:
    """A kind of constraint.

    Attributes:
        check: from the parameters and a text to why it is broken, "" where it is kept; takes linear time.
        says: the constraint as a sentence by language, to be formatted with the parameters.
    """

    check: Callable[[Params, str], str]
    says: Mapping[str, str]


def _at_least(found: int, params: Params, what: str) -> str:
    return "" if found >= params["n"] else f"{found} {what}, at least {params['n']} are asked for"


def _at_most(found: int, params: Params, what: str) -> str:
    return "" if found <= params["n"] else f"{found} {what}, at most {params['n']} are asked for"


def _exactly(found: int, params: Params, what: str) -> str:
    return "" if found == params["n"] else f"{found} {what} instead of {params['n']}"


def _keywords(params: Params, text: str) -> str:
    missing = [word for word in params["words"] if not has_word(word, text)]
    return f"{missing[0]!r} is missing" if missing else ""


def _forbidden(params: Params, text: str) -> str:
    present = [word for word in params["words"] if has_word(word, text)]
    return f"{present[0]!r} is forbidden" if present else ""


def _json(_: Params, text: str) -> str:
    lines = text.strip().splitlines()
    if len(lines) > 2 and lines[0].rstrip() in ("```", "```json") and lines[-1] == "```":
        text = "\n".join(lines[1:-1])
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "not valid JSON"
    return "" if isinstance(value, (dict, list)) else "neither a JSON object nor an array"


def _language(params: Params, text: str) -> str:
    ranges = {"ar": ("\u0600", "\u06ff"), "en": ("A", "z")}
    share = _share(text, *ranges[params["language"]])
    name = {"ar": "Arabic", "en": "English"}[params["language"]]
    return "" if share >= _MIN_SHARE else f"{100 * share:.0f} % of the letters are {name}"


def _case(params: Params, text: str) -> str:
    wanted = text.lower() if params["case"] == "lower" else text.upper()
    if text.lower() == text.upper():
        return "there are no letters that have a case"
    return "" if text == wanted else f"not all letters are {params['case']} case"


def _quoted(_: Params, text: str) -> str:
    text = text.strip()
    pairs = (('"', '"'), ("“", "”"), ("«", "»"))
    kept = len(text) > 2 and any(text.startswith(a) and text.endswith(b) for a, b in pairs)
    return "" if kept else "not in quotation marks"


def _ends(params: Params, text: str) -> str:
    ending = _comparable(params["phrase"])
    return "" if _comparable(text).endswith(ending) else f"it does not end with {params['phrase']!r}"


def _starts(params: Params, text: str) -> str:
    return (
        "" if _comparable(text).startswith(_comparable(params["phrase"])) else f"no {params['phrase']!r} at its start"
    )


def _comparable(text: str) -> str:
    return " ".join(plain(text).casefold().translate(_ALEF).split()).strip('"“”«» ')


def _postscript(_: Params, text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    return "" if any(line.startswith(("P.S.", "p.s.", "ملاحظة:")) for line in lines[1:]) else "there is no postscript"


def _title(_: Params, text: str) -> str:
    return "" if re.search(r"<<[^<>\n]+>>", text) else "there is no title in << >>"


CONSTRAINTS: Mapping[str, Constraint] = {
    "min_words": Constraint(
        lambda p, t: _at_least(len(words(t)), p, "words"),
        {"en": "Use at least {n} words.", "ar": "استخدم {n} كلمة على الأقل."},
    ),
    "max_words": Constraint(
        lambda p, t: _at_most(len(words(t)), p, "words"),
        {"en": "Use at most {n} words.", "ar": "لا تستخدم أكثر من {n} كلمة."},
    ),
    "sentences": Constraint(
        lambda p, t: _exactly(count_sentences(t), p, "sentences"),
        {"en": "Write exactly {n} sentences.", "ar": "اكتب {n} جمل بالضبط."},
    ),
    "paragraphs": Constraint(
        lambda p, t: _exactly(_paragraphs(t), p, "paragraphs"),
        {
            "en": "Write exactly {n} paragraphs, with an empty line between them.",
            "ar": "اكتب {n} فقرات بالضبط، يفصل بينها سطر فارغ.",
        },
    ),
    "keywords": Constraint(_keywords, {"en": "Use the words {listed}.", "ar": "استخدم الكلمات التالية: {listed}."}),
    "forbidden_words": Constraint(
        _forbidden, {"en": "Do not use the words {listed}.", "ar": "لا تستخدم الكلمات التالية: {listed}."}
    ),
    "word_frequency": Constraint(
        lambda p, t: _at_least(has_word(p["word"], t), p, f"times {p['word']!r}"),
        {"en": "Use the word {word} at least {n} times.", "ar": "استخدم كلمة {word} {n} مرات على الأقل."},
    ),
    "letter_frequency": Constraint(
        lambda p, t: _at_least(plain(t).casefold().count(p["letter"]), p, f"times the letter {p['letter']!r}"),
        {"en": "Use the letter {letter} at least {n} times.", "ar": "استخدم حرف {letter} {n} مرات على الأقل."},
    ),
    "bullets": Constraint(
        lambda p, t: _exactly(sum(bool(_BULLET.match(line)) for line in t.splitlines()), p, "bullet points"),
        {
            "en": "Write exactly {n} bullet points, each on a line that begins with a dash.",
            "ar": "اكتب {n} نقاط بالضبط، كل منها في سطر يبدأ بشرطة.",
        },
    ),
    "highlights": Constraint(
        lambda p, t: _at_least(len(re.findall(r"\*[^*\n]+\*", t)), p, "highlights"),
        {"en": "Highlight at least {n} parts, *like this*.", "ar": "أبرز {n} أجزاء على الأقل *هكذا*."},
    ),
    "placeholders": Constraint(
        lambda p, t: _at_least(len(re.findall(r"\[[^\[\]\n]+\]", t)), p, "placeholders"),
        {
            "en": "Use at least {n} placeholders in square brackets, such as [name].",
            "ar": "استخدم {n} حقول على الأقل بين أقواس مربعة مثل [الاسم].",
        },
    ),
    "title": Constraint(
        _title, {"en": "Give it a title in <<double angle brackets>>.", "ar": "ضع له عنوانا بين <<قوسين>>."}
    ),
    "json": Constraint(_json, {"en": "Answer with JSON only.", "ar": "أجب بصيغة JSON فقط."}),
    "language": Constraint(
        _language, {"en": "Answer in {language_name} only.", "ar": "أجب باللغة {language_name} فقط."}
    ),
    "case": Constraint(
        _case, {"en": "Write everything in {case} case letters.", "ar": "اكتب كل شيء بحروف {case} case."}
    ),
    "no_commas": Constraint(
        lambda _, t: "there is a comma" if set(t) & set(",،") else "",
        {"en": "Do not use commas.", "ar": "لا تستخدم الفواصل."},
    ),
    "no_digits": Constraint(
        lambda _, t: "there is a digit" if any(c.isdigit() for c in t) else "",
        {"en": "Do not use digits.", "ar": "لا تستخدم الأرقام."},
    ),
    "quoted": Constraint(
        _quoted, {"en": "Put the whole answer in quotation marks.", "ar": "ضع الجواب كله بين علامتي تنصيص."}
    ),
    "start": Constraint(_starts, {"en": "Begin with: {phrase}", "ar": "ابدأ بعبارة: {phrase}"}),
    "end": Constraint(_ends, {"en": "End with: {phrase}", "ar": "اختم بعبارة: {phrase}"}),
    "postscript": Constraint(
        _postscript, {"en": "Add a postscript that begins with P.S.", "ar": "أضف حاشية تبدأ بكلمة ملاحظة:"}
    ),
}
"""The constraints that there are, by name."""
