"""`tafkir verify`: what quantizing has done to a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["verify"]


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every weight.")] = False,
) -> None:
    """Compare every weight of a quantized checkpoint with its source, and show what was lost and what was saved.

    \b
    tafkir verify ./DeepSeek-R1-0528 ./R1-NVFP4            every weight, one at a time
    tafkir verify base-tiny ./out --logits                 and the models' answers on text

    \b
    rel. MSE     squared error over squared weights; NVFP4 loses 0.9 % of Gaussian ones by block maxima
    cosine       between a weight before and after, as vectors
    saturated    share of weights beyond the largest value that their block can hold
    underflow    share of weights that were not zero and are now
    KL           of the next token's distribution, in nats; perplexity on the same text beside it
    """
    from tafkir.cli.completer import checkpoint_of
    from tafkir.quant.verify import audit_checkpoint, compare_logits, summarize_audit

    before, after = checkpoint_of(source), checkpoint_of(quantized)
    audits = audit_checkpoint(before, after)
    summary: dict[str, Any] = summarize_audit(audits)
    if logits:
        summary["logits"] = dict(compare_logits(before, after, _documents(before, text, max_tokens)))
    if as_json:
        print(json.dumps({**summary, "tensors": [asdict(audit) for audit in audits]}, indent=2))
        return
    _show(summary)


def _documents(source: Path, text: Path | None, max_tokens: int) -> list[list[int]]:
    """Token ids of a file's text in windows of 512, or of made-up word problems."""
    from tafkir.data.chat import encode_document
    from tafkir.data.stories import make_story
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.errors import DataError

    tokenizer = Tokenizer.load(source)
    if text is not None:
        try:
            ids = tokenizer.encode(text.read_text(encoding="utf-8"), allow_special=False)[:max_tokens]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the text ({error})", where=str(text)) from error
        return [ids[start : start + 512] for start in range(0, len(ids), 512)]
    documents: list[list[int]] = []
    while sum(map(len, documents)) < max_tokens:
        documents.append(encode_document(tokenizer, make_story(10**9 + len(documents)))[0])
    return documents


def _show(summary: dict[str, Any]) -> None:
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
