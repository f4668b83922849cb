"""A tiny random checkpoint on disk, and a live server for it on a free port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig
from tafkir.serve.app import build_app
from tafkir.serve.options import ServerOptions
from tafkir.serve.run import HttpServer

TEXTS = [
    "What is 48 plus 24? <think> 48+24=72 </think> The answer is 72.",
    "كم يساوي ثمانية وأربعون زائد أربعة وعشرون؟ الجواب هو اثنان وسبعون.",
    "Ali has 3 apples 🍎 and buys 5 more 🍎. How many? 😀",
]


def write_checkpoint(path: Path, max_positions: int) -> Path:
    """A random model that rarely ends a turn of its own accord."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(TEXTS * 3, 420)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=8,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        n_group=2,
        topk_group=1,
        max_position_embeddings=max_positions,
    )
    decoder = build_decoder(config, 0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        decoder.head_weight[[tokenizer.turn_end_id, tokenizer.document_end_id]] = 0
    save_checkpoint(path, decoder, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny-random", 256)


@dataclass(frozen=True)
class Server:
    """A running server and the application in it."""

    url: str
    app: FastAPI

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, **options)  # type: ignore[arg-type]


def start(app: FastAPI, options: ServerOptions | None = None) -> tuple[Server, uvicorn.Server, threading.Thread]:
    server = HttpServer(app, options or ServerOptions(), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    return Server(f"http://127.0.0.1:{port}", app), server, thread


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[Server]:
    app = build_app(checkpoint, max_batch=8, max_queue=16, num_threads=1)
    handle, uvicorn_server, thread = start(app)
    yield handle
    uvicorn_server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive(), "the server shuts down"
    assert not app.state.worker.healthy, "and so does the engine's thread"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
