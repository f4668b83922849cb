"""`tafkir convert` and `tafkir export`: a checkpoint, or results of an evaluation, as another tool's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tafkir.cli.quantize_options import Layout

__all__ = ["app", "convert"]

app = typer.Typer(help="Write a checkpoint, or results, as the files of another program.", no_args_is_help=True)


class Cast(StrEnum):
    """`quant.relayout.relayout_checkpoint`'s, as a command line names them."""

    NVFP4 = "nvfp4"


class MatrixType(StrEnum):
    """`export.gguf_files.GgufType`."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


_Source = Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder, run directory, or bundled name.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def convert(
    source: _Source,
    out: Annotated[Path, typer.Argument(metavar="DST", help="The new folder; must not be there.")],
    layout: Annotated[Layout, typer.Option("--layout", help="Whose names and config files it gets.")],
    cast: Annotated[
        Cast | None, typer.Option("--cast", help="nvfp4 makes NVFP4 of MXFP4, with the same values.")
    ] = None,
    shard_size: Annotated[float, typer.Option("--shard-size", min=1e-6, metavar="GB", help="Of a file.")] = 5.0,
    as_json: _Json = False,
) -> None:
    """Write a quantized checkpoint in another layout: the same codes and block scales under other names.

    \b
    tafkir convert ./R1-NVFP4 ./R1-NVFP4-ct --layout compressed-tensors
    tafkir convert ./DeepSeek-R1-0528 ./R1-FP8 --layout modelopt          DeepSeek's FP8 blocks
    tafkir convert ./model-MXFP4 ./model-NVFP4 --layout modelopt --cast nvfp4

    Global scales are inverted where the layouts want that, as engines do when they load. What the other layout has no
    place for, or what a cast would lose, is an error. A few megabytes are in memory at a time.
    """
    from tafkir.cli.completer import checkpoint_of
    from tafkir.quant.relayout import relayout_checkpoint

    result = relayout_checkpoint(
        checkpoint_of(source),
        out,
        layout.value,
        cast="nvfp4" if cast else None,
        max_shard_bytes=int(shard_size * 1e9),
    )
    if as_json:
        found = {"path": str(out), "weights": result.weights, "copied": result.copied, "bytes": result.num_bytes}
        print(json.dumps(found, indent=2))
        return
    weights = ", ".join(f"{count:,} in {format}" for format, count in sorted(result.weights.items()))
    print(f"{out}: {weights}, {result.copied:,} tensors as they were; {result.num_bytes / 1e6:,.1f} MB, checked")


@app.command("gguf")
def gguf(
    source: _Source,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The file, such as model.gguf; must not be there.")],
    type: Annotated[
        MatrixType, typer.Option("--type", help="Of matrices; auto keeps 4-bit codes and 16-bit numbers.")
    ] = MatrixType.AUTO,
    as_json: _Json = False,
) -> None:
    """Write a checkpoint as one GGUF file, which llama.cpp and what builds on it open.

    \b
    tafkir export gguf base-tiny base-tiny.gguf
    tafkir quantize ./Qwen3-30B-A3B ./q4 --preset all-linear && tafkir export gguf ./q4 q4.gguf
    llama-cli -m base-tiny.gguf -p 'What is 12 + 30?'

    Qwen3, Qwen3-MoE, Ling and Ring 2.0, DeepSeek-V3 and R1, GLM-4.5; with tokenizer and chat template. MXFP4, and
    NVFP4 of Qwen3, stay bit for bit what they are; FP8 becomes BF16 or what --type says. Weights of multi-token
    prediction stay behind.
    Needs `pip install 'tafkir[serve]'`.
    """
    from tafkir.cli.completer import checkpoint_of
    from tafkir.export.gguf_files import export_gguf

    result = export_gguf(checkpoint_of(source), out, type.value)
    if as_json:
        found = {"path": str(out), "architecture": result.architecture, "bytes": result.num_bytes,
                 "types": result.types, "left_out": result.left_out}  # fmt: skip
        print(json.dumps(found, indent=2))
        return
    types = ", ".join(f"{count:,} {kind}" for kind, count in sorted(result.types.items()))
    left = f"; {result.left_out:,} weights of multi-token prediction stay behind" if result.left_out else ""
    print(f"{out}: {result.architecture}, {result.num_bytes / 1e6:,.1f} MB: {types}{left}")


_Results = Annotated[
    Path, typer.Argument(metavar="RESULTS", help="Results of `tafkir eval --tasks`: a file or folder.")
]
_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that gets them.")]


@app.command("lm-eval")
def lm_eval(results: _Results, folder: _Folder, as_json: _Json = False) -> None:
    """Write results and samples as lm-evaluation-harness does with --log_samples.

    \b
    tafkir export lm-eval results/ lm-eval-out

    One folder a model. All repeats of an item stand in one row, with their mean as its score; failed requests are left
    out, for the format has no word for them. `tafkir compare` reads such folders, these and lm-eval's own.
    """
    from datetime import UTC, datetime

    from tafkir.eval.lm_eval_files import write_lm_eval
    from tafkir.eval.samples import load_samples

    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    _print_written(write_lm_eval(load_samples(results), folder, stamp), as_json)


@app.command("every-eval-ever")
def every_eval_ever(
    results: _Results,
    folder: _Folder,
    organization: Annotated[str, typer.Option(help="Whose evaluation it is; the schema asks for it.")] = "unknown",
    as_json: _Json = False,
) -> None:
    """Write results and samples in the Every Eval Ever schema 0.3.0, as its data store lays them out.

    \b
    tafkir export every-eval-ever results/ eee --organization my-lab

    Scores have their standard error and 95 % interval, clustered by item; failed requests stay, as errors, outside of
    the scores. `tafkir compare` reads such folders, these and others'.
    """
    import time

    from tafkir.eval.every_eval_ever import write_every_eval_ever
    from tafkir.eval.samples import load_samples

    written = write_every_eval_ever(load_samples(results), folder, organization=organization, now=time.time())
    _print_written(written, as_json)


def _print_written(files: Sequence[Path], as_json: bool) -> None:
    print(json.dumps([str(file) for file in files], indent=2) if as_json else "\n".join(map(str, files)))
