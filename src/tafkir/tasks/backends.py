"""What tasks need beside data: where programs run, and which judge answers. Said once a process.

Nothing is opened before a task asks for it. Without a word, programs run in the tier of $TAFKIR_SANDBOX (bwrap), and
the judge is that of $TAFKIR_JUDGE, as `URL#MODEL`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from tafkir.errors import TafkirError
from tafkir.tasks.sandbox import Limits, ProgramRunner, Sandbox, Tier

if TYPE_CHECKING:
    from tafkir.tasks.judge import JudgeEndpoint

__all__ = ["Backends", "choose_backends", "default_judge", "default_sandbox", "open_sandbox"]


URL_VARIABLE = "TAFKIR_SANDBOX_URL"


@dataclass(frozen=True, slots=True)
class Backends:
    """Where programs run and who judges.

    Attributes:
        sandbox: tier; None for $TAFKIR_SANDBOX, else "bwrap".
        unsafe: the user's word that the tier rlimit may be used.
        judge: `URL#MODEL` of an OpenAI-compatible endpoint; empty for $TAFKIR_JUDGE.
        judge_key_env: variable with its key.
        judge_cache: JSON-lines file of judgements, asked for once by their content.
        limits: of one program, where a task has none of its own.
    """

    sandbox: Tier | None = None
    unsafe: bool = False
    judge: str = ""
    judge_key_env: str = "TAFKIR_JUDGE_KEY"
    judge_cache: Path | None = None
    limits: Limits | None = None


_chosen = Backends()
_open: dict[str, ProgramRunner | JudgeEndpoint] = {}


@contextmanager
def choose_backends(backends: Backends) -> Iterator[None]:
    """Use these until the block is left; what it opened is closed then."""
    global _chosen, _open
    before = _chosen, _open
    _chosen, _open = backends, {}
    try:
        yield
    finally:
        for opened in _open.values():
            opened.close()
        _chosen, _open = before


def default_sandbox(packages: Sequence[str] = ()) -> ProgramRunner:
    """The chosen sandbox with these packages in it, opened once.

    Raises:
        TafkirError, BackendUnavailable: see `open_sandbox`.
    """
    name = " ".join(["sandbox", *packages])
    if name not in _open:
        tier = _chosen.sandbox or cast(Tier, os.environ.get("TAFKIR_SANDBOX") or "bwrap")
        _open[name] = open_sandbox(tier, unsafe=_chosen.unsafe, limits=_chosen.limits, packages=packages)
    return cast(ProgramRunner, _open[name])


def default_judge(*, max_tokens: int = 2048) -> JudgeEndpoint:
    """The chosen judge, opened once for each length of judgement.

    Raises:
        TafkirError: none is chosen, or the address is not `URL#MODEL`.
    """
    name = f"judge-{max_tokens}"
    if name not in _open:
        place = _chosen.judge or os.environ.get("TAFKIR_JUDGE", "")
        url, mark, model = place.partition("#")
        if not (url.startswith(("http://", "https://")) and mark and model):
            raise TafkirError(
                f"the judge {place!r} has no address and model"
                if place
                else "this task needs a judge, and none is named",
                where="--judge",
                expected="URL#MODEL of an OpenAI-compatible endpoint",
                fix="pass --judge http://127.0.0.1:8000/v1#MODEL, or set TAFKIR_JUDGE",
            )
        from tafkir.recipe.rlhf import JudgeConfig
        from tafkir.tasks.judge import JudgeEndpoint

        # an evaluation asks as often as it must: the budget is that of the evaluation itself
        config = JudgeConfig(
            url=url, model=model, api_key_env=_chosen.judge_key_env, max_tokens=max_tokens, max_calls=10**9
        )
        _open[name] = JudgeEndpoint(config, _chosen.judge_cache)
    return cast("JudgeEndpoint", _open[name])


def open_sandbox(
    tier: Tier = "bwrap",
    *,
    unsafe: bool = False,
    url: str = "",
    limits: Limits | None = None,
    packages: Sequence[str] = (),
) -> ProgramRunner:
    """The runner of a tier; nothing falls back to a weaker one by itself.

    Args:
        unsafe: the user's word that "rlimit" may run what a model writes with their own rights.
        url: of the SandboxFusion server; $TAFKIR_SANDBOX_URL when empty.
        packages: what programs may import beside the standard library; of "remote", what its server has counts.

    Raises:
        TafkirError: "rlimit" without `unsafe`, or "remote" without an address.
        BackendUnavailable: the tier does not work here.
    """
    limits = limits or Limits()
    if tier not in get_args(Tier):
        raise TafkirError(f"there is no sandbox {tier!r}", where="sandbox", expected="bwrap, rlimit or remote")
    if tier == "rlimit" and not unsafe:
        raise TafkirError(
            "the tier rlimit protects nothing but memory and time: the program could read and delete your files",
            where="sandbox",
            expected="the tier bwrap or remote",
            fix="add --unsafe where that does not matter, such as in a container made for it",
        )
    if tier == "remote":
        from tafkir.tasks.sandbox_remote import RemoteSandbox

        url = url or os.environ.get(URL_VARIABLE, "")
        if not url:
            raise TafkirError(
                "the tier remote needs the address of a SandboxFusion server",
                where="sandbox",
                fix=f"set {URL_VARIABLE}=http://host:8080",
            )
        return RemoteSandbox(url, limits)
    return Sandbox(tier, limits, packages=packages)
