"""`tafkir trm export`: a recursive model as a folder of ONNX graphs, held against torch before it gets its name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tafkir.checkpoint.save import write_folder
from tafkir.checkpoint.trm import TrmCheckpoint
from tafkir.export.check import Parity, check_parity, require_onnx
from tafkir.export.weights import WeightFormat

__all__ = ["INFO_FILE", "OnnxFiles", "export_trm", "make_files"]

INFO_FILE = "model.json"


@dataclass(frozen=True, slots=True)
class OnnxFiles:
    """An exported model.

    Attributes:
        files: content of step.onnx and solve.onnx by name.
        info: what a host has to know, see `export_trm`.
        parity: how close the graphs are to torch.
    """

    files: dict[str, bytes]
    info: dict[str, Any]
    parity: Parity


def make_files(checkpoint: TrmCheckpoint, weights: WeightFormat = "float32") -> OnnxFiles:
    """Both graphs of a model in memory, checked against torch.

    Raises:
        BackendUnavailable: onnx or onnxruntime is missing.
        CheckpointError: a graph does not equal torch.
    """
    require_onnx()
    from tafkir.export.trm_graph import build_solve, build_step, with_format

    model = checkpoint.model
    built = {"step.onnx": build_step(model, weights), "solve.onnx": build_solve(model, weights)}
    files = {name: graph.SerializeToString(deterministic=True) for name, graph in built.items()}
    parity = check_parity(with_format(model, weights), checkpoint.puzzles, files, str(checkpoint.path))
    return OnnxFiles(files, _describe(checkpoint, weights, files, parity), parity)


def export_trm(checkpoint: TrmCheckpoint, out: Path | str, weights: WeightFormat = "float32") -> OnnxFiles:
    """Write step.onnx, solve.onnx and model.json to a folder that appears under its name only when all is well.

    model.json says what a host has to know: symbols and size of the puzzles, N_sup, the vectors that y and z begin with
    at every position, how logits become confidence, and what was checked.

    Raises:
        BackendUnavailable: onnx or onnxruntime is missing.
        CheckpointError: a graph does not equal torch, or the place is not writable.
    """
    made = make_files(checkpoint, weights)
    with write_folder(Path(out)) as staging:
        for name, content in made.files.items():
            (staging / name).write_bytes(content)
        text = json.dumps(made.info, indent=1, ensure_ascii=False)
        (staging / INFO_FILE).write_text(text + "\n", encoding="utf-8")
    return made


def _describe(
    checkpoint: TrmCheckpoint, weights: WeightFormat, files: dict[str, bytes], parity: Parity
) -> dict[str, Any]:
    model, shape = checkpoint.model, checkpoint.model.shape
    lineage = checkpoint.manifest.lineage if checkpoint.manifest else {}
    return {
        "format": "tafkir-trm-onnx",
        "version": 1,
        "puzzles": checkpoint.puzzles.model_dump(mode="json"),
        "weights": weights,
        "parameters": shape.num_parameters(),
        "max_supervision_steps": shape.max_supervision_steps,
        "num_recursions": shape.num_recursions,
        "num_latent_steps": shape.num_latent_steps,
        "positions": shape.num_positions,
        "hidden_size": shape.hidden_size,
        "y_init": model.y_init.tolist(),
        "z_init": model.z_init.tolist(),
        "confidence": lineage.get("loss", "stable_max"),
        "made_from": lineage,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
        "parity": parity.to_dict(),
    }
