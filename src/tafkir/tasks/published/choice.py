"""Generative multiple choice: MMLU-Pro, GPQA-Diamond, AQuA, and Arabic sets with Arabic letters and markers.

The options are letters in the prompt and the answer is text, so that it works through a chat endpoint and for models
that think first; no log-likelihoods are compared.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tafkir.records import Example, Outcome
from tafkir.tasks.answers import Extraction, extract_text, normalize
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
from tafkir.tasks.published.math import find_box

__all__ = ["ALPHABETS", "TASKS", "ChoiceRule", "ask_choice", "choice_example"]

ALPHABETS = {"en": "ABCDEFGHIJ", "ar": "أبجدهوزحطي"}
"""The letters of the options by language; Arabic has the order of the abjad."""

_WIDE = str.maketrans("ＡＢＣＤＥＦＧＨＩＪ", "ABCDEFGHIJ")
_ALEFS = "أاإآ"
_MARKER = (
    r"(?:answer|choice|option|"
    r"(?:ال)?[إا]جابة(?:\s+(?:النهائية|الصحيحة))?|(?:ال)?جواب(?:\s+(?:النهائي|الصحيح))?|(?:ال)?اختيار|(?:ال)?خيار)"
    r"(?:\s+(?:is|هو|هي))?"
)
_DECORATION = r"[\s:：=*$({\[\"'“«-]*(?:\\(?:text|mathrm|textbf|boxed)\{[({]?)?"
_MORE = re.compile(r"[\s)}\]*.,$]*(?:,|،|/|&|\bor\b|\band\b|\bأو\b|(?<!\w)و)\s*[({]?(\w)(?!\w)", re.IGNORECASE)


def _fold(text: str) -> str:
    """Without vowel marks and tatweel, full-width letters as Latin ones."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(c for c in composed if c != "\u0640" and unicodedata.category(c) != "Mn").translate(_WIDE)


class ChoiceRule:
    """The letter after the last "answer is" or "Answer:" (in English or Arabic), or in the last box, or standing alone.

    That is simple-evals' and MMLU-Pro's rule with a box and Arabic in addition. A letter that is followed by another
    ("A or B") is no answer. An option's own text in the box counts as its letter.

    Args:
        last_letter: without any of these, take the last letter that stands alone, as MMLU-Pro's script does.
    """

    def __init__(self, *, last_letter: bool = False) -> None:
        self._last_letter = last_letter

    def extract(self, example: Example, text: str, *, finished: bool) -> Extraction:
        answer = extract_text(text, boxed=False)
        if answer.text is None:
            return answer
        box = find_box(answer.text)
        if box is not None and box.text is not None:
            return self._read(example, box.text, "box") or Extraction(None, "box", "the box names no option")
        if not finished:
            return Extraction(None, "", "cut off before an answer")
        found = self._stated(example, answer.text) or self._read(example, answer.text, "text")
        if found is None and self._last_letter:
            letters = re.findall(rf"\b([{self._letters(example)}])\b", _fold(answer.text))
            found = Extraction(letters[-1], "text") if letters else None
        return found or Extraction(None, "", "no option is named")

    def check(self, example: Example, answer: str) -> tuple[Outcome, str]:
        if _index(answer) == example.extra["right"]:
            return "correct", ""
        return "wrong", f"option {answer} is not the right one"

    def _letters(self, example: Example) -> str:
        """The letters of both alphabets that name an option, every form of the alef among them."""
        count = len(example.extra["options"])
        return "".join(letters[:count] for letters in ALPHABETS.values()) + _ALEFS[1:]

    def _stated(self, example: Example, text: str) -> Extraction | None:
        letters, text = self._letters(example), _fold(text)
        pattern = rf"(?i:{_MARKER}){_DECORATION}(?:([{letters}])(?!\w)|([{letters.lower()}])(?=[)\]}}.*]*\s*(?:\n|$)))"
        found = list(re.finditer(pattern, text))
        if not found:
            return None
        more = _MORE.match(text, found[-1].end())
        if more and more[1].upper() in letters:
            return Extraction(None, "answer is", "more than one option is named")
        return Extraction((found[-1][1] or found[-1][2]).upper(), "answer is")

    def _read(self, example: Example, text: str, source: Any) -> Extraction | None:
        """A text that is a letter alone, a letter with its option, or an option alone."""
        letters, options = self._letters(example), [_plain(option) for option in example.extra["options"]]
        text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", _fold(text)).strip().strip("*$ ")
        alone = re.fullmatch(rf"[(\[]?([{letters}{letters.lower()}])[)\].:،]*(?:\s+(\S.*))?", text, re.DOTALL)
        if alone and alone[2] is None:
            return Extraction(alone[1].upper(), source)
        if options.count(_plain(text)) == 1:
            index = options.index(_plain(text))
            return Extraction(ALPHABETS["ar" if example.extra.get("language") == "ar" else "en"][index], source)
        if alone and options[_index(alone[1])] == _plain(alone[2]):
            return Extraction(alone[1].upper(), source)
        return None


def _index(letter: str) -> int:
    letter = "أ" if letter in _ALEFS else letter.upper()
    return next(letters.index(letter) for letters in ALPHABETS.values() if letter in letters)


def _plain(text: str) -> str:
    return " ".join(normalize(_fold(str(text))).casefold().split()).strip(" .$")


# ---- prompts -------------------------------------------------------------------------------------------------------

_ENGLISH = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before answering."
)
_ARABIC = (
    "أجب عن سؤال الاختيار من متعدد التالي. فكر خطوة بخطوة قبل الإجابة، واجعل السطر الأخير على هذا الشكل: "
    "«الإجابة: الحرف» حيث الحرف واحد من {letters}."
)


def ask_choice(example: Example) -> str:
    """simple-evals' prompt (QUERY_TEMPLATE_MULTICHOICE), or its Arabic counterpart with the letters of the abjad."""
    options = example.extra["options"]
    arabic = example.extra.get("language") == "ar"
    letters = ALPHABETS["ar" if arabic else "en"][: len(options)]
    lines = "\n".join(f"{letter}) {option}" for letter, option in zip(letters, options, strict=True))
    how = _ARABIC.format(letters=" ".join(letters)) if arabic else _ENGLISH.format(letters=letters)
    return f"{how}\n\n{example.question}\n\n{lines}"


def _ask_mmlu_pro(example: Example, worked: Mapping[str, str] | None = None) -> str:
    """MMLU-Pro's instruction and layout (arXiv 2406.01574).

    Args:
        worked: subject -> its worked examples, which stand before the question.
    """
    return (
        f"The following are multiple choice questions (with answers) about {example.subject}. Think step by step and "
        'then finish your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n'
        f"{(worked or {}).get(example.subject, '')}"
        f"{_lay_out(example.question, example.extra['options'])}Answer: Let's think step by step."
    )


def _lay_out(question: str, options: Sequence[str]) -> str:
    lines = "".join(f"{a}. {o}\n" for a, o in zip(ALPHABETS["en"], options, strict=False))
    return f"Question:\n{question}\nOptions:\n{lines}"


def _worked(path: Any) -> Mapping[str, str]:
    """Subject -> the first five rows of the validation split as they stand before a question."""
    found: dict[str, list[str]] = {}
    for _, row in read_rows(path, ("question", "options", "category", "cot_content")):
        told = str(row["cot_content"]).replace("A: Let's think step by step.", "Answer: Let's think step by step.")
        found.setdefault(str(row["category"]), []).append(f"{_lay_out(row['question'], row['options'])}{told}\n\n")
    return {subject: "".join(own[:5]) for subject, own in found.items()}


# ---- sets ----------------------------------------------------------------------------------------------------------


def choice_example(
    card: TaskCard, place: str, id: str, row: Mapping[str, Any], *, language: str = "en", subject: str = ""
) -> Example:
    """An example from `question`, `options` and `answer`: a letter (Latin or Arabic), an index from 0, or the text.

    Raises:
        DataError: there are not 2 to 10 options, or the answer is none of them.
    """
    options = [str(option) for option in row["options"]] if isinstance(row["options"], (list, tuple)) else []
    if not 2 <= len(options) <= len(ALPHABETS["en"]):
        raise bad_row(place, f"2 to {len(ALPHABETS['en'])} options, not {len(options)}")
    answer, right = row["answer"], -1
    if isinstance(answer, int):
        right = answer
    elif options.count(str(answer)) == 1:
        right = options.index(answer)
    elif len(str(answer).strip()) == 1:
        letter = _fold(str(answer).strip().upper())
        right = _index(letter) if letter in "".join(ALPHABETS.values()) + _ALEFS else -1
    if not 0 <= right < len(options):
        raise bad_row(place, f"one of the options (a letter, an index from 0, or its text) as the answer, not {answer}")
    extra = {"options": options, "right": right, "language": language}
    letters = ALPHABETS["ar" if language == "ar" else "en"]
    return Example(id, card.name, "test", str(row["question"]), letters[right], extra, subject)


def _task(
    card: TaskCard,
    rows: Callable[[], Iterator[Example]],
    ask: Callable[[Example], str] = ask_choice,
    *,
    last_letter: bool = False,
) -> PublishedTask:
    return PublishedTask(card, rows, ask, ChoiceRule(last_letter=last_letter))


def _mmlu_pro(card: TaskCard, data: Path | None) -> PublishedTask:
    """With five worked examples a subject, and a version of its own, where the folder has the validation split."""
    path = find_file(card, data, ["*test*.jsonl*", "test*.parquet", "data/test*.parquet", "*.jsonl*"])

    def rows() -> Iterator[Example]:
        for place, row in read_rows(path, ("question_id", "question", "options", "answer", "category")):
            id, subject = f"{card.name}-{row['question_id']}", str(row["category"])
            yield choice_example(card, place, id, row, subject=subject)

    names = ("mmlu_pro_validation.jsonl*", "validation*.parquet", "data/validation*.parquet", "validation*.jsonl*")
    shown = [file for name in names for file in data.glob(name)] if data is not None and data.is_dir() else []
    if not shown:
        return _task(card, rows, _ask_mmlu_pro, last_letter=True)
    card = replace(card, version=f"{card.version}-5-shot")
    return _task(card, rows, partial(_ask_mmlu_pro, worked=_worked(shown[0])), last_letter=True)


_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _gpqa(card: TaskCard, data: Path | None) -> PublishedTask:
    """The options are shuffled as simple-evals does it: one `Random(0)` for all rows in the order of the file."""
    path = find_file(card, data, ["gpqa_diamond.csv", "*diamond*"])

    def rows() -> Iterator[Example]:
        random = Random(0)
        for number, (place, row) in enumerate(read_rows(path, ("Question", *_GPQA))):
            order = random.sample(range(4), 4)
            options = [str(row[_GPQA[index]]).strip() for index in order]
            asked = {"question": str(row["Question"]).strip(), "options": options, "answer": order.index(0)}
            subject = str(row.get("High-level domain") or "")
            yield choice_example(card, place, f"{card.name}-{row.get('Record ID') or number}", asked, subject=subject)

    return _task(card, rows)


def _aqua(card: TaskCard, data: Path | None) -> PublishedTask:
    path = find_file(card, data, ["test.jsonl*", "test.json"], shipped="aqua/test.jsonl.gz")

    def rows() -> Iterator[Example]:
        for number, (place, row) in enumerate(read_rows(path, ("question", "options", "correct"))):
            options = [re.sub(r"^\s*[A-E]\)\s*", "", option) for option in row["options"]]
            asked = {"question": row["question"], "options": options, "answer": "ABCDE".find(row["correct"])}
            yield choice_example(card, place, f"aqua-{number}", asked)

    return _task(card, rows)


def _mmmlu(card: TaskCard, data: Path | None) -> PublishedTask:
    path = find_file(card, data, ["mmlu_AR-XY.csv", "*AR*.csv"])

    def rows() -> Iterator[Example]:
        for number, (place, row) in enumerate(read_rows(path, ("Question", "A", "B", "C", "D", "Answer", "Subject"))):
            answer = "ABCD".find(str(row["Answer"]).strip())
            asked = {"question": row["Question"], "options": [row[a] for a in "ABCD"], "answer": answer}
            yield choice_example(
                card, place, f"{card.name}-{number}", asked, language="ar", subject=str(row["Subject"])
            )

    return _task(card, rows)


def _arabic_mmlu(card: TaskCard, data: Path | None) -> PublishedTask:
    path = find_file(card, data, ["ArabicMMLU.csv", "All/test*.parquet", "*.csv", "*.parquet"])

    def rows() -> Iterator[Example]:
        columns = ("Question", "Answer Key", "Option 1", "Option 2", "Subject")
        for number, (place, row) in enumerate(read_rows(path, columns)):
            options = [row[f"Option {n}"] for n in range(1, 6) if str(row.get(f"Option {n}") or "").strip()]
            context = str(row.get("Context") or "").strip()
            answer = "ABCDE".find(str(row["Answer Key"]).strip())
            asked = {"question": f"{context}\n\n{row['Question']}".strip(), "options": options, "answer": answer}
            yield choice_example(
                card, place, f"{card.name}-{number}", asked, language="ar", subject=str(row["Subject"])
            )

    return _task(card, rows)


_SIMPLE_EVALS = "prompt and rule: simple-evals (QUERY_TEMPLATE_MULTICHOICE)"

TASKS: Sequence[TaskEntry] = (
    entry(
        "mmlu-pro",
        "MMLU-Pro: up to ten options, 14 subjects",
        12_032,
        _mmlu_pro,
        sampling=TaskSampling(0.0, 1.0, 4096, 1),
        license="MIT",
        source="arXiv 2406.01574; prompt and rule: evaluate_from_api.py of its repository",
        how_to_get="huggingface-cli download TIGER-Lab/MMLU-Pro --repo-type dataset --local-dir mmlu-pro, then "
        "--data mmlu-pro=mmlu-pro (with its validation split: five worked examples); a file of test rows alone, "
        "Parquet or JSONL, is asked without examples",
    ),
    entry(
        "gpqa-diamond",
        "GPQA-Diamond: graduate-level science",
        198,
        _gpqa,
        sampling=TaskSampling(0.6, 0.95, 32_768, 4),
        license="CC BY 4.0, gated: the authors ask not to post the questions in clear",
        source=f"arXiv 2311.12022; {_SIMPLE_EVALS}; sampling: DeepSeek-R1 model card",
        how_to_get="accept the terms at huggingface.co/datasets/Idavidrein/gpqa, download gpqa_diamond.csv and pass it "
        "as --data",
    ),
    entry(
        "aqua",
        "AQuA-RAT: algebra with five options",
        254,
        _aqua,
        sampling=TaskSampling(0.0, 1.0, 2048, 1),
        license="Apache-2.0",
        source=f"data: arXiv 1705.04146; {_SIMPLE_EVALS}",
    ),
    entry(
        "mmmlu-ar",
        "MMMLU in Arabic: MMLU translated by people, Arabic letters",
        14_042,
        _mmmlu,
        sampling=TaskSampling(0.0, 1.0, 4096, 1),
        license="MIT",
        source="data: huggingface.co/datasets/openai/MMMLU; prompt: simple-evals' in Arabic",
        language="ar",
        how_to_get="download test/mmlu_AR-XY.csv of huggingface.co/datasets/openai/MMMLU and pass it as --data",
    ),
    entry(
        "arabic-mmlu",
        "ArabicMMLU: school and professional exams of Arab countries, Arabic letters",
        None,
        _arabic_mmlu,
        sampling=TaskSampling(0.0, 1.0, 4096, 1),
        license="CC BY-NC-SA 4.0",
        source="data: arXiv 2402.12840; prompt: simple-evals' in Arabic, generative",
        language="ar",
        how_to_get="download the test table of huggingface.co/datasets/MBZUAI/ArabicMMLU (CSV or Parquet, "
        "non-commercial licence) and pass it as --data",
    ),
)
