"""vLLM's HTTP protocol: /v1/completions with token ids both ways, and its endpoints for new weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tafkir.errors import RequestError, RolloutError
from tafkir.records import Request
from tafkir.remote.connection import Connection
from tafkir.remote.dialect import Body, Sampled, ServerFacts, field_of, stream_seed, whole_prompt

__all__ = ["VllmDialect"]

_NUM_TOP = 5


class VllmDialect:
    """vLLM 0.10.2 or newer (`return_token_ids`).

    Args:
        weight_sync: "disk" drives the `disk` backend of vLLM's weight transfer (docs/training/weight_transfer of
            vLLM): start, update with a path, finish with a version. "reload" is for servers without that backend: the
            worker method `reload_weights` through /collective_rpc; such a server does not tell which weights it has.
    """

    def __init__(self, weight_sync: Literal["disk", "reload"] = "disk") -> None:
        self._weight_sync = weight_sync

    def connect(self, connection: Connection) -> ServerFacts:
        answer = connection.get("/v1/models")
        card = field_of(answer, ("data", 0), f"{connection.url}/v1/models")
        context = card.get("max_model_len")
        return ServerFacts(str(card.get("id", "")), int(context) if context else None)

    def encode(self, connection: Connection, facts: ServerFacts, text: str) -> list[int]:
        body = {"model": facts.model, "prompt": text, "add_special_tokens": False}
        tokens = field_of(connection.post("/tokenize", body), ("tokens",), f"{connection.url}/tokenize")
        return [int(token) for token in tokens]

    def check(self, request: Request) -> None:
        params = request.params
        if params.top_p < 1 or params.top_k > 0:
            raise RequestError(
                "vLLM reports log-probabilities of the cut distribution, or of the one at temperature 1",
                where=f"request {request.id!r}",
                expected="top_p = 1 and top_k = 0",
            )

    def generation(self, request: Request, facts: ServerFacts, stop_ids: Sequence[int]) -> Body:
        ids, max_tokens = whole_prompt(request)
        params = request.params
        body: dict[str, Any] = {
            "model": facts.model,
            "prompt": ids,
            "max_tokens": max_tokens,
            "temperature": params.temperature,
            # A checkpoint's generation_config.json would fill in for what is not said.
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(stop_ids),
            "logprobs": 0,
            "return_token_ids": True,
        }
        if params.stop:
            body["stop"] = list(params.stop)
        if (seed := stream_seed(request, 63)) is not None:
            body["seed"] = seed
        return "/v1/completions", body

    def read(self, answer: Any, where: str) -> Sampled:
        choice = field_of(answer, ("choices", 0), where)
        tokens = choice.get("token_ids")
        if tokens is None:
            raise RolloutError(
                "the answer has no token ids", where=where, fix="use a vLLM that knows return_token_ids (0.10.2)"
            )
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
        prompt = choice.get("prompt_token_ids")
        return Sampled(
            tuple(int(token) for token in tokens),
            tuple(logprobs),
            str(choice.get("finish_reason")),
            counted=(answer.get("usage") or {}).get("completion_tokens"),
            prompt_ids=None if prompt is None else tuple(prompt),
        )

    def spread(self, facts: ServerFacts, prompt_ids: Sequence[int], temperature: float) -> Body:
        body = {
            "model": facts.model,
            "prompt": list(prompt_ids),
            "max_tokens": 1,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": 0,
            "logprobs": _NUM_TOP,
        }
        return "/v1/completions", body

    def read_spread(self, answer: Any, where: str) -> list[float]:
        top = field_of(answer, ("choices", 0, "logprobs", "top_logprobs", 0), where)
        return [float(value) for value in top.values()]

    def scoring(self, token_ids: Sequence[int], facts: ServerFacts) -> Body:
        body = {
            "model": facts.model,
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }
        return "/v1/completions", body

    def read_scores(self, answer: Any, token_ids: Sequence[int], where: str) -> list[float | None]:
        rows = field_of(answer, ("choices", 0, "prompt_logprobs"), where) or ()
        # Each row maps token ids to what is known of them; the first token has no row.
        return [
            (row or {}).get(str(token), {}).get("logprob") for row, token in zip(rows[1:], token_ids[1:], strict=False)
        ]

    def refresh(self, connection: Connection, folder: Path, version: int, timeout_s: float) -> None:
        if self._weight_sync == "reload":
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}, "timeout": timeout_s}
            connection.post("/collective_rpc", body, timeout_s=timeout_s)
            connection.post("/reset_prefix_cache", {}, timeout_s=timeout_s)
            return
        # Pausing drops the caches that belong to the old weights.
        connection.post("/pause?mode=wait", {}, timeout_s=timeout_s)
        connection.post("/init_weight_transfer_engine", {"init_info": {}}, timeout_s=timeout_s)
        connection.post("/start_weight_update", {}, timeout_s=timeout_s)
        connection.post("/update_weights", {"update_info": {"path": str(folder)}}, timeout_s=timeout_s)
        connection.post("/finish_weight_update", {"weight_version": str(version)}, timeout_s=timeout_s)
        connection.post("/resume", {}, timeout_s=timeout_s)
        where = f"{connection.url}/weight_info"
        told = field_of(connection.get("/weight_info"), ("weight_version",), where)
        if str(told) != str(version):
            raise RolloutError(
                f"the server says it has the weights of version {told}", where=where, expected=str(version)
            )
