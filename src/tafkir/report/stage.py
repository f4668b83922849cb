"""The `report` stage: collects the run, writes `report.html` and `report.md`."""

from __future__ import annotations

import logging
from typing import Any

from tafkir.recipe.stage import StageContext
from tafkir.report.collect import collect
from tafkir.report.findings import headline
from tafkir.report.markdown import render_markdown
from tafkir.report.render import render_html
from tafkir.runlog.atomic import write_text
from tafkir.runlog.rundir import RunDir

__all__ = ["run_report", "write_report"]

_logger = logging.getLogger(__name__)


def run_report(ctx: StageContext) -> dict[str, Any]:
    """The stage: see `write_report`."""
    config = ctx.recipe.report
    return write_report(ctx.run, config.sample_chains) if config else write_report(ctx.run)


def write_report(run: RunDir, num_chains: int = 10) -> dict[str, Any]:
    """Write the report of a run, finished or not. Its recipe is shown as it stands, whatever version wrote it.

    Args:
        num_chains: sample chains to show.

    Returns:
        The headline, the sizes of the two files in bytes, and what the page could not show.

    Raises:
        RunDirError: the run directory is not writable.
    """
    record = collect(run, num_chains=num_chains)
    page, text = render_html(record), render_markdown(record)
    write_text(run.report_html, page)
    write_text(run.report_md, text)
    sentence = headline(record).sentence
    _logger.info("%s", sentence)
    return {
        "headline": sentence,
        "html_bytes": len(page.encode("utf-8")),
        "markdown_bytes": len(text.encode("utf-8")),
        "notes": list(record.notes),
    }
