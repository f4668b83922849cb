"""SGLang's native HTTP protocol: /generate with token ids, and /update_weights_from_disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tafkir.errors import RolloutError
from tafkir.records import Request
from tafkir.remote.connection import Connection
from tafkir.remote.dialect import Body, Sampled, ServerFacts, field_of, stream_seed, whole_prompt

__all__ = ["SglangDialect"]

_NUM_TOP = 5


class SglangDialect:
    """SGLang 0.5.3 or newer (`weight_version` in every answer)."""

    def connect(self, connection: Connection) -> ServerFacts:
        info = connection.get("/get_model_info")
        name = field_of(info, ("model_path",), f"{connection.url}/get_model_info")
        server = connection.get("/get_server_info")
        context = server.get("context_length") or server.get("max_req_input_len")
        return ServerFacts(str(name), int(context) if context else None)

    def encode(self, connection: Connection, facts: ServerFacts, text: str) -> list[int]:
        # Every version tells a prompt's token ids beside their log-probabilities; not every one has /tokenize.
        body = {
            "text": text,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = connection.post("/generate", body)
        entries = field_of(answer, ("meta_info", "input_token_logprobs"), f"{connection.url}/generate")
        return [int(entry[1]) for entry in entries]

    def check(self, request: Request) -> None:
        """Its log-probabilities are those before top-p and top-k: nothing to refuse."""

    def generation(self, request: Request, facts: ServerFacts, stop_ids: Sequence[int]) -> Body:
        ids, max_tokens = whole_prompt(request)
        params = request.params
        sampling: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "temperature": params.temperature,
            # A checkpoint's generation_config.json would fill in for what is not said.
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(stop_ids),
        }
        if params.stop:
            sampling["stop"] = list(params.stop)
        if (seed := stream_seed(request, 31)) is not None:
            sampling["sampling_seed"] = seed
        return "/generate", {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}

    def read(self, answer: Any, where: str) -> Sampled:
        meta = field_of(answer, ("meta_info",), where)
        # One list holds both, so a log-probability cannot belong to another token.
        entries = meta.get("output_token_logprobs")
        if entries is None:
            told = tuple(int(token) for token in answer.get("output_ids") or ())
            entries = [(None, token) for token in told]
        reason = meta.get("finish_reason")
        version = meta.get("weight_version")
        return Sampled(
            tuple(int(entry[1]) for entry in entries),
            tuple(entry[0] for entry in entries),
            str(reason.get("type") if isinstance(reason, Mapping) else reason),
            counted=meta.get("completion_tokens"),
            version=None if version is None else str(version),
        )

    def spread(self, facts: ServerFacts, prompt_ids: Sequence[int], temperature: float) -> Body:
        sampling = {"max_new_tokens": 1, "temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
        body = {
            "input_ids": list(prompt_ids),
            "sampling_params": sampling,
            "return_logprob": True,
            "top_logprobs_num": _NUM_TOP,
        }
        return "/generate", body

    def read_spread(self, answer: Any, where: str) -> list[float]:
        return [float(entry[0]) for entry in field_of(answer, ("meta_info", "output_top_logprobs", 0), where)]

    def scoring(self, token_ids: Sequence[int], facts: ServerFacts) -> Body:
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return "/generate", body

    def read_scores(self, answer: Any, token_ids: Sequence[int], where: str) -> list[float | None]:
        entries = field_of(answer, ("meta_info", "input_token_logprobs"), where)
        if [int(entry[1]) for entry in entries] != list(token_ids):
            raise RolloutError("the server scored other tokens than it was given", where=where)
        return [entry[0] for entry in entries[1:]]

    def refresh(self, connection: Connection, folder: Path, version: int, timeout_s: float) -> None:
        where = f"{connection.url}/update_weights_from_disk"
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": True}
        answer = connection.post("/update_weights_from_disk", body, timeout_s=timeout_s)
        if field_of(answer, ("success",), where) is not True:
            raise RolloutError(f"the server kept its weights: {answer.get('message', '')}", where=where)
        told = connection.get("/get_model_info").get("weight_version")
        if str(told) != str(version):
            raise RolloutError(
                f"the server says it has the weights of version {told}", where=where, expected=str(version)
            )
