"""`tafkir trm page`: one HTML file with onnxruntime-web and models in it, which works offline, also from a disk.

Everything large is gzipped and written as base64, so that the file needs no server and stays small.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafkir.checkpoint.save import write_folder
from tafkir.checkpoint.trm import TrmCheckpoint
from tafkir.errors import RequestError
from tafkir.export.onnx_files import OnnxFiles, make_files
from tafkir.export.weights import WeightFormat

__all__ = ["MAX_PAGE_BYTES", "Page", "build_page", "page_source", "page_style", "runtime_source"]

MAX_PAGE_BYTES = 15_000_000

_HERE = Path(__file__).resolve().parent
_KINDS = ("sudoku", "maze")
_SCRIPTS = ("words.js", "board.js", "rules.js", "think.js", "page.js")
# What a browser does not need to know about a model.
_LEFT_OUT = ("files", "parity", "format", "version")


@dataclass(frozen=True, slots=True)
class Page:
    """A page that was written.

    Attributes:
        path: the HTML file.
        size_bytes: of that file.
        models: name of each model in it, and its ONNX file's bytes.
    """

    path: Path
    size_bytes: int
    models: dict[str, int]


def build_page(checkpoints: Sequence[TrmCheckpoint], out: Path | str, weights: WeightFormat = "float16") -> Page:
    """Write `<out>/index.html`; the folder appears under its name only when the page is whole.

    Args:
        checkpoints: solvers of Sudoku or mazes, one for each size; the first is shown first.
        weights: how their matrices stand in the page.

    Raises:
        BackendUnavailable: onnx or onnxruntime is missing.
        CheckpointError: a graph does not equal torch, or the place is not writable.
        RequestError: no checkpoint is given, two are for one kind and size, the page cannot draw a kind of puzzle, or
            it would be larger than `MAX_PAGE_BYTES`.
    """
    _check(checkpoints)
    made = {checkpoint.path.name: make_files(checkpoint, weights) for checkpoint in checkpoints}
    html = _assemble(made)
    size = len(html.encode())
    if size > MAX_PAGE_BYTES:
        raise RequestError(
            f"the page would have {size / 1e6:.1f} MB",
            expected=f"at most {MAX_PAGE_BYTES / 1e6:.0f} MB",
            fix="take fewer or smaller models, or --weights int8",
        )
    path = Path(out)
    with write_folder(path) as staging:
        (staging / "index.html").write_text(html, encoding="utf-8")
    return Page(path / "index.html", size, {name: len(files.files["step.onnx"]) for name, files in made.items()})


def page_source(name: str) -> str:
    """The text of one of the page's sources, such as `board.js`."""
    return (_HERE / "web" / name).read_text(encoding="utf-8")


def page_style() -> str:
    """The page's style sheets: the look that all pages share, and its own."""
    return (_HERE.parent / "look.css").read_text(encoding="utf-8") + page_source("page.css")


def runtime_source() -> dict[str, Any]:
    """Which onnxruntime-web is bundled: name, version, licence, and hashes of its files."""
    source: dict[str, Any] = json.loads((_HERE / "runtime" / "source.json").read_text(encoding="utf-8"))
    return source


def _check(checkpoints: Sequence[TrmCheckpoint]) -> None:
    if not checkpoints:
        raise RequestError("no checkpoint for the page", expected="at least one", fix="name a run directory of tafkir")
    seen: dict[tuple[str, int, int], Path] = {}
    for checkpoint in checkpoints:
        puzzles = checkpoint.puzzles
        if puzzles.kind not in _KINDS:
            raise RequestError(
                f"the page cannot draw {puzzles.kind}", where=str(checkpoint.path), expected=" or ".join(_KINDS)
            )
        size = (puzzles.kind, puzzles.rows, puzzles.columns)
        if size in seen:
            raise RequestError(
                f"{seen[size]} solves {puzzles.kind} of {puzzles.rows} x {puzzles.columns}, too",
                where=str(checkpoint.path),
                fix="name one of them",
            )
        seen[size] = checkpoint.path


def _assemble(made: Mapping[str, OnnxFiles]) -> str:
    described = [
        {key: value for key, value in files.info.items() if key not in _LEFT_OUT}
        | {"name": name, "bytes": len(files.files["step.onnx"])}
        for name, files in made.items()
    ]
    runtime = _HERE / "runtime"
    parts = [_part("models", "application/json", json.dumps(described, ensure_ascii=False))]
    parts += [_part(f"model-{name}", "text/plain", _pack(files.files["step.onnx"])) for name, files in made.items()]
    for id, file in (("runtime-js", "ort.wasm.bundle.min.mjs.gz"), ("runtime-wasm", "ort-wasm-simd-threaded.wasm.gz")):
        parts.append(_part(id, "text/plain", base64.b64encode((runtime / file).read_bytes()).decode()))
    scripts = "\n".join(page_source(name) for name in _SCRIPTS)
    html = page_source("index.html").replace("/*CSS*/", page_style())
    return html.replace("/*JS*/", _inert(scripts)).replace("<!--PARTS-->", "\n".join(parts))


def _part(id: str, kind: str, content: str) -> str:
    return f'<script type="{kind}" id="{id}">{_inert(content)}</script>'


def _inert(text: str) -> str:
    """What cannot end the element that it stands in."""
    return text.replace("</", "<\\/")


def _pack(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()
