"""What schemathesis cannot know of the API: a request that fits every rule of form may be refused for what it asks.

`SCHEMATHESIS_HOOKS=tests.serve.schemathesis_hooks schemathesis run URL/openapi.json --checks all
--exclude-checks positive_data_acceptance`
"""

from __future__ import annotations

import schemathesis
from schemathesis.openapi.checks import RejectedPositiveData

CODES = {"context_length_exceeded", "invalid_grammar", "unsatisfiable"}


@schemathesis.check
def what_fits_is_accepted(ctx, response, case):  # type: ignore[no-untyped-def]
    """The built-in `positive_data_acceptance`, but for the refusals that the text of status 400 names."""
    if (
        case.meta is None
        or not case.meta.generation.mode.is_positive
        or response.status_code < 400
        or response.status_code == 404
    ):
        return
    error = response.json().get("error", {})
    named_tool = error.get("param") == "tool_choice" and "names no tool" in error["message"]
    too_many = "sequences at once" in error.get("message", "")
    if error.get("code") not in CODES and not named_tool and not too_many:
        raise RejectedPositiveData(
            operation=case.operation.label,
            message=f"valid data was refused: {error}",
            status_code=response.status_code,
            allowed_statuses=["2xx"],
        )
