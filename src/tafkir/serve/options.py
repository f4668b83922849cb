"""How the server treats those who call it: who may, how often, how much, how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tafkir.errors import RecipeError

__all__ = ["ServerOptions", "read_api_keys"]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits of one server. Times are seconds.

    Attributes:
        api_keys: what `Authorization: Bearer` must bring; without any, everyone who reaches the port may ask.
        requests_per_minute: most requests of one key (of one address where there are no keys); 0 sets no limit.
        max_body_bytes: largest body of a request.
        body_timeout_s: longest time from a connection's first byte to the end of the head, and again of the body.
        request_timeout_s: longest time to answer; what runs longer is cancelled. 0 sets no limit.
        drain_s: longest time that running requests get to finish once the server is told to stop.
        cors_origins: origins whose pages may call the server; none by default.
        admin_key: opens the endpoints that change the server (`serve.admin`), which without one do not exist.
        admin_remote: open them to other machines than this one, too.
        otlp_traces_endpoint: where OpenTelemetry traces are sent; None sends none.
    """

    api_keys: tuple[str, ...] = ()
    requests_per_minute: int = 0
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 20.0
    request_timeout_s: float = 0.0
    drain_s: float = 30.0
    cors_origins: tuple[str, ...] = ()
    admin_key: str | None = None
    admin_remote: bool = False
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        for key in (*self.api_keys, *((self.admin_key,) if self.admin_key is not None else ())):
            if not key or not key.isascii() or any(character.isspace() for character in key):
                raise RecipeError(
                    "an API key cannot be sent in a header",
                    where="--admin-key" if key == self.admin_key else "--api-key",
                    expected="ASCII characters without white space",
                )


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        RecipeError: the file cannot be read, or holds no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"the file of API keys cannot be read ({error})", where=str(path)) from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise RecipeError("the file holds no API key", where=str(path), expected="one key a line")
    return keys
