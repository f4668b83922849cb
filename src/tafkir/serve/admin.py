"""What changes a running server: other weights, an empty prefix cache. Under the paths of SGLang and vLLM."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from tafkir.errors import TafkirError
from tafkir.serve.errors import ApiError, error_of
from tafkir.serve.live import Live
from tafkir.serve.worker import Stopped

__all__ = ["ADMIN_PATHS", "add_admin_routes"]

logger = logging.getLogger(__name__)

ADMIN_PATHS = frozenset({"/update_weights_from_disk", "/get_model_info", "/reset_prefix_cache", "/collective_rpc"})
"""Where the admin key is asked for, and no other."""


class UpdateWeights(BaseModel):
    """Body of SGLang's /update_weights_from_disk; `drain_s` is ours."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model_path: str | None = Field(None, description="A folder on the server's machine; null: the present one, again.")
    weight_version: str = "default"
    abort_all_requests: bool = Field(False, description="End what runs at once, with a 503.")
    drain_s: float | None = Field(None, ge=0, description="Longest time that what runs goes on with the old weights.")
    flush_cache: Literal[True] = True
    load_format: None = None


class CollectiveRpc(BaseModel):
    """Body of vLLM's /collective_rpc, of which `reload_weights` is done."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: Literal["reload_weights"]
    kwargs: dict[Literal["weights_path"], str] = Field(default_factory=dict)
    timeout: float | None = None


def add_admin_routes(app: FastAPI, live: Live) -> None:
    """Add them where the server has an admin key; without one these paths do not exist."""
    if live.served.options.admin_key is None:
        return

    def replace(path: str | None, **options: Any) -> int:
        updates = live.worker.metrics.weight_updates
        try:
            going_on = live.replace(None if path is None else Path(path), **options)
        except (ApiError, TafkirError, Stopped) as error:
            updates.add("refused")
            logger.warning("the model stays: %s", error)
            raise
        updates.add("replaced")
        return going_on

    @app.post("/update_weights_from_disk")
    def update_weights(body: UpdateWeights) -> JSONResponse:
        drain_s = 0.0 if body.abort_all_requests else math.inf if body.drain_s is None else body.drain_s
        told: dict[str, Any] = {"success": False, "num_paused_requests": 0}
        try:
            going_on = replace(body.model_path, version=body.weight_version, drain_s=drain_s)
        except (ApiError, TafkirError) as error:
            status = error_of(error).status if isinstance(error, ApiError) else 400
            return JSONResponse({**told, "message": f"the model stays as it was: {error}"}, status)
        served = live.served
        told |= {"success": True, "message": f"{served.name} is served", "num_going_on": going_on}
        return JSONResponse({**told, "model": served.name, "fingerprint": served.fingerprint})

    @app.get("/get_model_info")
    def model_info() -> dict[str, Any]:
        path = str(live.served.path)
        return {"model_path": path, "tokenizer_path": path, "is_generation": True, "weight_version": live.version}

    @app.post("/collective_rpc")
    def collective_rpc(body: CollectiveRpc) -> dict[str, Any]:
        replace(body.kwargs.get("weights_path"))
        return {"results": [None]}

    @app.post("/reset_prefix_cache")
    def reset_prefix_cache() -> dict[str, Any]:
        live.worker.between_steps(live.served.engine.forget_prefixes).result()
        return {}
