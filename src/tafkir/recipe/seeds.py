"""Seeds: every random stream is a pure function of the recipe's seed and of what it is for."""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(recipe.seed, "rlvr", step)`.

    Different purposes give unrelated streams; the same purpose gives the same stream on every machine.
    """
    key = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
