"""What stands beside the weights of a quantized checkpoint: index, configs, manifest, tokenizer. Without torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tafkir.checkpoint.files import INDEX_FILE, SINGLE_FILE, StoredFiles, read_json
from tafkir.checkpoint.header import MANIFEST_DTYPES
from tafkir.checkpoint.manifest import MANIFEST_NAME, Manifest, TensorEntry
from tafkir.errors import CheckpointError
from tafkir.quant.layouts import compressed_tensors_config, gpt_oss_config, modelopt_configs
from tafkir.quant.plan import QuantizePlan
from tafkir.quant.shards import JOURNAL
from tafkir.recipe.hf_config import config_from_hf
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.runlog.atomic import write_json

__all__ = ["write_sidecars"]

QUANT_CONFIG_FILE = "hf_quant_config.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".pkl")


def write_sidecars(
    staging: Path,
    files: StoredFiles,
    plan: QuantizePlan,
    config: QuantizeConfig,
    hf_config: Mapping[str, Any],
    lineage: dict[str, Any],
) -> None:
    """Index, configs, manifest, and whatever else is in the source's folder."""
    source = files.listing.parent
    for file in sorted(source.iterdir()):
        own = file.name in (INDEX_FILE, SINGLE_FILE, MANIFEST_NAME, "config.json", QUANT_CONFIG_FILE)
        if file.is_file() and not own and not file.name.startswith(".") and file.suffix not in _NOT_COPIED:
            shutil.copyfile(file, staging / file.name)
    if len(plan.shards) > 1:
        names = {piece.name: file for file, pieces in plan.shards.items() for piece in pieces}
        index = {"metadata": {"total_size": plan.output_bytes}, "weight_map": dict(sorted(names.items()))}
        write_json(staging / INDEX_FILE, index)
    if config.layout == "modelopt":
        nested, quantization = modelopt_configs(plan.decisions, config)
        write_json(staging / QUANT_CONFIG_FILE, nested)
    elif config.layout == "gpt-oss":
        quantization = gpt_oss_config(plan.decisions)
    else:
        quantization = compressed_tensors_config(plan.decisions, config)
    plain = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    write_json(staging / "config.json", {**plain, "quantization_config": quantization})
    _write_manifest(staging, files, plan, config, plain, lineage)


def _write_manifest(
    staging: Path,
    files: StoredFiles,
    plan: QuantizePlan,
    config: QuantizeConfig,
    hf_config: Mapping[str, Any],
    lineage: dict[str, Any],
) -> None:
    """The manifest, for the architectures whose parameters we can count."""
    try:
        shape = config_from_hf(dict(hf_config), str(staging / "config.json"))
    except CheckpointError:
        return
    finished = read_json(staging / JOURNAL)["finished"]
    entries = {
        piece.name: TensorEntry(dtype=MANIFEST_DTYPES[piece.dtype], shape=piece.shape, sha256=hashes[piece.name])
        for file, hashes in finished.items()
        for piece in plan.shards[file]
    }
    parent = files.manifest.lineage if files.manifest else {}
    lineage = {**parent, **lineage, "quantized_from": files.listing.parent.name, "quantize": config.model_dump()}
    manifest = Manifest(
        architecture=(hf_config.get("architectures") or ["unknown"])[0],
        num_parameters=shape.num_parameters(),
        num_active_parameters=shape.num_parameters(active=True),
        lineage=lineage,
        tensors=dict(sorted(entries.items())),
    )
    write_json(staging / MANIFEST_NAME, manifest.model_dump(mode="json"))
