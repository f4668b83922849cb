"""Pass-rate filtering: how often the first policy solves each problem of a pool, and which of them stay."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from tafkir.data.loader import EpochOrder
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import DataError
from tafkir.protocols import Completer, Task
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.tasks import PassRateConfig
from tafkir.records import Example, SamplingParams
from tafkir.runlog.atomic import read_json, write_text
from tafkir.train.rollout import collect_rollouts

__all__ = ["KeptPrompts", "measure_pass_rates"]

FILE_NAME = "pass_rates.json"
_BATCH = 64

_logger = logging.getLogger(__name__)

Prompted = tuple[Example, Sequence[int]]


def measure_pass_rates(
    completer: Completer,
    tokenizer: Tokenizer,
    task: Task,
    prompts: Sequence[Prompted],
    *,
    samples: int,
    params: SamplingParams,
    seed: int,
) -> list[float]:
    """The share of correct completions of each problem, among `samples` of the completer's policy as it is."""
    rates: list[float] = []
    for start in range(0, len(prompts), _BATCH):
        groups = collect_rollouts(
            completer,
            tokenizer,
            task,
            prompts[start : start + _BATCH],
            group_size=samples,
            params=params,
            seed=derive_seed(seed, "pass_rate", start),
        )
        rates += [sum(r.verdict.correct for r in group.rollouts) / samples for group in groups]
    return rates


class KeptPrompts:
    """The problems of a pool whose pass rate is inside the band, in epochs, each in an order of its own.

    Args:
        at: the problem at a position; the pool is positions 0 to `config.pool` - 1.
        measure: the pass rates of problems; called once, and what it says is kept in `folder`.
        folder: the stage's directory.
        per_step: problems a step.

    Raises:
        DataError: no problem stays.
    """

    def __init__(
        self,
        at: Callable[[int], Prompted],
        measure: Callable[[Sequence[Prompted]], list[float]],
        config: PassRateConfig,
        folder: Path,
        *,
        per_step: int,
        seed: int,
    ) -> None:
        self.at, self.per_step = at, per_step
        path = folder / FILE_NAME
        if not path.exists():
            rates = measure([at(position) for position in range(config.pool)])
            write_text(path, json.dumps({"pass_rates": rates}) + "\n")
        rates = list(map(float, read_json(path)["pass_rates"]))
        self.kept = [position for position, rate in enumerate(rates) if config.low <= rate <= config.high]
        if not self.kept:
            never, always = sum(rate == 0 for rate in rates), sum(rate == 1 for rate in rates)
            raise DataError(
                f"no problem is left: of {len(rates)}, {never} are never solved and {always} always",
                where="rlvr.pass_rate",
                expected=f"problems with a pass rate of {config.low:g} to {config.high:g}",
                fix="choose other levels of difficulty, or widen the band",
            )
        _logger.info(
            "%d of %d problems stay, with pass rates of %g to %g", len(self.kept), len(rates), config.low, config.high
        )
        self._order = EpochOrder(len(self.kept), derive_seed(seed, "kept"))

    def batch_at(self, step: int) -> list[Prompted]:
        """The problems of a step, counted from 0, each with the tokens of its prompt."""
        first = step * self.per_step
        return [self.at(self.kept[self._order[position]]) for position in range(first, first + self.per_step)]
