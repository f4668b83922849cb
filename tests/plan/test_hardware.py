"""The table of chips: complete, dated, extended by files of one's own, and strict about what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tafkir.errors import RecipeError
from tafkir.plan.hardware import find_chip, load_chips

ASKED_FOR = (
    "a100 h100 h800 h20 h20-141 h200 b200 gb200 gb300 mi300x rtx4090 ascend-910b1 ascend-910b2 ascend-910b3 "
    "ascend-910b4 ascend-910c"
).split()


@pytest.fixture(autouse=True)
def nothing_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("TAFKIR_HARDWARE", raising=False)
    monkeypatch.chdir(tmp_path)


def test_every_chip_is_there_dated_and_with_a_source() -> None:
    chips = load_chips()
    assert set(ASKED_FOR) <= set(chips)
    for chip in chips.values():
        assert chip.source and re.fullmatch(r"20\d\d-\d\d-\d\d", chip.date)
        assert chip.price is None or (chip.price.low <= chip.price.mid <= chip.price.high and chip.price.source)


def test_dense_peaks_and_one_way_links() -> None:
    """H100's data sheet says 1,979 and 3,958 TFLOPS with sparsity and 900 GB/s both ways."""
    h100 = load_chips()["h100"]
    assert [h100.peak(name) * h100.sparsity / 1e12 for name in ("bf16", "fp8")] == [1978, 3958]
    assert h100.link == 450e9


@pytest.mark.parametrize(("name", "key"), [("H20-96", "h20"), ("h200_sxm", "h200"), ("910B3", "ascend-910b3")])
def test_chips_have_other_names(name: str, key: str) -> None:
    assert find_chip(name, load_chips()).key == key


def test_an_unknown_chip_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"did you mean .*h200.*--hardware-file"):
        find_chip("h2000", load_chips())


def test_a_format_that_a_chip_lacks() -> None:
    with pytest.raises(RecipeError, match=r"910B3 has no fp8 units; expected .* bf16, int8"):
        load_chips()["ascend-910b3"].peak("fp8")


def test_owning_a_card_gives_a_price_where_nobody_quotes_one() -> None:
    """H20: 0.70 to 0.86 dollars an hour at the reference's terms; four years at 80 %, 1.35 for what is around it."""
    price = load_chips()["h20"].price
    assert price is not None
    by_hand = 13500 * 1.35 / (4 * 8760 * 0.8) + 0.4 * 1.3 * 0.08
    assert price.mid == pytest.approx(by_hand) and 0.6 < price.low < price.high < 0.86


def test_files_add_and_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config/tafkir").mkdir(parents=True)
    (tmp_path / "config/tafkir/hardware.toml").write_text(
        "[chips.h100.price]\nlow = 1\nmid = 1\nhigh = 1\n[chips.h20]\nmemory_gb = 97\n"
    )
    (tmp_path / "tafkir-hardware.toml").write_text("[chips.h100.price]\nlow = 2\nmid = 2\nhigh = 2\n")
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'date = "2026-11-01"\n[chips.mine]\nmemory_gb = 10\nbandwidth_tb_s = 1\ntflops = { bf16 = 100 }\n'
        "link_gb_s = 50\ndomain_size = 4\nnetwork_gb_s = 10\npower_w = 100\n"
    )
    chips = load_chips([mine])
    assert chips["h100"].price and chips["h100"].price.mid == 2 and chips["h100"].bandwidth == 3.35e12
    assert chips["h20"].memory_bytes == 97e9 and chips["h20"].price
    assert chips["mine"].price is None and chips["mine"].origin == str(mine) and chips["mine"].date == "2026-11-01"
    monkeypatch.setenv("TAFKIR_HARDWARE", str(mine))
    assert "mine" in load_chips()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[chips.x]\nmemory = 1", "unknown key 'memory'.*did you mean 'memory_gb'"),
        ("[chips.h100]\nmemory_gb = -1", "not a positive number"),
        ("[chips.h100]\ntflops = { fp6 = 1 }", "formats among"),
        ("[chips.h100.price]\nlow = 3\nmid = 2\nhigh = 4", "do not rise"),
        ("[chips.h100.price]\nlow = 3", "low, mid and high are needed"),
        ("[chips.new]\nmemory_gb = 1", "keys are missing: bandwidth_tb_s"),
        ("[gpus]", r"no tables \[chips.NAME\]"),
        ("[chips", "not valid TOML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_chips([path])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such hardware file"):
        load_chips([tmp_path / "none.toml"])
