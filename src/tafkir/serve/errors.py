"""Errors in the shape that OpenAI's clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tafkir.errors import CapacityError, RequestError, TafkirError
from tafkir.serve.worker import Overloaded, Stopped

__all__ = ["ApiError", "error_body", "error_of", "install_error_handlers"]


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: the HTTP status.
        message: one sentence for a person.
        param: the field of the request that is at fault.
        code: a word for a program.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        super().__init__(message)


def error_body(error: ApiError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_of(error: Exception) -> ApiError:
    """The answer to an exception; what is not the client's fault is a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | CapacityError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, Overloaded):
        return ApiError(503, f"the server is busy: {error}; try again soon", code="overloaded")
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


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the app, also an unknown path, come in OpenAI's shape."""

    def respond(error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error_body(error), error.status, headers)

    def on_error(_: Request, error: Exception) -> JSONResponse:
        return respond(error_of(error))

    def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return respond(_validation_error(error))

    def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return respond(ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None))

    for kind in (ApiError, TafkirError, Overloaded, Stopped):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)
