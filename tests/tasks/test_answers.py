from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafkir.tasks.answers import extract_answer, is_unevaluated, normalize, read_value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        (" 72. ", 72),
        ("-0", 0),
        ("012", 12),
        ("12.0", 12),
        ("0.50", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("+5", 5),
        ("−3", -3),
        ("minus 3", -3),
        ("negative 3", -3),
        ("1,234", 1234),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1{,}234", 1234),
        ("1\\,234", 1234),
        ("1\u202f234", 1234),
        ("1/2", Fraction(1, 2)),
        ("4/8", Fraction(1, 2)),
        ("5/1", 5),
        ("\\frac{1}{2}", Fraction(1, 2)),
        ("\\dfrac12", Fraction(1, 2)),
        ("-\\frac{1}{2}", Fraction(-1, 2)),
        ("2\\frac{1}{2}", Fraction(5, 2)),
        ("2 1/2", Fraction(5, 2)),
        ("2½", Fraction(5, 2)),
        ("½", Fraction(1, 2)),
        ("1e5", 100_000),
        ("2.5E-1", Fraction(1, 4)),
        ("$12", 12),
        ("\\$12.50", Fraction(25, 2)),
        ("-$12", -12),
        ("€12", 12),
        ("12 €", 12),
        ("12 apples", 12),
        ("12 km/h", 12),
        ("30^\\circ", 30),
        ("5 cm^2", 5),
        ("5 \\text{ cm}^2", 5),
        ("\\text{12 apples}", 12),
        ("12\\text{ apples}", 12),
        ("\\mathbf{12}", 12),
        ("x = 8", 8),
        ("Total cost = $8", 8),
        ("(20)", 20),
        ("$20$", 20),
        ("5 million", 5_000_000),
        ("5k", 5000),
        ("3 dozen", 36),
        ("١٢", 12),
        ("۱۲", 12),
        ("१२", 12),
        ("１２", 12),
        ("١٢٫٥", Fraction(25, 2)),
        ("١٬٠٠٠", 1000),
        ("١/٢", Fraction(1, 2)),
        ("-٥", -5),
        ("12 تفاحة", 12),
        ("١٢ تُفَّاحَة", 12),
        ("٣ آلاف", 3),
        ("٣ ألف", 3000),
        ("7\u200b2", 72),
        ("\u200f١٢\u200e", 12),
        ("12\u00a0apples", 12),
    ],
)
def test_numbers_are_read_exactly(text: str, number: Fraction) -> None:
    value = read_value(text)
    assert value is not None and value.number == number and not value.percent


@pytest.mark.parametrize("text", ["50%", "50 \\%", "50 percent", "٥٠٪", "50 بالمئة"])
def test_a_percent_is_its_number_or_its_share(text: str) -> None:
    value = read_value(text)
    assert value is not None and value.equals(Fraction(50)) and value.equals(Fraction(1, 2))
    assert not value.equals(Fraction(5))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "apples",
        "NaN",
        "inf",
        "five",
        "1 2",
        "5 or 6",
        "5-6",
        "12 apples and 3 pears",
        "1 and a half",
        "3 quarters",
        "1e999",
        "1e99999999999",
        "3+4",
        "48/2",
        "1/0",
        "1/0.0",
        "\\frac{5}{0}",
        "2 1/0",
        "1,23",
        "1,2345",
        "1.2.3",
        "--5",
        "-$-5",
        "5!",
        "5^2",
        "12x",
        "2\\pi",
        "\\sqrt{16}",
        "10**10**10",
        "9" * 5000,
        "{" * 100_000,
    ],
)
def test_what_is_not_one_plain_number_is_not_read(text: str) -> None:
    assert read_value(text) is None


@given(st.text(max_size=60))
def test_reading_never_fails(text: str) -> None:
    read_value(text)
    is_unevaluated(text)
    extract_answer(text)


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "${}", "{} apples", "{}.0", "\\text{{{}}}", "x={}"]))
def test_every_integer_is_read_in_every_dress(number: int, dress: str) -> None:
    for digits in ("0123456789", "٠١٢٣٤٥٦٧٨٩", "۰۱۲۳۴۵۶۷۸۹"):
        for written in (str(number), f"{number:,}"):
            text = dress.format(written.translate(str.maketrans("0123456789", digits)))
            value = read_value(text)
            assert value is not None and value.number == number, text


def test_superscripts_are_no_digits() -> None:
    assert normalize("10²") == "10²"


@pytest.mark.parametrize(
    ("text", "answer", "source"),
    [
        ("<think>\n1+1=2\n</think>\n\\boxed{2}", "2", "box"),
        ("\\boxed{5} no wait \\boxed{7}", "7", "box"),
        ("\\boxed{\\boxed{7}}", "7", "box"),
        ("\\boxed{\\frac{1}{2}} #### 9", "\\frac{1}{2}", "box"),
        ("<think>\\boxed{1}</think> so <think>\\boxed{2}</think> \\boxed{3}", "3", "box"),
        ("</think> #### 1,234 \nthe answer is 5", "1,234", "####"),
        ("The answer is $18. I had 3 dogs.", "$18", "answer is"),
        ("Answer: 18 of 20", "18", "answer is"),
        ("الجواب هو ١٨ من ٢٠", "18", "answer is"),
        ("He had 7 and then 72 apples.", "72", "last number"),
        ("It costs 1,234.5 dollars", "1,234.5", "last number"),
        ("It is 1/2.", "1/2", "last number"),
    ],
)
def test_the_answer_is_taken_from_where_it_stands(text: str, answer: str, source: str) -> None:
    found = extract_answer(text)
    assert (found.text, found.source) == (answer, source)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\\boxed{72}</think>", "no number"),
        ("<think>\\boxed{72}", "never ends"),
        ("</think>\\boxed{}", "empty"),
        ("</think>\\boxed{  }", "empty"),
        ("</think>\\boxed{5} \\boxed{}", "empty"),
        ("</think>\\boxed{72", "never closed"),
        ("</think>\\boxed{5} \\boxed{72", "never closed"),
        ("</think>", "no number"),
        ("", "no number"),
        ("#### none", "no number"),
    ],
)
def test_why_there_is_no_answer(text: str, reason: str) -> None:
    found = extract_answer(text)
    assert found.text is None and reason in found.reason


def test_in_a_text_that_was_cut_off_only_a_box_counts() -> None:
    assert extract_answer("\\boxed{72} and", finished=False).text == "72"
    assert extract_answer("the answer is 72", finished=False).text is None
    assert extract_answer("#### 72", finished=False).text is None


@pytest.mark.parametrize("text", ["3+4", "3 \\times 4", "60 \\cdot 60", "(3+4)*2", "48/2", "$3+$4"])
def test_sums_that_nobody_worked_out(text: str) -> None:
    assert is_unevaluated(text)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 3_000_000 + " 72",
        "answer" + " " * 1_000_000 + "72",
        "\n \n" * 300_000 + "72",
        "####" + "\t" * 10**6 + "72",
    ],
)
def test_huge_texts_take_no_time(text: str) -> None:
    assert extract_answer(text).text == "72"
