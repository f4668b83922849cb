"""Chips and what they cost: a dated table that files of one's own extend, read without torch."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tafkir.errors import RecipeError

__all__ = [
    "NUMBER_FORMATS",
    "Chip",
    "Price",
    "find_chip",
    "hardware_files",
    "load_chips",
    "parse_hardware",
]

NUMBER_FORMATS = ("fp32", "bf16", "fp8", "fp4", "int8")
"""Formats that a chip may multiply; `Chip.tflops` has those that it can."""

_TABLE = Path(__file__).resolve().parent / "tables" / "hardware.toml"
_NUMBERS = ("memory_gb", "bandwidth_tb_s", "link_gb_s", "network_gb_s", "power_w")
_REQUIRED = (*_NUMBERS, "tflops", "domain_size")
_KEYS = {*_REQUIRED, "name", "aliases", "sparsity", "source", "date", "price", "capex_dollars"}
_LEVELS = ("low", "mid", "high")
# Owning a card: server and network around it, years until it is written off, share of the time it works, and
# electricity with cooling (docs/plan.md, "prices").
_SURROUNDINGS, _YEARS, _BUSY, _PUE, _DOLLARS_PER_KWH = 1.35, 4, 0.8, 1.3, 0.08


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars for one chip and hour; low and high are what offers range between."""

    low: float
    mid: float
    high: float
    source: str
    date: str

    def scaled(self, factor: float) -> tuple[float, float, float]:
        """(low, mid, high), each times `factor`."""
        return self.low * factor, self.mid * factor, self.high * factor


@dataclass(frozen=True, slots=True)
class Chip:
    """One accelerator as its maker describes it.

    Attributes:
        key: what `--hardware` calls it.
        memory_bytes: usable.
        bandwidth: of its memory, bytes/s.
        flops: dense peak by number format, FLOP/s.
        sparsity: what data sheets multiply these by for structured sparsity.
        link: one way to a neighbour in the fast domain, bytes/s.
        domain_size: chips in the fast domain.
        network: one way to any other chip, bytes/s.
        power_w: watts.
        price: None where nobody quotes one and none can be derived.
        source: where the figures are from.
        date: when they were true.
        origin: file that they were read from.
    """

    key: str
    name: str
    aliases: tuple[str, ...]
    memory_bytes: float
    bandwidth: float
    flops: Mapping[str, float]
    sparsity: float
    link: float
    domain_size: int
    network: float
    power_w: float
    price: Price | None
    source: str
    date: str
    origin: str

    def peak(self, number_format: str) -> float:
        """FLOP/s in a format.

        Raises:
            RecipeError: the chip does not multiply it; the message says what it has.
        """
        if number_format not in self.flops:
            raise RecipeError(
                f"{self.name} has no {number_format} units",
                where="--precision",
                expected=f"a precision that computes in {', '.join(self.flops)}",
                fix="choose int8 or bf16" if "int8" in self.flops else "choose bf16",
            )
        return self.flops[number_format]

    def with_price(self, dollars_per_hour: float) -> Chip:
        """The chip at a price that the person knows better."""
        price = Price(dollars_per_hour, dollars_per_hour, dollars_per_hour, "given", "today")
        return replace(self, price=price)


def hardware_files(extra: Sequence[Path] = ()) -> list[Path]:
    """The tables in force, later ones on top: Tafkir's own, the user's, the folder's, the environment's, `extra`.

    `$XDG_CONFIG_HOME/tafkir/hardware.toml` (or `~/.config`), `./tafkir-hardware.toml`, and the files that
    `TAFKIR_HARDWARE` lists with `:` between them.
    """
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    found = [path for path in (home / "tafkir" / "hardware.toml", Path("tafkir-hardware.toml")) if path.is_file()]
    named = [Path(name) for name in os.environ.get("TAFKIR_HARDWARE", "").split(os.pathsep) if name]
    return [_TABLE, *found, *named, *extra]


def load_chips(extra: Sequence[Path] = (), *, own_only: bool = False) -> dict[str, Chip]:
    """Every known chip by its key.

    Args:
        extra: further files; what they say wins.
        own_only: Tafkir's own table and nothing else, for what must come out the same everywhere.

    Raises:
        RecipeError: a file is missing or malformed, a key is unknown, or a number is not positive.
    """
    tables: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    for path in [_TABLE] if own_only else hardware_files(extra):
        for key, table in parse_hardware(path).items():
            known = tables.get(key, {})
            if "capex_dollars" in table:
                known = {name: value for name, value in known.items() if name != "price"}
            tables[key] = {**known, **table}
            origins[key] = str(path) if path != _TABLE else "tafkir"
    return {key: _chip(key, table, origins[key]) for key, table in tables.items()}


def parse_hardware(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of one file, unmerged; see `load_chips`."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError("no such hardware file", where=str(path), fix="name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid TOML ({error})", where=str(path), fix="correct the file") from error
    chips = content.get("chips")
    if not isinstance(chips, dict) or not all(isinstance(table, dict) for table in chips.values()):
        raise RecipeError("no tables [chips.NAME]", where=str(path), fix="see docs/plan.md for the keys")
    for key, table in chips.items():
        unknown = sorted(table.keys() - _KEYS)
        if unknown:
            near = difflib.get_close_matches(unknown[0], sorted(_KEYS), n=1, cutoff=0.5)
            raise RecipeError(
                f"unknown key {unknown[0]!r}",
                where=f"{path}: chips.{key}",
                expected=f"keys among {', '.join(sorted(_KEYS))}",
                fix=f"did you mean {near[0]!r}?" if near else None,
            )
        table.setdefault("date", str(content.get("date", "undated")))
    return chips


def find_chip(name: str, chips: Mapping[str, Chip]) -> Chip:
    """The chip that a person means, by key or alias.

    Raises:
        RecipeError: there is none; the message names the nearest ones.
    """
    names = {alias: chip for chip in chips.values() for alias in (chip.key, *chip.aliases)}
    asked = name.lower().replace("_", "-")
    for spelling in (name.lower(), asked):
        if spelling in names:
            return names[spelling]
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.4)
    raise RecipeError(
        "no such chip",
        where=f"--hardware {name}",
        expected=f"cpu, or one of {', '.join(chips)}",
        fix=(f"did you mean {' or '.join(near)}? " if near else "")
        + "One's own chip is a file: --hardware-file (docs/plan.md)",
    )


def _chip(key: str, table: Mapping[str, Any], origin: str) -> Chip:
    where = f"{origin}: chips.{key}"
    missing = [name for name in _REQUIRED if name not in table]
    if missing:
        raise RecipeError(f"keys are missing: {', '.join(missing)}", where=where, fix="add them (docs/plan.md)")
    for name in (*_NUMBERS, "domain_size"):
        _positive(table[name], f"{where}.{name}")
    tflops = table["tflops"]
    if not isinstance(tflops, dict) or not tflops or not tflops.keys() <= set(NUMBER_FORMATS):
        raise RecipeError(
            "tflops is no table of number formats",
            where=where,
            expected=f"{{ bf16 = ..., fp8 = ... }} with formats among {', '.join(NUMBER_FORMATS)}",
        )
    for name, value in tflops.items():
        _positive(value, f"{where}.tflops.{name}")
    return Chip(
        key=key,
        name=str(table.get("name", key)),
        aliases=tuple(str(alias).lower() for alias in table.get("aliases", ())),
        memory_bytes=table["memory_gb"] * 1e9,
        bandwidth=table["bandwidth_tb_s"] * 1e12,
        flops={name: value * 1e12 for name, value in tflops.items()},
        sparsity=float(table.get("sparsity", 1)),
        link=table["link_gb_s"] * 1e9 / 2,
        domain_size=int(table["domain_size"]),
        network=table["network_gb_s"] * 1e9,
        power_w=float(table["power_w"]),
        price=_price(table, where),
        source=str(table.get("source", "not given")),
        date=str(table["date"]),
        origin=origin,
    )


def _price(table: Mapping[str, Any], where: str) -> Price | None:
    if "price" in table:
        low, mid, high = _levels(table["price"], f"{where}.price")
        price = table["price"]
        return Price(low, mid, high, str(price.get("source", "not given")), str(price.get("date", table["date"])))
    if "capex_dollars" not in table:
        return None
    hours = _YEARS * 365 * 24 * _BUSY
    power = float(table["power_w"]) / 1000 * _PUE * _DOLLARS_PER_KWH
    low, mid, high = (
        level * _SURROUNDINGS / hours + power for level in _levels(table["capex_dollars"], f"{where}.capex_dollars")
    )
    return Price(low, mid, high, "owning it at cost, nobody quotes a rent", str(table["date"]))


def _levels(table: Any, where: str) -> tuple[float, float, float]:
    if not isinstance(table, dict) or any(name not in table for name in _LEVELS):
        raise RecipeError("low, mid and high are needed", where=where, fix="add them (docs/plan.md)")
    low, mid, high = (_positive(table[name], f"{where}.{name}") for name in _LEVELS)
    if not low <= mid <= high:
        raise RecipeError(f"{low:g}, {mid:g}, {high:g} do not rise", where=where, expected="low <= mid <= high")
    return low, mid, high


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise RecipeError(f"{value!r} is not a positive number", where=where, fix="correct the file")
    return float(value)
