"""The HTTP API: OpenAI's models, chat and completions, health, metrics, and the browser page at `/`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

import tafkir
from tafkir.records import SamplingParams
from tafkir.serve.errors import ApiError, install_error_handlers
from tafkir.serve.generate import ClientLeft, Generation, choice_seed
from tafkir.serve.metrics import render_metrics
from tafkir.serve.responses import ChatFormat, CompletionFormat, ResponseFormat
from tafkir.serve.schema import ChatRequest, CompletionRequest, GenerationRequest, TokenizeRequest
from tafkir.serve.stream import ChoiceStream
from tafkir.serve.worker import EngineWorker

if TYPE_CHECKING:
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.cache_formats import CacheFormat
    from tafkir.engine.engine import Engine

__all__ = ["build_app"]

# The page is one file and talks to this server alone.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Prompt = tuple[tuple[int, ...], Sequence[SamplingParams]]


@dataclass(frozen=True, slots=True)
class _Served:
    """What the routes need: the model's name, its tokenizer and the thread that runs it."""

    name: str
    path: Path
    created: int
    tokenizer: Tokenizer
    worker: EngineWorker

    @property
    def engine(self) -> Engine:
        return self.worker.engine


def build_app(
    checkpoint: Path | str,
    *,
    model_name: str | None = None,
    max_batch: int = 32,
    max_context: int | None = None,
    max_cache_bytes: int | None = None,
    kv_cache: CacheFormat = "auto",
    max_queue: int = 256,
    num_threads: int | None = None,
) -> FastAPI:
    """Load a checkpoint and build the application that serves it; `app.state.worker.stop()` ends its thread.

    Args:
        checkpoint: a checkpoint folder with a tokenizer.
        model_name: what clients call the model; None derives it from the folder.
        max_batch: most sequences that run at once.
        max_context: most tokens of a prompt and its answer; None takes the model's.
        max_cache_bytes: limit of the key-value cache.
        kv_cache: its number format; auto takes the dtype of the weights.
        max_queue: most requests that wait beyond those; further ones get a 503.
        num_threads: CPU threads of the model; None leaves torch's choice.

    Raises:
        CheckpointError, DataError: the folder or its tokenizer is missing or damaged.
        CapacityError: the sizes do not fit the model.
    """
    served = _load(
        Path(checkpoint), model_name, max_queue, num_threads,
        {"max_batch": max_batch, "max_context": max_context, "max_cache_bytes": max_cache_bytes, "kv_cache": kv_cache},
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        served.worker.stop()

    app = FastAPI(title="Tafkir", version=tafkir.__version__, lifespan=lifespan)
    app.state.worker = served.worker
    app.state.model_name = served.name
    install_error_handlers(app)
    _add_status_routes(app, served)
    _add_generation_routes(app, served)
    return app


def _load(
    path: Path, model_name: str | None, max_queue: int, num_threads: int | None, sizes: dict[str, Any]
) -> _Served:
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.recipe.bundled import find_checkpoint
    from tafkir.serve.loading import build_engine, name_of

    path = find_checkpoint(path)
    tokenizer = Tokenizer.load(path)
    worker = EngineWorker(lambda: build_engine(path, tokenizer, num_threads, **sizes), max_queue=max_queue)
    worker.start()
    return _Served(model_name or name_of(path), path, int(time.time()), tokenizer, worker)


def _add_status_routes(app: FastAPI, served: _Served) -> None:
    page = (resources.files("tafkir.serve") / "web" / "index.html").read_text(encoding="utf-8")

    def card() -> dict[str, Any]:
        config = served.engine.decoder.config
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "tafkir",
            "max_model_len": served.engine.max_context,
            "num_parameters": config.num_parameters(),
            "num_active_parameters": config.num_parameters(active=True),
        }

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        _check_model(served, name)
        return card()

    @app.get("/health")
    def health() -> JSONResponse:
        healthy = served.worker.healthy
        return JSONResponse({"status": "ok" if healthy else "failed", "model": served.name}, 200 if healthy else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        return render_metrics(served.worker)


def _add_generation_routes(app: FastAPI, served: _Served) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        from tafkir.data.chat import encode_chat

        _check_model(served, body.model)
        ids = tuple(encode_chat(served.tokenizer, [message.to_message() for message in body.messages]))
        room = _room(served, ids)
        limit = body.max_completion_tokens or body.max_tokens or room
        format = ChatFormat(f"chatcmpl-{uuid.uuid4().hex}", served.name, served.tokenizer, logprobs=body.logprobs)
        return await _answer(
            served, http, body, [(ids, _samples(body, limit))], format, body.top_logprobs, split_reasoning=True
        )

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        _check_model(served, body.model)
        prompts: list[Prompt] = []
        for prompt in body.prompts:
            ids = tuple(served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
            _room(served, ids)
            prompts.append((ids, _samples(body, body.max_tokens)))
        if not prompts:
            raise ApiError(400, "prompt: an empty list", param="prompt", code="invalid_value")
        format = CompletionFormat(
            f"cmpl-{uuid.uuid4().hex}",
            served.name,
            served.tokenizer,
            logprobs=body.logprobs is not None,
            prompts=[ids for ids, samples in prompts for _ in samples] if body.return_token_ids else None,
        )
        return await _answer(
            served, http, body, prompts, format, body.logprobs or 0, split_reasoning=False, ends=body.stop_token_ids
        )

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        _check_model(served, body.model)
        ids = served.tokenizer.encode(body.prompt)
        return {"count": len(ids), "max_model_len": served.engine.max_context, "tokens": ids}


async def _answer(
    served: _Served,
    http: Request,
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    format: ResponseFormat,
    top_logprobs: int,
    *,
    split_reasoning: bool,
    ends: Sequence[int] = (),
) -> Response:
    stop_ids = (*served.engine.eos_ids, *ends)
    choices = [
        ChoiceStream(served.tokenizer, stop_ids, body.stop, split_reasoning=split_reasoning)
        for _, samples in prompts
        for _ in samples
    ]
    generation = Generation.submit(served.worker, http, prompts, choices, top_logprobs=top_logprobs)
    if body.stream:
        events = generation.stream(format, include_usage=body.include_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    try:
        return JSONResponse(await generation.whole(format))
    except ClientLeft:
        return Response(status_code=499)


def _check_model(served: _Served, name: str | None) -> None:
    if name is not None and name != served.name:
        message = f"the model {name!r} does not exist; this server has {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _room(served: _Served, ids: Sequence[int]) -> int:
    """Tokens that the context leaves for an answer."""
    context = served.engine.max_context
    if len(ids) >= context:
        message = f"the prompt has {len(ids)} tokens; the context of {context} must leave room for an answer"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    return context - len(ids)


def _samples(body: GenerationRequest, max_tokens: int) -> list[SamplingParams]:
    return [body.sampling(max_tokens, choice_seed(body.seed, choice)) for choice in range(body.n)]
