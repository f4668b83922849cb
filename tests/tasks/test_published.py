"""The published tasks: golden answers with their verdicts, the data that ships, a user's own tasks, and bad input."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from tafkir.errors import DataError, GradingError
from tafkir.records import Example
from tafkir.tasks.catalog import EvalTask, QuestionOnly, as_asked, list_tasks, load_task
from tafkir.tasks.published.instructions import follow
from tafkir.tasks.published.math import MathRule, tidy
from tafkir.tasks.published.numeric import compare
from tafkir.tasks.symbolic import SymbolicVerifier

GOLDENS = Path(__file__).with_name("goldens")
NAMES = sorted(path.stem for path in GOLDENS.glob("*.jsonl") if path.stem not in ("humaneval", "mbpp"))


def _load(name: str) -> EvalTask:
    own = next((GOLDENS / "data").glob(f"{name}.*"), None)
    return load_task(name, own)


def _fill(text: str, example: Example) -> str:
    """The text with what depends on the example in it."""
    extra = example.extra
    if "{right}" in text or "{wrong}" in text:
        wrong = "ABCD"["ABCD".index(example.answer) - 1]
        return text.replace("{right}", example.answer).replace("{wrong}", wrong)
    if "instructions" in extra:
        repeat = extra["instructions"][0][1].get("prompt_to_repeat", "")
        return text.replace("{prompt}", example.question).replace("{repeat}", repeat)
    if "output" in extra:
        digits = "\n".join("".join(map(str, row)) for row in extra["output"])
        matrix = json.dumps(extra["output"])
        return text.replace("{answer}", example.answer).replace("{digits}", digits).replace("{json}", matrix)
    if "label" in extra:
        flat = example.answer.replace(" ", "")
        swapped = flat[1] + flat[0] + flat[2:]
        arabic = flat.translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩"))
        question = "".join(str(max(0, token - 1)) for token in extra["question"])
        for mark, value in (
            ("answer", example.answer),
            ("arabic", arabic),
            ("swapped", swapped),
            ("question", question),
        ):
            text = text.replace(f"{{{mark}}}", value)
    return text


@pytest.mark.parametrize("name", NAMES)
def test_golden_answers(name: str) -> None:
    task = _load(name)
    examples = task.examples("test")
    rows = [json.loads(line) for line in (GOLDENS / f"{name}.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 10
    for row in rows:
        example, finished = examples[row["item"]], row.get("finished", True)
        verdict = task.grade(example, _fill(row["text"], example), finished=finished)
        assert verdict.outcome == row["outcome"], (row["text"][:200], verdict)
        assert verdict.reward == (verdict.outcome == "correct")
        assert finished or verdict.outcome in ("correct", "length")


def test_cards_say_what_ships_and_how_to_get_the_rest() -> None:
    for card in list_tasks():
        assert card.shipped == (not card.how_to_get) and card.version and card.license and card.source, card.name
        if card.metric in ("judge", "pass@1") or card.name.startswith(("sudoku", "maze", "arc", "perplexity")):
            continue
        if not card.shipped:
            with pytest.raises(DataError, match="Fix:"):
                load_task(card.name)
            continue
        examples = load_task(card.name).examples("test")
        assert len(examples) == card.num_items, card.name
        assert len({example.id for example in examples}) == len(examples), card.name


def test_reference_answers_grade_right_and_corrupted_ones_wrong() -> None:
    for name in ("gsm8k", "math-test", "omni-math-rule", "aqua", "mgsm"):
        task = load_task(name)
        for example in task.examples("test")[::97]:
            assert task.grade(example, f"<think>0</think>\\boxed{{{example.answer}}}").correct, example
            if example.answer.isdecimal():
                assert task.grade(example, f"\\boxed{{{int(example.answer) + 1}}}").outcome == "wrong", example


def test_ifeval_counts_instructions_strict_and_loose() -> None:
    task, loose = load_task("ifeval"), load_task("ifeval-loose")
    example = task.examples("test")[0]
    text = "Sure, here it is:\n*a* *b* *c* " + "word " * 300
    assert follow(example, text) == [False, True, True]
    assert follow(example, text, loose=True) == [True, True, True]
    assert task.grade(example, text).reason == "not kept: punctuation:no_comma"
    assert loose.grade(example, text).correct


def test_perplexity_has_texts_and_no_verdicts() -> None:
    task = load_task("perplexity-ar")
    assert task.card.metric == "perplexity"
    assert sum(len(example.question) for example in task.examples("test")) == 187_399
    with pytest.raises(GradingError, match="no answer to grade"):
        task.grade(task.examples("test")[0], "")


@pytest.mark.parametrize(
    ("expected", "answer", "equal"),
    [
        ("\\frac{\\sqrt7}{14}", "\\frac{1}{2\\sqrt{7}}", True),
        ("x^2-1", "(x-1)(x+1)", True),
        ("x^2-1", "(x-1)(x+2)", False),
        ("\\frac{1023}{1024}", "\\frac{1023}{1025}", False),
        ("(1,\\frac{1}{2})", "(1,\\frac{2}{4})", True),
        ("(1,2)", "(2,1)", False),
        ("[1,2)", "(1,2)", None),
        ("1,2", "2,1", None),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\3\\end{pmatrix}", False),
        ("\\frac{1}{3}", "0.333", None),
        ("\\frac{5}{3}", "1\\frac{2}{3}", None),
        ("2i", "2", None),
        ("x", "10^{11}+x-10^{11}", None),
        ("1", "x^0", True),
        ("\\sqrt[3]{8}", "2", True),
    ],
)
def test_values_tell_or_say_nothing(expected: str, answer: str, equal: bool | None) -> None:
    assert compare(tidy(expected), tidy(answer)) is equal


# ---- a comparison that takes too long ------------------------------------------------------------------------------


@pytest.fixture
def rule() -> Iterator[MathRule]:
    verifier = SymbolicVerifier(timeout_s=1.0, max_workers=2)
    yield MathRule(verifier)
    verifier.close()


def test_adversarial_latex_ends_in_every_thread(rule: MathRule) -> None:
    example = Example("i", "own", "test", "q", "\\frac{1}{7}")
    answers = {
        "9!!!!!!": {"timeout"},
        "9" * 1_000_000: {"wrong"},
        "\\sqrt{" * 150 + "2" + "}" * 150: {"wrong"},
        "9^{9^{9^{9^{9}}}}": {"wrong", "error", "timeout"},
        "(" * 400 + "9" + ")" * 400: {"wrong", "error", "timeout"},
    }
    outcomes: dict[str, str] = {}

    def check(answer: str) -> None:
        outcomes[answer] = rule.check(example, answer)[0]

    threads = [threading.Thread(target=check, args=(answer,)) for answer in answers]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    assert not any(thread.is_alive() for thread in threads), time.monotonic() - began
    for answer, allowed in answers.items():
        assert outcomes[answer] in allowed, answer[:40]


# ---- a user's own tasks --------------------------------------------------------------------------------------------

TASK_FILE = """
from tafkir.records import Example, Message, Verdict
from tafkir.tasks.catalog import TaskCard, TaskSampling

class Echo:
    name = "echo"
    card = TaskCard("echo", "1", "Echo", "accuracy", "en", 1, "own", "own", True, "", TaskSampling(0.0, 1.0, 16, 1))
    def examples(self, split):
        return [Example("e-0", "echo", split, "Say hi", "hi")] if split == "test" else []
    def prompt(self, example):
        return [Message("user", example.question)]
    def grade(self, example, text, *, finished=True):
        return Verdict("correct" if text == "hi" else "wrong", float(text == "hi"), text, "hi")

task = Echo()
"""


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(TASK_FILE)
    task = load_task(str(tmp_path / "echo.py"))
    assert task.grade(task.examples("test")[0], "hi").correct
    (tmp_path / "echo.py").write_text(TASK_FILE.replace("task = Echo()", "task = 1 / 0"))
    with pytest.raises(DataError, match=r"echo.py:\d+: the task file does not run: ZeroDivisionError"):
        load_task(str(tmp_path / "echo.py"))
    (tmp_path / "echo.py").write_text("task = 3")
    with pytest.raises(DataError, match="its task has no card, name"):
        load_task(str(tmp_path / "echo.py"))


@pytest.mark.parametrize(
    ("scorer", "row", "right", "wrong"),
    [
        ("number", {"question": "2+3?", "answer": 5}, "الجواب: ٥", "6"),
        ("math", {"question": "1/2+1/3?", "answer": "5/6"}, "$\\frac{10}{12}$", "\\boxed{6/5}"),
        ("exact", {"question": "Capital of Iraq?", "answer": "Baghdad"}, "<think>?</think> baghdad.", "Basra"),
        ("choice", {"question": "؟", "answer": "ب", "options": ["٤", "٥"], "language": "ar"}, "الإجابة: ب", "أ"),
    ],
)
def test_items_with_a_scorer(tmp_path: Path, scorer: str, row: dict[str, object], right: str, wrong: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({**row, "subject": "s", "difficulty": "easy"}) + "\n")
    task = load_task(f"{path}:{scorer}")
    (example,) = task.examples("test")
    assert (example.subject, example.difficulty, task.card.num_items) == ("s", "easy", 1)
    assert task.grade(example, right).correct and task.grade(example, wrong).outcome == "wrong"
    version = task.card.version
    path.write_text(path.read_text() * 2)
    assert load_task(f"{path}:{scorer}").card.version != version


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gsm9k", None, "did you mean 'gsm8k'"),
        ("mmlu-pro", '{"question": "q", "answer": "A"}', "the row lacks question_id, options, category; it has"),
        ("aime25", '{"problem": "p", "answer": "1/2"}', "an integer from 0 to 999"),
        ("gpqa-diamond", None, "huggingface.co/datasets/Idavidrein/gpqa"),
        ("gpqa-diamond", "", "holds no rows|has no rows"),
        ("{}:choice", '{"question": "q", "answer": "C", "options": ["a", "b"]}', "one of the options"),
        ("{}:sum", '{"question": "q", "answer": "C"}', "expected number, math, choice, exact"),
    ],
)
def test_bad_input_says_what_and_how(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    data = tmp_path / "rows.jsonl"
    if content is not None:
        data.write_text(content)
    with pytest.raises(DataError, match=message):
        load_task(name.format(data), None if content is None else data).examples("test")


def test_mmlu_pro_has_five_worked_examples_where_the_validation_split_is_there(tmp_path: Path) -> None:
    """The text that `generate_cot_prompt` of its repository makes, put together by hand."""
    row = {"question_id": 9, "question": "Which?", "options": ["a", "b", "c"], "answer": "B", "category": "law"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    alone = load_task("mmlu-pro", tmp_path)
    shown = [{**row, "question": f"Q{n}?", "cot_content": "A: Let's think step by step. It is b. The answer is (B)."}
             for n in range(6)]  # fmt: skip
    (tmp_path / "validation.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in shown))
    task = load_task("mmlu-pro", tmp_path)
    prompts = [each.prompt(each.examples("test")[0])[0].content for each in (alone, task)]
    head, own = prompts[0].split("\n\n\n")
    block = "Options:\nA. a\nB. b\nC. c\nAnswer: Let's think step by step."
    assert own == f"Question:\nWhich?\n{block}"
    told = "".join(f"Question:\nQ{n}?\n{block} It is b. The answer is (B).\n\n" for n in range(5))
    assert prompts[1] == f"{head}\n\n\n{told}{own}" and (alone.card.version, task.card.version) == ("1", "1-5-shot")


def test_shipped_sets_have_licences() -> None:
    folders = [folder for folder in (files("tafkir") / "datasets").iterdir() if folder.is_dir()]
    for name in ("math", "omni_math", "aime", "olymmath", "mgsm", "aqua", "ifeval", "react_docs_ar"):
        folder = next(folder for folder in folders if folder.name == name)
        assert (folder / "LICENSE").is_file() and (folder / "README.md").is_file()
        for file in folder.iterdir():
            if file.name.endswith(".gz"):
                assert gzip.decompress(file.read_bytes())


def test_a_question_can_be_asked_alone_and_is_kept_apart() -> None:
    task = load_task("svamp")
    alone = QuestionOnly(task)
    example = alone.examples("test")[0]
    assert [message.content for message in alone.prompt(example)] == [example.question]
    assert alone.prompt(example) != task.prompt(example) and alone.card.version != task.card.version
    assert alone.grade(example, f"\\boxed{{{example.answer}}}").correct
    assert as_asked(task, alone.card.version).card == alone.card and as_asked(task, task.card.version) is task
    with pytest.raises(DataError, match="more than a question"):
        QuestionOnly(load_task("perplexity-shakespeare"))
