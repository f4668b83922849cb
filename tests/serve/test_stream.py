"""Reasoning and answer told apart however the text is cut, and choices as their tokens come."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.data.chat import render_assistant
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.sequence import TokenEvent
from tafkir.serve.stream import ChoiceStream, ReasoningSplitter, chat_logprobs, completion_logprobs
from tests.serve.conftest import TEXTS


def split(pieces: Sequence[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter()
    parts = [splitter.push(piece) for piece in pieces] + [splitter.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


CASES = [
    ("<think>\n48/2=24\n48+24=72\n</think>\n\\boxed{72}", ("48/2=24\n48+24=72", "\\boxed{72}")),
    ("<think>a</think>b", ("a", "b")),
    ("no thought", ("", "no thought")),
    ("a <think>late</think>", ("", "a <think>late</think>")),
    ("<think>\ncut off", ("cut off", "")),
    ("<think>a < b\n\nc</thin", ("a < b\n\nc</thin", "")),
    ("<think></think>\nx</think>", ("", "x</think>")),
    ("<thinking>", ("", "<thinking>")),
    ("<thi", ("", "<thi")),
    ("\n<think>a</think>b", ("a", "b")),
    ("", ("", "")),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_split(text: str, expected: tuple[str, str]) -> None:
    assert split([text]) == expected
    assert split(list(text)) == expected, "character by character"


@given(st.text("ab<\n", min_size=1, max_size=12), st.text("ab\n", max_size=12), st.data())
@settings(max_examples=120, deadline=None)
def test_split_undoes_the_chat_format(reasoning: str, content: str, data: st.DataObject) -> None:
    text = render_assistant(content, reasoning)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(pieces) == (reasoning, content)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, 400)


def events(ids: Sequence[int], last_reason: str) -> list[TokenEvent]:
    return [
        TokenEvent("a", id, -0.5, last_reason if i == len(ids) - 1 else None, ((id, -0.5), (5, -1.0)))  # type: ignore[arg-type]
        for i, id in enumerate(ids)
    ]


@pytest.mark.parametrize("content", ["الجواب هو ٧٢ 😀👨‍👩‍👧", "\\boxed{72}", "naïve — “quotes”"])
def test_arabic_and_emoji_never_break(tokenizer: Tokenizer, content: str) -> None:
    """A character split over several tokens comes whole, in the reasoning and in the answer."""
    reasoning = f"فكر: {content}"
    ids = [*tokenizer.encode(render_assistant(content, reasoning)), tokenizer.turn_end_id]
    choice = ChoiceStream(tokenizer, [tokenizer.turn_end_id], (), split_reasoning=True)
    deltas = [choice.push(event) for event in events(ids, "stop")]
    assert "".join(delta.reasoning for delta in deltas) == reasoning
    assert "".join(delta.content for delta in deltas) == content
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert deltas[-1].finish_reason == "stop"
    assert choice.num_tokens == len(ids)
    assert 0 < choice.num_reasoning_tokens < choice.num_tokens
    assert any(delta.empty for delta in deltas), "some token is only part of a character"


def test_the_end_token_is_no_text_and_a_control_token_is_hidden(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("ab"), tokenizer.special_id("<|im_start|>"), *tokenizer.encode("c"), tokenizer.turn_end_id]
    choice = ChoiceStream(tokenizer, [tokenizer.turn_end_id], (), split_reasoning=False)
    assert "".join(choice.push(event).text for event in events(ids, "stop")) == "abc"


def test_stop_string_inside_a_token(tokenizer: Tokenizer) -> None:
    choice = ChoiceStream(tokenizer, [], ("wer is",), split_reasoning=True)
    ids = tokenizer.encode("The answer is 7")
    deltas = [choice.push(event) for event in events(ids, "stop")]
    assert "".join(delta.content for delta in deltas) == "The ans"


def test_logprobs_spell_bytes(tokenizer: Tokenizer) -> None:
    text = "ab 🤔"
    choice = ChoiceStream(tokenizer, [], (), split_reasoning=False)
    for event in events(tokenizer.encode(text), "length"):
        choice.push(event)
    chat = chat_logprobs(tokenizer, choice.shown)["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in chat).decode() == text
    assert chat[0]["top_logprobs"][1]["logprob"] == -1.0
    plain = completion_logprobs(tokenizer, choice.shown)
    assert plain["tokens"][-1].startswith("bytes:\\x")
    assert plain["text_offset"][0] == 0
    assert plain["token_logprobs"] == [-0.5] * len(choice.shown)
