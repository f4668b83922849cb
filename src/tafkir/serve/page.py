"""The chat page at `/` and the files it is made of, which may talk to this server and to nobody else."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

__all__ = ["PAGE_FILES", "add_page"]

PAGE_FILES = "/web/"

# What a model writes reaches the page's DOM through DOMPurify alone: the browser refuses any other string as HTML.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
# Asked again each time, answered by 304 where nothing is new: a page of one version never meets a script of another.
_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files under `PAGE_FILES`."""
    folder = Path(str(resources.files("tafkir.serve") / "web"))

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(folder / "index.html", headers={**_HEADERS, "Content-Security-Policy": _POLICY})

    @app.get(f"{PAGE_FILES}look.css", include_in_schema=False)
    def look() -> FileResponse:
        return FileResponse(str(resources.files("tafkir") / "look.css"), headers=_HEADERS)

    app.mount(PAGE_FILES.rstrip("/"), _Files(directory=folder), name="page")
