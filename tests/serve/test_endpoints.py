"""Structured output, tools, thinking, penalties, echo, prompt log-probabilities, responses: through the real client."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import llguidance
import openai
import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.shaping import Shaper, Shaping, Thinking
from tafkir.serve.app import build_app
from tafkir.serve.schema import ChatMessage, FunctionTool
from tafkir.serve.tools import ToolCallSplitter, form_of, join_calls, to_message, tool_grammar
from tests.serve.conftest import Server, start, write_checkpoint
from tests.serve.test_api import MESSAGES, MODEL

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a server whose context holds the offer of a tool."""
    app = build_app(write_checkpoint(tmp_path_factory.mktemp("roomy") / MODEL, 1024), max_batch=4, num_threads=1)
    server, uvicorn_server, thread = start(app)
    with server.client() as client:
        yield client
    uvicorn_server.should_exit = True
    thread.join(timeout=20)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_that_follow_a_schema(client: openai.OpenAI, temperature: float) -> None:
    format: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 60, "temperature": temperature}
    answer = client.chat.completions.create(**options, response_format=format, n=3, seed=1, logprobs=True)
    for choice in answer.choices:
        found = json.loads(choice.message.content or "")
        assert found.keys() == {"ok", "n"} and isinstance(found["ok"], bool) and 0 <= found["n"] <= 99
        assert choice.finish_reason == "stop"
        assert choice.logprobs and choice.logprobs.content
        assert min(token.logprob for token in choice.logprobs.content) < -0.1, "the model's own, not the grammar's"
    chunks = client.chat.completions.create(**options, response_format=format, n=1, seed=1, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content


@pytest.mark.parametrize(
    ("rules", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no", "ربما"]}, "yes|no|ربما"),
        ({"grammar": 'start: "x" /[0-9]/ "y"'}, "x[0-9]y"),
        ({"json": {"enum": ["k", 7]}}, '"k"|7'),
    ],
)
def test_answers_that_follow_other_rules(client: openai.OpenAI, rules: dict[str, Any], pattern: str) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="What", max_tokens=20, seed=3, n=4, extra_body={"structured_outputs": rules}
    )
    assert all(re.fullmatch(pattern, choice.text) for choice in answer.choices), [c.text for c in answer.choices]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "rules",
    [
        {"regex": "(a"},
        {"grammar": "start: nothing"},
        {"json": {"type": "nope"}},
        {"json": {"$ref": "http://127.0.0.1/x"}},
        {"json": {"$ref": "#/nowhere"}},
        {"json": nested(200)},
        {"json": {"enum": ["x" * 100 + str(i) for i in range(2000)]}},
        {"json": {"allOf": [{"type": "string"}, {"type": "number"}]}},
    ],
)
def test_rules_that_cannot_be_followed_hurt_nobody(server: Server, rules: dict[str, Any]) -> None:
    body = {"prompt": "a", "max_tokens": 4, "structured_outputs": rules}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] in ("invalid_grammar", "unsatisfiable")
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "rules",
    [
        {"regex": "((a{1,1000}){1,1000}){1,1000}"},
        {"json": {"type": "string", "pattern": "^(a+)+$"}},
        {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
        {"json": {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}}},
    ],
)
def test_costly_rules_are_followed_or_given_up(server: Server, rules: dict[str, Any]) -> None:
    body = {"prompt": "a", "max_tokens": 20, "structured_outputs": rules}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code in (200, 400)


def test_forced_tool_calls(roomy: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 80, "seed": 2, "tools": [TOOL]}
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        answer = roomy.chat.completions.create(**options, tool_choice=choice).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
        (call,) = answer.message.tool_calls
        assert call.type == "function" and call.function.name == "add"
        assert 0 <= json.loads(call.function.arguments)["a"] <= 9
    chunks = list(roomy.chat.completions.create(**options, tool_choice="required", stream=True))
    deltas = [part.function for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [delta.name for delta in deltas if delta and delta.name] == ["add"]
    pieces = [delta.arguments for delta in deltas if delta and delta.arguments]
    assert "".join(pieces) == call.function.arguments and len(pieces) > 1, "they come as they are written"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    history: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "7"},
    ]
    assert roomy.chat.completions.create(**{**options, "messages": history, "max_tokens": 2}).choices


HERMES_TEXT = (
    'Hm <tool_call>\n{"name": "f", "arguments": {"x": "}<ت\\""}}\n</tool_call>\n'
    '<tool_call>{"name":"g"}</tool_call><tool_call>{"arguments": "{}", "name": "h"}</tool_call> <to'
)
DEEPSEEK_TEXT = (
    "Hm <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"x": "}<ت\\""}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>h\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜> <to"
)


@pytest.mark.parametrize(("text", "template"), [(HERMES_TEXT, None), (DEEPSEEK_TEXT, "<｜tool▁call▁begin｜>")])
def test_tool_calls_are_taken_out_of_a_text_however_it_comes(text: str, template: str | None) -> None:
    form = form_of(template)
    for size in (1, 3, 7, 1000):
        splitter, out, parts = ToolCallSplitter(form), "", []
        for i in range(0, len(text), size):
            more, found = splitter.push(text[i : i + size])
            out, parts = out + more, parts + found
        out += splitter.flush()
        assert out == "Hm  <to"
        calls = [call["function"] for call in join_calls(parts)]
        expected = [("f", {"x": '}<ت"'}), ("g", {}), ("h", {})]
        assert [(call["name"], json.loads(call["arguments"])) for call in calls] == expected
        assert size > 1 or sum(part.index == 0 for part in parts) > 5, "arguments come as they are written"
    broken = f"{form.start}no json{form.end}"
    assert ToolCallSplitter(form).push(broken) == (broken, [])
    unended = form.spell("a", "{}").removesuffix(form.end) + form.spell("b", "{}")
    for pieces in ([unended], list(unended)):
        splitter = ToolCallSplitter(form)
        parts = [part for piece in pieces for part in splitter.push(piece)[1]]
        assert [call["function"]["name"] for call in join_calls(parts)] == ["a", "b"]
    cut_off = form.spell("f", '{"a": [1').replace("}", "")
    assert join_calls(ToolCallSplitter(form).push(cut_off)[1])[0]["function"]["arguments"].rstrip() == '{"a": [1'


def test_a_name_that_is_no_name_stays_json() -> None:
    call = {"id": "1", "function": {"name": 'a"b', "arguments": "{}"}}
    said = to_message(ChatMessage.model_validate({"role": "assistant", "tool_calls": [call]})).content
    assert json.loads(said.removeprefix("<tool_call>").removesuffix("</tool_call>"))["name"] == 'a"b'


def test_each_form_reads_what_it_spells() -> None:
    turn = ChatMessage.model_validate(
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a":1}'}}] * 2}
    )
    for template in (None, "<｜tool▁call▁begin｜>", "<｜tool▁call▁begin｜> ```json"):
        form = form_of(template)
        text, parts = ToolCallSplitter(form).push(to_message(turn, form).content)
        assert (
            text == ""
            and [call["function"] for call in join_calls(parts)] == [{"name": "add", "arguments": '{"a": 1}'}] * 2
        )
        grammar = llguidance.LLMatcher.grammar_from_lark(tool_grammar([FunctionTool.model_validate(TOOL)], form))
        assert llguidance.LLMatcher.validate_grammar(grammar) == ""


def test_thinking(client: openai.OpenAI, server: Server, tokenizer: Tokenizer) -> None:
    start = tokenizer.special_id("<think>")
    thinks = {"model": MODEL, "messages": MESSAGES, "max_tokens": 30, "seed": 1, "logit_bias": {str(start): 100}}

    def reasoning(**more: Any) -> tuple[int, str]:
        answer = client.chat.completions.create(**thinks, extra_body=more)
        assert answer.usage and answer.usage.completion_tokens_details
        return answer.usage.completion_tokens_details.reasoning_tokens or 0, answer.choices[0].message.content or ""

    assert reasoning()[0] > 20, "the bias makes it think, and nothing ends it"
    for limit in (0, 1, 5):
        tokens, content = reasoning(max_thinking_tokens=limit)
        assert tokens == limit + 1 and content

    def prompt(**more: Any) -> int:
        usage = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, extra_body=more).usage
        assert usage
        return usage.prompt_tokens

    extra = len(tokenizer.encode("<think>\n\n</think>\n"))
    assert prompt(enable_thinking=False) == prompt() + extra
    assert prompt(chat_template_kwargs={"enable_thinking": False}) == prompt() + extra
    schema: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=90, seed=5, response_format=schema,
        extra_body={"enable_thinking": True, "max_thinking_tokens": 8},
    ).choices[0]  # fmt: skip
    assert json.loads(answer.message.content or "").keys() == {"ok", "n"}
    assert answer.message.model_extra and answer.message.model_extra["reasoning_content"]


def test_penalties_by_their_formulas() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0])
    shaper = Shaper(Shaping(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 7.0}), (), 1.0)
    for token in (0, 3, 3):
        shaper.push(token)
    assert shaper.shape(logits).tolist() == pytest.approx([2 - 0.75, -1, 0.5, 3 - 1.0, 7])
    repeated = Shaper(Shaping(repetition_penalty=2.0), (1,), 1.0)
    repeated.push(3)
    assert repeated.shape(logits).tolist() == pytest.approx([2, -2, 0.5, 1.5, 0])
    least = Shaper(Shaping(min_p=math.exp(-1) + 1e-6), (), 2.0).shape(logits)
    assert least.isneginf().tolist() == [False, True, True, False, True], "half the logits' distance at temperature 2"
    assert Shaper(Shaping(min_tokens=1, end_ids=(3,)), (), 1.0).shape(logits)[3] == -torch.inf
    everything = Shaper(Shaping(min_tokens=None, end_ids=(0, 1, 2, 3, 4)), (), 1.0)
    assert everything.shape(logits).tolist() == logits.tolist() and everything.error
    thinker = Shaper(Shaping(thinking=Thinking(1, 2, 1)), (), 1.0)
    thinker.push(1)
    thinker.push(0)
    assert thinker.shape(logits).isfinite().tolist() == [False, False, True, False, False]


def test_biases_and_penalties_reach_the_engine(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    (letter,) = tokenizer.encode("z")
    options: dict[str, Any] = {"model": MODEL, "prompt": "What", "max_tokens": 6, "temperature": 0}
    assert client.completions.create(**options, logit_bias={str(letter): 100}).choices[0].text == "zzzzzz"
    plain = client.completions.create(**options, logprobs=0)
    text = client.completions.create(**options, frequency_penalty=2, logit_bias={str(letter): 1}).choices[0].text
    assert text != plain.choices[0].text
    free = client.completions.create(**{**options, "max_tokens": 40}, frequency_penalty=2.0, presence_penalty=2.0)
    assert free.choices[0].text
    end = tokenizer.turn_end_id
    ended = client.completions.create(**options, logit_bias={str(end): 100}).choices[0]
    assert (ended.text, ended.finish_reason) == ("", "stop")
    patient = client.completions.create(**options, logit_bias={str(end): 100}, extra_body={"min_tokens": 3})
    assert patient.usage and patient.usage.completion_tokens == 4
    assert client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0].finish_reason == "length"


def test_prompts_are_scored_as_by_a_plain_forward(
    client: openai.OpenAI, checkpoint: Path, tokenizer: Tokenizer
) -> None:
    """The oracle is the decoder without engine or cache."""
    from tafkir.models.attention import VarlenCausal

    texts = ["What is 48 plus 24? كم 😀", "Ali"]
    decoder = load_checkpoint(checkpoint).decoder
    options: dict[str, Any] = {"model": MODEL, "prompt": texts, "logprobs": 2, "echo": True}
    alone = client.completions.create(**options, max_tokens=0)
    longer = client.completions.create(**options, max_tokens=3, seed=1)
    assert alone.usage and alone.usage.completion_tokens == 0
    for text, choice, more in zip(texts, alone.choices, longer.choices, strict=True):
        ids = torch.tensor(tokenizer.encode(text))
        with torch.inference_mode():
            hidden = decoder(ids, torch.arange(len(ids)), VarlenCausal([0, len(ids)])).hidden_ND
            logprobs = torch.log_softmax(decoder.logits(hidden).float(), -1)
        found = choice.logprobs
        assert found and found.token_logprobs and found.top_logprobs and found.text_offset and found.tokens
        assert found.token_logprobs[0] is None
        expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:].tolist())]
        assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
        for i, top in enumerate(found.top_logprobs[1:]):
            assert max(top.values()) == pytest.approx(float(logprobs[i].max()), abs=1e-5)
        assert (choice.text, choice.finish_reason) == (text, "length")
        assert found.text_offset[-1] <= len(text) and found.text_offset == sorted(found.text_offset)
        assert more.text.startswith(text) and more.logprobs and more.logprobs.token_logprobs
        assert more.logprobs.token_logprobs[: len(ids)] == found.token_logprobs
        assert len(more.logprobs.token_logprobs) == len(ids) + 3


def test_prompt_logprobs_in_vllms_spelling(server: Server, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("What is 3")
    body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 1}
    (choice,) = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"]
    found = choice["prompt_logprobs"]
    assert found[0] is None and len(found) == len(ids)
    for token, entry in zip(ids[1:], found[1:], strict=True):
        own = entry[str(token)]
        assert own["logprob"] <= max(each["logprob"] for each in entry.values())
        assert (own["rank"] == 1) == (len(entry) == 1)
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    assert chat.choices[0].model_extra and chat.choices[0].model_extra["prompt_logprobs"][0] is None


def test_responses(client: openai.OpenAI, roomy: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "input": "What is 48 plus 24?", "temperature": 0.0}
    whole = client.responses.create(**options, max_output_tokens=12)
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.status == "incomplete" and whole.incomplete_details
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage and chat.usage and whole.usage.total_tokens == chat.usage.total_tokens
    events = list(client.responses.create(**options, max_output_tokens=12, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    format: Any = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    made = client.responses.create(**options, max_output_tokens=60, text=format)
    assert made.status == "completed" and json.loads(made.output_text).keys() == {"ok", "n"}
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}
    called = roomy.responses.create(
        model=MODEL, input=[{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], tools=[tool],
        tool_choice="required", max_output_tokens=80, instructions="Call.",
    )  # fmt: skip
    call = next(item for item in called.output if item.type == "function_call")
    assert call.name == "add" and "a" in json.loads(call.arguments)
    odd_part = {"role": "user", "content": [{"type": {}, "text": "hi"}]}
    schema_of_none = {"format": {"type": "text", "schema": {}}}
    for change in (
        {"previous_response_id": "resp_1"}, {"input": [{"type": "computer"}]}, {"input": []}, {"input": [odd_part]},
        {"text": schema_of_none}, {"tool_choice": {}},
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            client.responses.create(**{**options, **change})


def test_tokens_there_and_back(server: Server, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    def ask(path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{server.url}/{path}", json=body)

    text = "What is ٣? <|im_end|> 😀"
    found = ask("tokenize", prompt=text, return_token_strs=True).json()
    assert found["tokens"] == tokenizer.encode(text) and len(found["token_strs"]) == found["count"]
    assert ask("detokenize", tokens=found["tokens"]).json() == {"prompt": text}
    chat = ask("tokenize", messages=MESSAGES).json()
    usage = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1).usage
    assert usage and chat["count"] == usage.prompt_tokens
    assert ask("detokenize", tokens=[10**6]).status_code == ask("tokenize").status_code == 400
    assert "embeddings" in ask("v1/embeddings", input="a").json()["error"]["message"]
