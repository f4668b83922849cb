"""What a recursive model solves: whole grids and cells, after N_sup steps and where its halting head says solved."""

from __future__ import annotations

from typing import Any

import numpy as np

from tafkir.data.puzzles.sets import PuzzleSet
from tafkir.intervals import accuracy
from tafkir.models.trm import Trm
from tafkir.train.replicas import OneReplica, Replicas, solve_together

__all__ = ["score_puzzles"]


def score_puzzles(
    model: Trm,
    puzzles: PuzzleSet,
    *,
    halt_threshold: float = 0.0,
    batch_size: int = 256,
    replicas: Replicas | None = None,
) -> dict[str, Any]:
    """Scores as `result.json` holds them.

    Args:
        replicas: the processes that solve them together.

    Returns:
        `exact`: share of whole grids right after N_sup steps, with Wilson's interval; `cells`: share of cells;
        `by_step`: share of grids right after each step; `surest`: of the answers at the step of the highest q, after
        all steps, with its interval; `halting`: the same of answers taken at the first step with q
        above the threshold, the mean number of steps, how many puzzles halt after each, and how many never do.
    """
    solved = solve_together(
        replicas or OneReplica(), model, puzzles.inputs, puzzle_ids=puzzles.puzzle_ids, batch_size=batch_size
    )
    right = solved.right(puzzles.labels)
    exact = np.all(right, axis=-1)
    halts = solved.halts(halt_threshold)
    steps = len(exact)
    numbers = np.arange(len(puzzles))
    return {
        "puzzles": len(puzzles),
        "exact": accuracy(exact[-1].tolist()).to_dict(),
        "cells": float(right[-1].mean()),
        "by_step": [float(share) for share in exact.mean(1)],
        "surest": accuracy(exact[solved.surest(), numbers].tolist()).to_dict(),
        "halting": {
            "threshold": halt_threshold,
            "exact": accuracy(exact[halts, numbers].tolist()).to_dict(),
            "mean_steps": float(halts.mean() + 1),
            "histogram": np.bincount(halts, minlength=steps).tolist(),
            "never": int((solved.q_halt <= halt_threshold).all(0).sum()),
        },
    }
