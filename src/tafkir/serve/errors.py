"""Errors in the shape that OpenAI's clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tafkir.errors import CapacityError, RequestError, TafkirError
from tafkir.serve.worker import Overloaded, Stopped

__all__ = [
    "ApiError",
    "error_body",
    "error_of",
    "error_response",
    "install_error_handlers",
]

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: the HTTP status.
        message: one sentence for a person.
        param: the field of the request that is at fault.
        code: a word for a program.
        retry_after_s: when to try again; answers of 429 and 503 say so in whole seconds, 1 at least.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 1.0,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s
        super().__init__(message)


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON of an error, as OpenAI's API has it."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_of(error: Exception) -> ApiError:
    """The answer to an exception; what is not the client's fault is a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | CapacityError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, Overloaded):
        message = f"the server is busy: {error}; try again soon"
        return ApiError(503, message, code="overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, Stopped):
        return ApiError(503, str(error), code="stopped")
    if isinstance(error, TafkirError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def _validation_error(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    context = first.get("ctx") or {}
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {context.get('error', first['msg'])}", code="invalid_json")
    param = context.get("param") or (".".join(place) or None)
    known = first["type"] in ("unsupported_parameter", "unknown_parameter")
    message = first["msg"] if known or "param" in context else f"{param or 'body'}: {first['msg']}"
    return ApiError(400, message, param=param, code=first["type"] if known else "invalid_value")


def error_response(error: ApiError) -> JSONResponse:
    """The error as an answer; one to a request that did not come whole closes the connection."""
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.code in ("request_timeout", "request_too_large"):
        headers["Connection"] = "close"
    return JSONResponse(error_body(error), error.status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the app, also an unknown path, come in OpenAI's shape."""

    def on_error(_: Request, error: Exception) -> JSONResponse:
        return error_response(error_of(error))

    def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_validation_error(error))

    def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # FastAPI's answer to what its JSON parser cannot take
            return error_response(ApiError(400, "the body cannot be read as JSON in UTF-8", code="invalid_json"))
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = "not_found" if error.status_code == 404 else None
        response = error_response(ApiError(error.status_code, message, code=code))
        response.headers.update(error.headers or {})
        return response

    for kind in (ApiError, TafkirError, Overloaded, Stopped):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)
