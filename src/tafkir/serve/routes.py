"""The routes that generate, and those that show tokens."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tafkir.records import SamplingParams
from tafkir.serve.errors import ApiError
from tafkir.serve.generate import ClientLeft, Generation, Prompt, choice_seed
from tafkir.serve.live import Live
from tafkir.serve.prompt_logprobs import EchoFormat, completion_entries, score
from tafkir.serve.responses import ChatFormat, CompletionFormat, ResponseFormat
from tafkir.serve.responses_api import ResponseEvents, ResponsesRequest
from tafkir.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, GenerationRequest, TokenizeRequest
from tafkir.serve.served import Served
from tafkir.serve.stream import ChoiceStream

__all__ = ["add_generation_routes"]

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def add_generation_routes(app: FastAPI, live: Live) -> None:
    """Chat, completions, responses, tokens; embeddings say that there are none."""

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        served = live.served
        served.check_model(body.model)
        ids = tuple(await served.encode_chat(body))
        room = served.room(ids, "messages")
        limit = body.max_completion_tokens or body.max_tokens or room
        format = ChatFormat(f"chatcmpl-{uuid.uuid4().hex}", served.name, served.tokenizer, logprobs=body.logprobs)
        format.stamp(served.fingerprint)
        if body.prompt_logprobs is not None:
            format.prompt_logprobs = await _prompt_logprobs(served, http, [ids], body)
        generation = await _submit(served, http, body, [(ids, _samples(body, limit))], body.top_logprobs)
        return await _answer(generation, format, body)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        served = live.served
        served.check_model(body.model)
        prompts: list[Prompt] = []
        for prompt in body.prompts:
            ids = tuple(await served.encode(prompt) if isinstance(prompt, str) else prompt)
            served.room(ids)
            prompts.append((ids, _samples(body, body.max_tokens)))
        if not prompts:
            raise ApiError(400, "prompt: an empty list", param="prompt", code="invalid_value")
        format = await _completion_format(served, http, body, prompts)
        if isinstance(format, EchoFormat) and body.max_tokens == 0:
            return JSONResponse(format.prompts_alone(prompts))
        generation = await _submit(served, http, body, prompts, body.logprobs or 0)
        return await _answer(generation, format, body)

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, http: Request) -> Response:
        served = live.served
        served.check_model(body.model)
        asked = body.to_chat()
        ids = tuple(await served.encode_chat(asked))
        limit = body.max_output_tokens or served.room(ids, "input")
        served.room(ids, "input")
        events = ResponseEvents(body, served.name)
        generation = await _submit(served, http, asked, [(ids, _samples(asked, limit))], 0)
        try:
            if body.stream:
                return _stream((await generation.begin()).follow(events))
            return JSONResponse(await generation.respond(events))
        except ClientLeft:
            return Response(status_code=499)

    @app.post("/v1/embeddings")
    def embeddings() -> None:
        raise ApiError(404, "this model generates text and has no embeddings", code="embeddings_not_supported")

    _add_token_routes(app, live)


def _add_token_routes(app: FastAPI, live: Live) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        from tafkir.data.chat import encode_chat

        served = live.served
        served.check_model(body.model)
        if body.prompt is not None:
            ids = await served.encode(body.prompt)
        else:
            ids = encode_chat(served.tokenizer, served.messages(body.messages), body.add_generation_prompt)
        out: dict[str, Any] = {"count": len(ids), "max_model_len": served.engine.max_context, "tokens": ids}
        if body.return_token_strs:
            out["token_strs"] = [served.tokenizer.decode([id], skip_special=False) for id in ids]
        return out

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        served = live.served
        served.check_model(body.model)
        vocab = served.tokenizer.vocab_size
        if outside := [id for id in body.tokens if not 0 <= id < vocab]:
            message = f"tokens: {outside[0]} is no token; expected 0 to {vocab - 1}"
            raise ApiError(400, message, param="tokens", code="invalid_value")
        return {"prompt": served.tokenizer.decode(body.tokens, skip_special=False)}


async def _completion_format(
    served: Served, http: Request, body: CompletionRequest, prompts: Sequence[Prompt]
) -> ResponseFormat:
    name = f"cmpl-{uuid.uuid4().hex}"
    logprobs = body.logprobs is not None
    format: ResponseFormat
    if body.echo:
        ids = [ids for ids, _ in prompts]
        scores = await score(served, http, ids, body.logprobs or 0) if logprobs else None
        entries = [completion_entries(served.tokenizer, ids[i], scores[i] if scores else None) for i in range(len(ids))]
        format = EchoFormat(name, served.name, served.tokenizer, logprobs=logprobs, entries=entries, n=body.n)
    else:
        given = [ids for ids, samples in prompts for _ in samples] if body.return_token_ids else None
        format = CompletionFormat(name, served.name, served.tokenizer, logprobs=logprobs, prompts=given)
    format.stamp(served.fingerprint)
    if body.prompt_logprobs is not None:
        format.prompt_logprobs = await _prompt_logprobs(served, http, [ids for ids, _ in prompts], body)
    return format


async def _prompt_logprobs(
    served: Served, http: Request, prompts: Sequence[tuple[int, ...]], body: GenerationRequest
) -> list[Any]:
    """vLLM's `prompt_logprobs` of every choice: for each token {id: {logprob, rank, decoded_token}}, the first null."""
    count = body.prompt_logprobs or 0
    out = []
    for ids, scores in zip(prompts, await score(served, http, prompts, count), strict=True):
        tokens: list[Any] = [None]
        for token, own, rank, top in zip(ids[1:], scores.logprobs, scores.ranks, scores.tops, strict=True):
            best = {id: (logprob, place) for place, (id, logprob) in enumerate(top[:count], 1)}
            tokens.append(
                {
                    str(id): {"logprob": logprob, "rank": place, "decoded_token": served.tokenizer.decode([id])}
                    for id, (logprob, place) in {token: (own, rank), **best}.items()
                }
            )
        out += [tokens] * body.n
    return out


async def _submit(
    served: Served, http: Request, body: GenerationRequest, prompts: Sequence[Prompt], top_logprobs: int
) -> Generation:
    is_chat = isinstance(body, ChatRequest)
    stop_ids = (*served.engine.eos_ids, *body.stop_token_ids)
    shapers = await served.shapers(body, [ids for ids, _ in prompts])
    choices = [
        ChoiceStream(
            served.tokenizer,
            stop_ids,
            body.stop,
            split_reasoning=is_chat,
            split_tools=isinstance(body, ChatRequest) and bool(body.tools) and body.tool_choice != "none",
            tool_form=served.tool_form,
        )
        for _, samples in prompts
        for _ in samples
    ]
    timeout_s = served.options.request_timeout_s or None
    limits: dict[str, Any] = {"timeout_s": timeout_s, "priority": body.priority}
    limits |= {"engine": served.engine, "model": served.name, "whole": not body.stream}
    return Generation.submit(
        served.worker, http, prompts, choices, top_logprobs=top_logprobs, shapers=shapers, **limits
    )


async def _answer(generation: Generation, format: ResponseFormat, body: GenerationRequest) -> Response:
    try:
        if body.stream:
            return _stream((await generation.begin()).stream(format, include_usage=body.include_usage))
        return JSONResponse(await generation.whole(format))
    except ClientLeft:
        return Response(status_code=499)


def _stream(events: AsyncIterator[str]) -> Response:
    return _EventStream(events, media_type="text/event-stream", headers=_STREAM_HEADERS)


class _EventStream(StreamingResponse):
    """A stream whose source itself notices that the client has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.body_iterator:
            assert isinstance(chunk, str)
            await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _samples(body: GenerationRequest, max_tokens: int) -> list[SamplingParams]:
    # The engine samples one token at least; a request for none never reaches it.
    return [body.sampling(max(1, max_tokens), choice_seed(body.seed, choice)) for choice in range(body.n)]
