"""Small HTTP servers that answer as vLLM and SGLang document it, with tokens that Tafkir's own engine samples.

What they say is put together here from the protocols' documentation (vLLM: /v1/completions, docs/training/
weight_transfer/disk.md; SGLang: docs/basic_usage/sampling_params.md, docs/advanced_features/sglang_for_rl.md). A
`damage` changes an answer before it leaves, or does not let it leave.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tafkir.checkpoint.load import load_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.records import Completion, Request, SamplingParams

Answer = dict[str, Any]
Damage = Callable[["ProtocolServer", str, Answer, Answer], Answer | int | None]


class Silence(Exception):
    """The connection is cut without an answer."""


class ProtocolServer:
    """A server of one protocol; use as a context manager. `url` is where it listens."""

    def __init__(self, checkpoint: Path, damage: Damage | None = None) -> None:
        self.tokenizer = Tokenizer.load(checkpoint)
        self.engine = Engine(
            load_checkpoint(checkpoint).decoder,
            eos_ids=(self.tokenizer.turn_end_id, self.tokenizer.document_end_id),
            max_batch=8,
        )
        self.damage, self.version = damage, "default"
        self.seen: list[tuple[str, Answer]] = []
        self.folder: str | None = None
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> ProtocolServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]

    def answer(self, path: str, body: Answer) -> Answer:
        raise NotImplementedError

    def sample(self, ids: list[int], params: SamplingParams) -> Completion:
        with self._lock:
            (done,) = self.engine.complete([Request("0", tuple(ids), params)])
        return done

    def scores(self, ids: list[int]) -> list[float]:
        with self._lock:
            return [float(value) for value in self.engine.score([ids])[0]]

    def take(self, folder: str) -> None:
        with self._lock:
            self.engine.load_weights(load_checkpoint(folder).decoder.state_dict().items(), 0)
        self.folder = folder

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                return

            def do_GET(self) -> None:
                self.respond({})

            def do_POST(self) -> None:
                self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

            def respond(self, body: Answer) -> None:
                server.seen.append((self.path, body))
                status, answer = 200, server.answer(self.path, body)
                if "__status__" in answer:
                    status = answer.pop("__status__")
                try:
                    changed = server.damage(server, self.path, body, answer) if server.damage else answer
                except Silence:
                    self.close_connection = True
                    return
                if isinstance(changed, int):
                    status, changed = changed, {"error": {"message": "out of order"}}
                content = json.dumps(changed).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                try:
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    return

        return Handler


class VllmServer(ProtocolServer):
    """`vllm serve` with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "disk"}'."""

    model = "tiny"
    updating = False
    raw_logprobs = False

    def answer(self, path: str, body: Answer) -> Answer:
        path = path.partition("?")[0]
        if path == "/v1/models":
            card = {"id": self.model, "object": "model", "owned_by": "vllm", "max_model_len": self.engine.max_context}
            return {"object": "list", "data": [card]}
        if path == "/tokenize":
            tokens = self.tokenizer.encode(body["prompt"])
            return {"count": len(tokens), "max_model_len": self.engine.max_context, "tokens": tokens}
        if path == "/v1/completions":
            return self.completions(body)
        return self.control(path, body)

    def completions(self, body: Answer) -> Answer:
        assert body["model"] == self.model
        params = SamplingParams(
            temperature=body["temperature"],
            max_tokens=body["max_tokens"],
            seed=body.get("seed", 0),
            stop_token_ids=tuple(body.get("stop_token_ids", ())),
        )
        done = self.sample(body["prompt"], params)
        names = [f"token_id:{token}" for token in done.token_ids]
        choice: Answer = {"index": 0, "text": "", "finish_reason": done.finish_reason, "stop_reason": None}
        choice |= {"logprobs": None, "prompt_logprobs": None, "token_ids": None, "prompt_token_ids": None}
        if body.get("logprobs") is not None:
            top = self.top(body) if body["logprobs"] else {}
            choice["logprobs"] = {
                "text_offset": [0] * len(names),
                "token_logprobs": list(done.logprobs),
                "tokens": names,
                "top_logprobs": [top or {name: value} for name, value in zip(names, done.logprobs, strict=True)],
            }
        if body.get("return_token_ids"):
            choice |= {"token_ids": list(done.token_ids), "prompt_token_ids": body["prompt"]}
        if body.get("prompt_logprobs") is not None:
            ids = body["prompt"]
            rows = [
                {str(token): {"logprob": value, "rank": 1, "decoded_token": ""}}
                for token, value in zip(ids[1:], self.scores(ids), strict=True)
            ]
            choice["prompt_logprobs"] = [None, *rows]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(done.token_ids)}
        return {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 1,
            "model": self.model,
            "choices": [choice],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }

    def top(self, body: Answer) -> dict[str, float]:
        """The most probable tokens; `raw_logprobs` reports them at temperature 1 whatever was asked for."""
        temperature = 1.0 if self.raw_logprobs else body["temperature"]
        with self._lock:
            request = Request("0", tuple(body["prompt"]), SamplingParams(temperature=temperature, max_tokens=1, seed=0))
            self.engine.add_request(request, top_logprobs=body["logprobs"])
            events = []
            while self.engine.has_work:
                events += self.engine.step()
        return {f"token_id:{token}": value for token, value in events[0].top}

    def control(self, path: str, body: Answer) -> Answer:
        if path == "/start_weight_update":
            self.updating = True
            return {"message": "Weight update started"}
        if path == "/update_weights":
            if not self.updating:
                return {"__status__": 400, "detail": "no update was started"}
            self.take(body["update_info"]["path"])
            return {"message": "Weights updated"}
        if path == "/finish_weight_update":
            self.updating, self.version = False, body["weight_version"]
            return {"message": "Weight update finished"}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.take(body["kwargs"]["weights_path"])
            return {"results": [None]}
        known = {
            "/pause": "paused",
            "/resume": "resumed",
            "/init_weight_transfer_engine": "",
            "/reset_prefix_cache": "",
        }
        if path in known:
            return {"status": known[path]}
        return {"__status__": 404, "detail": "Not Found"}


class SglangServer(ProtocolServer):
    """`python -m sglang.launch_server`."""

    def answer(self, path: str, body: Answer) -> Answer:
        if path == "/get_model_info":
            return {"model_path": "tiny", "is_generation": True, "weight_version": self.version}
        if path == "/get_server_info":
            return {"context_length": self.engine.max_context, "version": "0.5.5"}
        if path == "/generate":
            return self.generate(body)
        if path == "/update_weights_from_disk":
            self.take(body["model_path"])
            self.version = body["weight_version"]
            return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        return {"__status__": 404, "detail": "Not Found"}

    def generate(self, body: Answer) -> Answer:
        sampling = body["sampling_params"]
        ids = body["input_ids"] if "input_ids" in body else self.tokenizer.encode(body["text"])
        params = SamplingParams(
            temperature=sampling["temperature"],
            max_tokens=sampling["max_new_tokens"],
            seed=sampling.get("sampling_seed", 0),
            stop_token_ids=tuple(sampling.get("stop_token_ids", ())),
        )
        done = self.sample(ids, params)
        reason: Answer = {"type": done.finish_reason}
        reason |= {"matched": done.token_ids[-1]} if done.finish_reason == "stop" else {"length": params.max_tokens}
        meta: Answer = {
            "id": "0",
            "finish_reason": reason,
            "prompt_tokens": len(ids),
            "weight_version": self.version,
            "completion_tokens": len(done.token_ids),
            "cached_tokens": 0,
            "e2e_latency": 0.1,
        }
        if body.get("return_logprob"):
            entries = zip(done.logprobs, done.token_ids, strict=True)
            meta["output_token_logprobs"] = [[value, token, None] for value, token in entries]
            meta["input_token_logprobs"] = []
            if body.get("logprob_start_len") == 0:
                scored = zip([None, *self.scores(ids)], ids, strict=True)
                meta["input_token_logprobs"] = [[value, token, None] for value, token in scored]
        return {"text": "", "output_ids": list(done.token_ids), "meta_info": meta}
