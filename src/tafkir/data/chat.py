"""The chat format: turns between `<|im_start|>` and `<|im_end|>`, chains of thought between `<think>` and `</think>`.

A worked problem reads

    <|im_start|>user
    Natalia sold clips to 48 of her friends in April, and then ...<|im_end|>
    <|im_start|>assistant
    <think>
    48/2=24
    48+24=72
    </think>
    \\boxed{72}<|im_end|>
"""

from __future__ import annotations

from collections.abc import Sequence

from tafkir.data.chat_template import CHAT_TEMPLATE
from tafkir.data.published_tokenizer import PublishedTokenizer
from tafkir.data.sources import Problem
from tafkir.data.tokenizer import THINK_END, THINK_START, TURN_END, TURN_START, Tokenizer
from tafkir.errors import DataError
from tafkir.records import Message

__all__ = [
    "CHAT_TEMPLATE",
    "encode_chat",
    "encode_conversation",
    "encode_document",
    "encode_prompt",
    "render_assistant",
    "render_chat",
    "render_solution",
]


def render_assistant(content: str, reasoning: str | None) -> str:
    """The body of an assistant turn."""
    return f"{THINK_START}\n{reasoning}\n{THINK_END}\n{content}" if reasoning else content


def _body(message: Message) -> str:
    if message.role == "assistant":
        return render_assistant(message.content, message.reasoning)
    return message.content


def render_chat(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The text of a conversation; with `add_generation_prompt` it ends where the assistant's turn begins."""
    text = "".join(f"{TURN_START}{message.role}\n{_body(message)}{TURN_END}\n" for message in messages)
    return text + (f"{TURN_START}assistant\n" if add_generation_prompt else "")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """Token ids of `render_chat`, except that special tokens spelled out in a system or user turn stay plain text.

    A published tokenizer takes its own template.

    Raises:
        RequestError: that template is missing, or refuses the conversation.
    """
    if isinstance(tokenizer, PublishedTokenizer):
        return tokenizer.encode_chat(messages, add_generation_prompt)
    ids: list[int] = []
    for message in messages:
        ids += tokenizer.encode(f"{TURN_START}{message.role}\n")
        ids += tokenizer.encode(_body(message), allow_special=message.role == "assistant")
        ids += tokenizer.encode(f"{TURN_END}\n")
    return ids + (tokenizer.encode(f"{TURN_START}assistant\n") if add_generation_prompt else [])


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Token ids of a question up to where the assistant's turn begins."""
    return encode_chat(tokenizer, [Message("user", question)])


def render_solution(problem: Problem) -> tuple[str, str]:
    """The chain of thought, one equation a line, and the final answer in its box.

    Raises:
        DataError: the problem has no equations.
    """
    if not problem.steps:
        raise DataError(
            "the problem has no equations to learn from",
            where=problem.id,
            expected="a GSM8K-style solution or an 'equation' field",
        )
    return "\n".join(map(str, problem.steps)), f"\\boxed{{{problem.answer}}}"


def _assistant_ids(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    reasoning, content = render_solution(problem)
    return tokenizer.encode(render_assistant(content, reasoning))


def encode_conversation(tokenizer: Tokenizer, problem: Problem) -> tuple[list[int], list[bool]]:
    """Token ids of question and solution, and which of them are targets: the assistant's body with its `<|im_end|>`."""
    prompt = encode_prompt(tokenizer, problem.question)
    body = [*_assistant_ids(tokenizer, problem), tokenizer.turn_end_id]
    return prompt + body, [False] * len(prompt) + [True] * len(body)


def encode_document(tokenizer: Tokenizer, problem: Problem) -> tuple[list[int], list[bool]]:
    """Token ids of the plain pre-training form (question, solution, `<|endoftext|>`), and which are the solution's."""
    question = tokenizer.encode(f"{problem.question}\n", allow_special=False)
    solution = [*_assistant_ids(tokenizer, problem), tokenizer.document_end_id]
    return question + solution, [False] * len(question) + [True] * len(solution)
