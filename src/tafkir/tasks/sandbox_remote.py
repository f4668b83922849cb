"""The remote tier: programs run on a SandboxFusion server (`POST /run_code`), with the same runner as here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx

from tafkir.tasks.sandbox import Limits, ProgramResult, Tier, build_request, read_results
from tafkir.tasks.sandbox_server import RUNNER, START_LIMIT_S, Ran

__all__ = ["RemoteSandbox"]


class RemoteSandbox:
    """A SandboxFusion server, or what speaks as one. How well it isolates is its operator's word.

    Args:
        url: its address, without `/run_code`.
        limits: of one program.
        transport: what carries HTTP, for tests.
    """

    tier: Tier = "remote"

    def __init__(self, url: str, limits: Limits | None = None, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url, self.limits = url.rstrip("/"), limits or Limits()
        self._client = httpx.Client(base_url=self.url, transport=transport)

    def run(
        self, program: str, entry: str, calls: Sequence[tuple[Any, ...]], limits: Limits | None = None
    ) -> ProgramResult:
        """See `ProgramRunner`. A server that fails or answers nonsense is a "sandbox" result, never a wrong program."""
        limits = limits or self.limits
        clock_s = 3 * limits.timeout_s
        body = {
            "code": RUNNER.read_text("utf-8"),
            "language": "python",
            "stdin": json.dumps(build_request(program, entry, calls, limits)),
            "run_timeout": clock_s,
        }
        try:
            response = self._client.post("/run_code", json=body, timeout=clock_s + START_LIMIT_S)
            response.raise_for_status()
            answer = response.json()
            if answer["status"] == "SandboxError":
                return ProgramResult("sandbox", f"the sandbox server failed: {str(answer.get('message'))[:200]}")
            done = answer["run_result"]
            output = (done["stdout"] or "").encode("utf-8", "replace")
            status = done.get("return_code")
            late = done["status"] == "TimeLimitExceeded"
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
            return ProgramResult("sandbox", f"{self.url}: {type(error).__name__}: {error}"[:300])
        if len(output) > limits.output_bytes:
            output = output[: limits.output_bytes]
            return read_results(Ran(output, status, "output"), len(calls), limits)
        return read_results(Ran(output, status, "time" if late else ""), len(calls), limits)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteSandbox, (self.url, self.limits)
