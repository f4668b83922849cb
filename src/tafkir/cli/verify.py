"""`tafkir verify`: what quantizing has done to a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tafkir.quant.texts import Passage

__all__ = ["EXIT_BELOW", "verify"]

EXIT_BELOW = 3
"""Exit code where a task keeps less than it has to; 1 and 2 are errors."""

# Problems that no stage draws, and no calibration.
_FIRST_STORY = 10**9


def verify(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The checkpoint that was quantized.")],
    quantized: Annotated[str, typer.Argument(metavar="DST", help="What was made of it, by whatever tool.")],
    logits: Annotated[
        bool, typer.Option("--logits", help="Run both on text, and compare their predictions of the next token.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text to run on; word problems if left out.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="Tokens of text in all.")] = 4096,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="Score both on held-out problems: wordmath, gsm8k, svamp, countdown, sudoku:1-2, ..., or a .jsonl "
            "file; repeatable.",
        ),
    ] = None,
    min_retention: Annotated[
        float, typer.Option("--min-retention", min=0, max=100, metavar="PERCENT", help="Share of a score to be kept.")
    ] = 98.0,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Sampled answers a problem; 0: greedy alone.")] = 4,
    problems: Annotated[int, typer.Option("--problems", min=0, help="Of each source or level; 0 takes all.")] = 0,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, help="Length limit of an answer.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the samples, the same for both.")] = 0,
    exact_activations: Annotated[
        bool,
        typer.Option("--exact-activations", help="Leave inputs of NVFP4 matrices in float32, as weight-only engines."),
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the page with all plots.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run directory of --task.")] = None,
    runs_dir: Annotated[Path, typer.Option(envvar="TAFKIR_RUNS_DIR", help="Where run directories are made.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every weight.")] = False,
) -> None:
    """Compare a quantized checkpoint with its source: every weight, predictions, and what it still solves.

    \b
    tafkir verify ./DeepSeek-R1-0528 ./R1-NVFP4            every weight, one at a time
    tafkir verify base-tiny ./out --logits                 and the models' predictions on text
    tafkir verify base-tiny ./out --task wordmath --html report.html      and scores before and after

    \b
    rel. MSE     squared error over squared weights; NVFP4 loses 0.9 % of Gaussian ones by block maxima
    cosine       between a weight before and after, as vectors
    saturated    share of weights beyond the largest value that their block can hold
    underflow    share of weights that were not zero and are now
    KL           of the next token's distribution, in nats; perplexity on the same text beside it
    kept         the score after, over the score before, on the same problems and seeds, with a 95 % interval

    A task counts as kept where the whole interval is above --min-retention. Where the score itself is below, the
    command ends with code 3. Killed, the same command goes on with the answers that it has.
    """
    from tafkir.cli.completer import checkpoint_of
    from tafkir.quant.verify import audit_cache, audit_checkpoint, compare_logits, summarize_audit

    before, after = checkpoint_of(source), checkpoint_of(quantized)
    audits = audit_checkpoint(before, after)
    summary: dict[str, Any] = {"source": source, "quantized": quantized, **summarize_audit(audits)}
    summary["cache"] = audit_cache(after)
    if logits or task:
        passages = _passages(before, text, max_tokens)
        summary["logits"] = compare_logits(before, after, passages, served=not exact_activations)
    if task:
        given = {"samples": samples, "max_tokens": answer_tokens, "max_problems": problems, "seed": seed}
        run = runs_dir / (name or f"verify-{after.resolve().name}")
        limit = min_retention / 100
        summary["retention"] = _retention(task, before, after, run, not exact_activations, limit, given)
    _tell(summary, [asdict(audit) for audit in audits], html, as_json)
    if task and summary["retention"]["verdict"] == "below":
        raise typer.Exit(EXIT_BELOW)


def _tell(summary: dict[str, Any], tensors: list[dict[str, Any]], html: Path | None, as_json: bool) -> None:
    """The page where it is asked for, and JSON or text on stdout."""
    if html:
        from tafkir.report.quantized import render_verification
        from tafkir.runlog.atomic import write_text

        write_text(html, render_verification({**summary, "tensors": tensors}))
    if as_json:
        print(json.dumps({**summary, "tensors": tensors}, indent=2))
    else:
        _show(summary, html)


def _retention(
    tasks: list[str], before: Path, after: Path, run: Path, served: bool, limit: float, given: dict[str, Any]
) -> dict[str, Any]:
    from tafkir.cli.retention import measure_tasks
    from tafkir.eval.retention import RetentionSettings

    settings = RetentionSettings(min_retention=limit, **given)
    return measure_tasks(tasks, before, after, settings, run, served=served)


def _passages(source: Path, text: Path | None, max_tokens: int) -> list[Passage]:
    """A file's text in windows of 512 tokens, or made-up word problems, of which the solutions count."""
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.errors import DataError
    from tafkir.quant.texts import Passage, familiar_problems

    if text is None:
        return familiar_problems(source, max_tokens, _FIRST_STORY)
    try:
        ids = Tokenizer.load(source).encode(text.read_text(encoding="utf-8"), allow_special=False)[:max_tokens]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text ({error})", where=str(text)) from error
    return [Passage.whole(ids[start : start + 512]) for start in range(0, len(ids), 512)]


def _show(summary: dict[str, Any], html: Path | None) -> None:
    head = ("part", "format", "weights", "ratio", "rel. MSE", "worst", "cosine", "saturated", "underflow")
    cells = [
        (
            *(row["component"], row["format"], f"{row['parameters']:,}", f"{row['ratio']:.2f}"),
            *(f"{row['relative_mse']:.2e}", f"{row['worst_relative_mse']:.2e}", f"{row['cosine']:.6f}"),
            *(f"{row['saturated']:.3%}", f"{row['underflowed']:.3%}"),
        )
        for row in summary["parts"]
    ]
    widths = [max(len(cell[i]) for cell in (head, *cells)) for i in range(len(head))]
    for cell in (head, *cells):
        left = "  ".join(f"{cell[i]:<{widths[i]}}" for i in range(2))
        print(left + "  " + "  ".join(f"{cell[i]:>{widths[i]}}" for i in range(2, len(head))))
    if (cache := summary["cache"])["format"] != "none":
        said = (
            ", ".join(
                f"{part} {low:.3g} to {high:.3g}" for part in ("k_scale", "v_scale") for low, high in [cache[part]]
            )
            if cache["layers"]
            else "scales of one"
        )
        print(f"cache in {cache['format']}: {said}")
    print(f"{summary['ratio']:.2f} times smaller: {summary['source_bytes']:,} to {summary['output_bytes']:,} bytes")
    for tensor in summary["worst"]:
        place, error = tensor["worst_blocks"][0] if tensor["worst_blocks"] else (0, 0.0)
        where = f", block at {place:,} loses {error:.1%}" if tensor["worst_blocks"] else ""
        print(f"  {tensor['relative_mse']:.2e}  {tensor['name']} ({tensor['format']}){where}")
    if "logits" in summary:
        found = summary["logits"]
        print(
            f"{found['tokens']:,} tokens: KL {found['kl_mean']:.4f} (at most {found['kl_max']:.3f}), perplexity "
            f"{found['perplexity_source']:.3f} to {found['perplexity_quantized']:.3f}, the same likeliest token in "
            f"{found['top1_agreement']:.1%}"
        )
    if "retention" in summary:
        from tafkir.cli.retention import retention_lines

        print("\n".join(retention_lines(summary["retention"])))
        print(f"Answers: {summary['retention']['run']}/eval")
    if html:
        print(f"Page: {html}")
