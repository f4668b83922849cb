"""The HTTP API: OpenAI's models, chat and completions, health, metrics, and the browser page at `/`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse

import tafkir
from tafkir.serve.admin import add_admin_routes
from tafkir.serve.errors import install_error_handlers
from tafkir.serve.gateway import Gateway
from tafkir.serve.inbox import waits_for
from tafkir.serve.live import Live
from tafkir.serve.openapi import describe_api
from tafkir.serve.options import ServerOptions
from tafkir.serve.page import add_page
from tafkir.serve.routes import add_generation_routes

if TYPE_CHECKING:
    from tafkir.engine.cache_formats import CacheFormat
    from tafkir.serve.loading import WeightNumbers

__all__ = ["build_app"]

# A step takes seconds at most; an engine that has work and takes none for so long is not ready for more.
_STALLED_S = 60.0


def build_app(
    checkpoint: Path | str,
    *,
    model_name: str | None = None,
    max_batch: int = 32,
    max_context: int | None = None,
    max_cache_bytes: int | None = None,
    kv_cache: CacheFormat = "auto",
    speculate: str | None = None,
    weights: WeightNumbers = "auto",
    prefix_caching: bool = True,
    batch_invariant: bool = False,
    device: str = "cpu",
    four_bit_products: bool = False,
    max_queue: int = 256,
    num_threads: int | None = None,
    options: ServerOptions | None = None,
) -> FastAPI:
    """Load a checkpoint and build the application that serves it; `app.state.worker.stop()` ends its thread.

    Args:
        checkpoint: a checkpoint folder with a tokenizer.
        model_name: what clients call the model; None derives it from the folder.
        max_batch: most sequences that run at once.
        max_context: most tokens of a prompt and its answer; None takes the model's.
        max_cache_bytes: limit of the key-value cache.
        kv_cache: its number format; auto takes the dtype of the weights.
        speculate: what drafts tokens, as in `build_speculation`; None: nothing.
        weights: what they are in memory, as in `build_engine`.
        prefix_caching: begin with what earlier requests of the same beginning have left in the cache.
        batch_invariant: the same numbers to the bit for a request, alone or in any company.
        device: cpu or cuda, as in `build_engine`.
        four_bit_products: on Blackwell, round activations to NVFP4, too.
        max_queue: most requests that wait beyond those; further ones get a 503.
        num_threads: CPU threads of the model; None leaves torch's choice.
        options: keys, rates and other limits of those who call.

    Raises:
        CheckpointError, DataError: the folder or its tokenizer is missing or damaged.
        CapacityError: the sizes do not fit the model.
    """
    options = options or ServerOptions()
    live = Live(
        Path(checkpoint), model_name, max_queue, num_threads, options,
        {
            "max_batch": max_batch, "max_context": max_context, "max_cache_bytes": max_cache_bytes,
            "kv_cache": kv_cache, "speculate": speculate, "weights": weights,
            "paged": True, "prefix_caching": prefix_caching, "batch_invariant": batch_invariant,
            "device": device, "four_bit_products": four_bit_products,
        },
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        live.worker.settle = waits_for(asyncio.get_running_loop())
        yield
        live.worker.stop()
        if live.worker.tracer is not None:
            live.worker.tracer.close()

    if options.otlp_traces_endpoint is not None:
        from tafkir.serve.tracing import Tracer

        live.worker.tracer = Tracer(options.otlp_traces_endpoint)
    app = FastAPI(title="Tafkir", version=tafkir.__version__, lifespan=lifespan)
    app.state.live, app.state.worker, app.state.model_name = live, live.worker, live.served.name
    install_error_handlers(app)
    _add_status_routes(app, live)
    add_generation_routes(app, live)
    add_admin_routes(app, live)
    describe_api(app, live)
    add_page(app)
    app.add_middleware(Gateway, options=options, worker=live.worker)
    if options.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _add_status_routes(app: FastAPI, live: Live) -> None:
    def card() -> dict[str, Any]:
        served = live.served
        config = served.engine.decoder.config
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "tafkir",
            "max_model_len": served.engine.max_context,
            "fingerprint": served.fingerprint,
            "num_parameters": config.num_parameters(),
            "num_active_parameters": config.num_parameters(active=True),
        }

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        live.served.check_model(name)
        return card()

    @app.get("/health", responses={503: {"description": "The engine has failed."}})
    def health() -> JSONResponse:
        healthy, name = live.worker.healthy, live.served.name
        return JSONResponse({"status": "ok" if healthy else "failed", "model": name}, 200 if healthy else 503)

    @app.get("/ready", responses={503: {"description": "It drains, has failed, or is stuck."}})
    def ready() -> JSONResponse:
        worker = live.worker
        stalled = worker.stalled_s > _STALLED_S
        states = {"failed": not worker.healthy, "draining": worker.draining, "stalled": stalled}
        state = next((name for name, holds in states.items() if holds), "ready")
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": tafkir.__version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        worker = live.worker
        gauges = (
            ("vllm:num_requests_running", "Sequences that are being generated.", worker.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait for a place.", worker.num_waiting),
            ("tafkir:kv_cache_bytes", "Bytes of the key-value cache.", worker.engine.cache_bytes),
            ("vllm:kv_cache_usage_perc", "Share of the cache's blocks in use, 0 to 1.", worker.engine.cache_usage),
        )
        worker.metrics.note_cache(worker.engine)
        if worker.engine.speculation is not None:
            worker.metrics.note_drafts(worker.engine.speculation.acceptance)
        page = worker.metrics.render(live.served.name, gauges)
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")
