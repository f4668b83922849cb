"""What is asked of a server: lengths, shared prefixes, and how long people wait."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from tafkir.errors import RecipeError

__all__ = ["WORKLOADS", "Workload", "load_workload"]


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the mean.

    Attributes:
        prompt_tokens: of a request, the cached ones among them. output_tokens: of its answer.
        cached: share of a prompt that the prefix cache holds.
        ttft_s: longest acceptable mean time to the first token. tpot_s: longest acceptable mean time per token.
        requests_per_s: that have to be served; 0, as many as there can be.
        utilization: share of the day's hours that the load fills; what is paid for is always there.
    """

    prompt_tokens: float = 1024
    output_tokens: float = 512
    cached: float = 0.0
    ttft_s: float = 2.0
    tpot_s: float = 0.05
    requests_per_s: float = 0.0
    utilization: float = 1.0


WORKLOADS = {
    "chat": Workload(prompt_tokens=2048, output_tokens=512, cached=0.5, ttft_s=2.0, tpot_s=0.05),
    "reasoning": Workload(prompt_tokens=1024, output_tokens=8192, cached=0.0, ttft_s=5.0, tpot_s=0.05),
}
"""Two usual ones. chat: turns on a shared prefix; reasoning: long answers to short questions. 20 tokens/s at least."""

_SHARES = ("cached", "utilization")


def load_workload(name: str) -> Workload:
    """A workload by name, or from a TOML file with the keys of `Workload`.

    Raises:
        RecipeError: there is none of that name, a key is unknown, or a number is out of range.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    path = Path(name)
    if not path.is_file():
        raise RecipeError("no such workload", where=name, expected=f"{', '.join(WORKLOADS)}, or a TOML file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid TOML ({error})", where=name, fix="correct the file") from error
    known = [field.name for field in fields(Workload)]
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            fix = f"did you mean {near[0]!r}?" if near else None
            raise RecipeError(f"unknown key {key!r}", where=name, expected=f"keys among {', '.join(known)}", fix=fix)
        _check(key, value, name)
    return Workload(**{key: float(value) for key, value in table.items()})


def _check(key: str, value: object, where: str) -> None:
    lowest = 0.0 if key in ("cached", "requests_per_s") else 1e-9
    highest = 0.99 if key == "cached" else 1.0 if key in _SHARES else 1e12
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        expected = f"a number from {lowest:g} to {highest:g}" if key in _SHARES else "a positive number"
        if key == "requests_per_s":
            expected = "a number that is not negative"
        raise RecipeError(f"{key} = {value!r}", where=where, expected=expected, fix="correct the file")
