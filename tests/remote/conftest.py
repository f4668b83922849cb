"""A tiny checkpoint with a tokenizer of its own, another one, and pools that wait for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig
from tafkir.records import Request, SamplingParams
from tafkir.remote.pool import Limits, ServerPool
from tafkir.remote.sglang import SglangDialect
from tafkir.remote.vllm import VllmDialect
from tafkir.remote.weights import WeightFolders
from tests.remote.servers import ProtocolServer, SglangServer, VllmServer

TEXTS = [
    "Ann has 3 pens and buys 4 more. How many pens has she now?",
    "3+4=7 so \\boxed{7}",
    "Bob eats two of his nuts",
]
LIMITS = Limits(timeout_s=5.0, weight_timeout_s=5.0, max_concurrency=4, max_retries=2, backoff_s=0.01)

MakePool = Callable[..., ServerPool]
KINDS = {"vllm": (VllmServer, VllmDialect), "sglang": (SglangServer, SglangDialect)}


def write_checkpoint(folder: Path, seed: int, texts: list[str]) -> Path:
    config = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=8,
        max_position_embeddings=160,
    )
    decoder = build_decoder(config, seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    save_checkpoint(folder, decoder, tokenizer=Tokenizer.train(texts, 280))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint(tmp_path_factory.mktemp("remote") / "tiny", 0, TEXTS)


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another seed, and a tokenizer that was trained on another text."""
    return write_checkpoint(tmp_path_factory.mktemp("remote") / "other", 1, ["12-5=7 left", "<b>so many</b> words"] * 3)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture
def engine(checkpoint: Path, tokenizer: Tokenizer) -> Engine:
    eos_ids = (tokenizer.turn_end_id, tokenizer.document_end_id)
    return Engine(load_checkpoint(checkpoint).decoder, eos_ids=eos_ids, max_batch=1)


@pytest.fixture
def make_pool(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[MakePool]:
    made: list[ServerPool] = []

    def make(
        *servers: ProtocolServer, limits: Limits = LIMITS, dialect: object = None, **options: object
    ) -> ServerPool:
        kind = "vllm" if isinstance(servers[0], VllmServer) else "sglang"
        pool = ServerPool(
            [server.url for server in servers],
            dialect or KINDS[kind][1](),  # type: ignore[arg-type]
            tokenizer,
            eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id),
            vocab_size=320,
            folders=WeightFolders(tmp_path / "weights", checkpoint, "float32"),
            limits=limits,
            **options,  # type: ignore[arg-type]
        )
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.close()


@pytest.fixture
def requests(tokenizer: Tokenizer) -> list[Request]:
    """Eight requests for two prompts; one ends at once by its limit, some by a stop token."""
    prompts = [tuple(tokenizer.encode(text)) for text in TEXTS[:2]]
    made = []
    for i in range(8):
        # Half of the vocabulary ends two of them.
        ends = tuple(range(160)) if i % 4 == 2 else ()
        params = SamplingParams(max_tokens=1 if i == 3 else 5, seed=77 + i, stop_token_ids=ends)
        made.append(Request(str(i), prompts[i % 2], params))
    return made
