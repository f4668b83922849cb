"""What rollout workers in these tests are made of: a tiny engine that dies, hangs or raises when it is ordered to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tafkir.engine.engine import Engine
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.recipe.model import ModelConfig
from tafkir.records import Completion, Request
from tests.cluster.graders import obey

__all__ = ["BuildEngine", "build_tiny"]

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=8,
    max_position_embeddings=128,
)
EOS = 3


def build_tiny(seed: int = 0) -> Decoder:
    return build_decoder(CONFIG, seed)


class ObedientEngine(Engine):
    """Looks for orders after it has sampled half of a call."""

    orders = ""

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for i, completion in enumerate(super().complete(requests)):
            if i == len(requests) // 2:
                order = obey(self.orders)
                if order == "raise":
                    raise ZeroDivisionError("by hand")
                if order == "refuse":
                    raise CheckpointError("not this one", where="here")
                if order == "lose one":
                    continue
            yield completion


@dataclass(frozen=True)
class BuildEngine:
    """Builds a worker's engine; `orders` is the folder that it looks into."""

    orders: str

    def __call__(self) -> ObedientEngine:
        engine = ObedientEngine(build_tiny(), eos_ids=(EOS,), max_batch=64)
        engine.orders = self.orders
        return engine
