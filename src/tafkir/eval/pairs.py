"""Pairs of answers before a judge: Creative Writing v3's ratings of models, and MT-Bench's judge beside people."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from tafkir.errors import DataError
from tafkir.eval.sides import Side
from tafkir.runlog.progress import Progress
from tafkir.tasks.judge import JudgeEndpoint, Ungraded
from tafkir.tasks.published.base import bad_row, read_rows
from tafkir.tasks.published.judged import (
    MalformedJudgementError,
    agreement,
    creative_games,
    creative_pair_prompt,
    mt_pair_prompt,
    read_pair_template,
)
from tafkir.tasks.ratings import Game, Glicko, elo_ratings, rate_glicko

__all__ = ["CREATIVE", "LABELS_HOW", "judge_labels", "judge_pairs"]

CREATIVE = "creative-writing-v3"
LABELS_HOW = (
    "huggingface-cli download lmsys/mt_bench_human_judgments --repo-type dataset --local-dir mt-bench-people, then "
    "tafkir compare mt-bench-people/data/human-00000-of-00001-*.parquet --labels --judge URL#MODEL"
)
_CHOICE = re.compile(r"\[\[([ABC])\]\]")
_AT_ONCE = 8
Read = Callable[[str], float]
Asked = tuple[list[dict[str, str]], Read]


def _judge_all(judge: JudgeEndpoint, asked: Sequence[Asked]) -> tuple[list[float | None], int]:
    """What the judge says of each, from the cache where it is known; and how many judgements broke their form.

    A judgement that is of no use is None, forgotten, and asked for again by the next run.
    """

    def one(given: Asked) -> float | None:
        messages, read = given
        try:
            return read(judge.judgement(messages))
        except MalformedJudgementError:
            judge.reject(messages)
        except Ungraded:
            pass
        return None

    found: list[float | None] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool, Progress("judge", total=len(asked)) as progress:
        for number, score in enumerate(pool.map(one, asked), start=1):
            found.append(score)
            progress.update(number)
    return found, found.count(None)


# ---- Creative Writing v3 -------------------------------------------------------------------------------------------


def judge_pairs(
    sides: Sequence[Side], data: Path, judge: JudgeEndpoint, *, anchor: str | None = None, anchor_rating: float = 1500.0
) -> dict[str, Any]:
    """Every two models' texts to the same prompt before the judge, in both orders, and the ratings that follow.

    Args:
        sides: models with answers to the task, as `load_sides` reads them.
        data: the benchmark's checkout, which has the judge's prompt.
        anchor: model whose rating is `anchor_rating`; None: the mean of all is.

    Returns:
        `models` (rows of `name`, `elo`, `glicko` with `deviation`, `won`: mean share against all others), best first;
        `games` (of two orders each, less those whose judgement failed) and `unjudged` judgements.

    Raises:
        DataError: fewer than two models have answers to it, or no pair could be judged.
    """
    texts = {side.name: _texts(side) for side in sides if CREATIVE in side.answers}
    if len(texts) < 2 or (anchor is not None and anchor not in texts):
        raise DataError(
            f"{len(texts)} models have answers to {CREATIVE}" + (f", {anchor!r} not among them" if anchor else ""),
            where="compare --pairs",
            expected="two or more models, the anchor among them",
            fix=f"tafkir eval MODEL1 MODEL2 --tasks {CREATIVE} --data ... --judge ...",
        )
    template = read_pair_template(data)
    wanted = [
        (item, first, second)
        for first, second in combinations(texts, 2)
        for item in sorted(texts[first].keys() & texts[second].keys())
    ]
    asked: list[Asked] = []
    for item, first, second in wanted:
        for a, b in ((first, second), (second, first)):
            prompt = creative_pair_prompt(template, texts[a][item][0], texts[a][item][1], texts[b][item][1])
            asked.append(([{"role": "user", "content": prompt}], creative_games))
    shares, unjudged = _judge_all(judge, asked)
    games: list[tuple[int, Game]] = []
    for number, (item, first, second) in enumerate(wanted):
        one, other = shares[2 * number : 2 * number + 2]
        if one is not None and other is not None:
            games.append((int(item.rpartition("/")[2]), Game(first, second, (one + 1 - other) / 2)))
    if not games:
        raise DataError("no pair could be judged", where="compare --pairs", fix="look at the judge's answers")
    return {**_ratings(games, anchor, anchor_rating), "games": len(games), "unjudged": unjudged}


def _texts(side: Side) -> dict[str, tuple[str, str]]:
    """Item -> its prompt, and the first answer that did not fail."""
    found: dict[str, tuple[str, str]] = {}
    for sample in sorted(side.answers[CREATIVE], key=lambda sample: sample.repeat):
        if sample.text.strip() and sample.finish_reason != "error":
            found.setdefault(sample.item, (sample.question, sample.text))
    return found


def _ratings(games: Sequence[tuple[int, Game]], anchor: str | None, anchor_rating: float) -> dict[str, Any]:
    """Elo by all games at once; Glicko-2 with a period for each of the benchmark's iterations."""
    elo = elo_ratings([game for _, game in games], anchor=anchor, anchor_rating=anchor_rating)
    glicko = {name: Glicko() for name in elo}
    for period in sorted({period for period, _ in games}):
        own = [game for number, game in games if number == period]
        results = {
            name: [(glicko[g.second], g.score) for g in own if g.first == name]
            + [(glicko[g.first], 1 - g.score) for g in own if g.second == name]
            for name in elo
        }
        glicko = {name: rate_glicko(glicko[name], played) for name, played in results.items()}
    shares = {
        name: [g.score if g.first == name else 1 - g.score for _, g in games if name in (g.first, g.second)]
        for name in elo
    }
    rows = [
        {"name": name, "elo": elo[name], "glicko": glicko[name].rating, "deviation": glicko[name].deviation}
        | {"won": fmean(shares[name])}
        for name in sorted(elo, key=lambda name: -elo[name])
    ]
    return {"models": rows}


# ---- MT-Bench beside people ----------------------------------------------------------------------------------------

_COLUMNS = ("question_id", "model_a", "model_b", "winner", "conversation_a", "conversation_b", "turn")
_WINNERS = {"model_a": "A", "model_b": "B", "tie": "tie"}


def judge_labels(path: Path, judge: JudgeEndpoint, *, limit: int = 0) -> dict[str, Any]:
    """How often the judge's choice between two conversations is a person's, and what two people's is.

    The judge is asked in both orders, as MT-Bench does it; where the two disagree it is a tie (arXiv 2306.05685).

    Args:
        path: the published file of human votes (Parquet or JSON lines).
        limit: only the first so many pairs.

    Returns:
        For `all` and `without_ties` (votes and choices that are ties left out) the agreement of the `judge` and of
        `people` with each other, with the number of `pairs`; `unjudged` judgements.

    Raises:
        DataError: the file has other columns (named), or another winner than model_a, model_b or tie.
    """
    votes: dict[str, list[str]] = {}
    rows: dict[str, Mapping[str, Any]] = {}
    for where, row in read_rows(path, _COLUMNS):
        winner = str(row["winner"]).replace("tie (inconsistent)", "tie")
        if winner not in _WINNERS:
            raise bad_row(where, f"a winner of {', '.join(_WINNERS)}, not {winner!r}")
        key = f"{row['question_id']}/{row['turn']}/{row['model_a']}/{row['model_b']}"
        votes.setdefault(key, []).append(_WINNERS[winner])
        rows.setdefault(key, row)
    keys = list(rows)[: limit or None]
    asked: list[Asked] = []
    for key in keys:
        row = rows[key]
        sides = [[turn["content"] for turn in row[side]] for side in ("conversation_a", "conversation_b")]
        for first, second in (sides, sides[::-1]):
            asked.append((mt_pair_prompt(int(row["question_id"]), first, second, turn=int(row["turn"])), _choice))
    found, unjudged = _judge_all(judge, asked)
    choices: dict[str, str] = {}
    for number, key in enumerate(keys):
        one, other = found[2 * number : 2 * number + 2]
        if one is not None and other is not None:
            choices[key] = "A" if one + 1 - other == 2 else "B" if one + 1 - other == 0 else "tie"
    whole = _agreement(choices, votes)
    decided = {key: choice for key, choice in choices.items() if choice != "tie"}
    clear = {key: [vote for vote in own if vote != "tie"] for key, own in votes.items()}
    known = any(clear[key] for key in decided)
    return {"all": whole, "without_ties": _agreement(decided, clear) if known else None, "unjudged": unjudged}


def _choice(judgement: str) -> float:
    """1 for the first, 0 for the second, 0.5 for neither."""
    found = _CHOICE.findall(judgement)
    if not found:
        raise MalformedJudgementError(f"no [[A]], [[B]] or [[C]] in {judgement[-80:]!r}")
    return {"A": 1.0, "B": 0.0, "C": 0.5}[found[-1]]


def _agreement(choices: Mapping[str, str], votes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    own, people, pairs = agreement(choices, votes)
    return {"judge": own, "people": people if people == people else None, "pairs": pairs}
