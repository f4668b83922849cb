"""Commands broken at random moments end as unbroken ones do: the short form of `make crash`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.driver import COMMANDS, Driver, left_in, may_mount
from tests.e2e.conftest import differing


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("crash"), seed=1)
    yield driver
    driver.close()


# Pretraining, fine-tuning and RLVR, whose loop is RLHF's, are killed at chosen moments in tests/e2e/test_resume.py.
@pytest.mark.parametrize("name", ["trm", "calibrate", "generate", "eval"])
def test_a_killed_command_ends_like_an_unbroken_one(driver: Driver, name: str) -> None:
    driver.kill(name, 0)
    count = driver.counts[name]
    assert count.kills and count.compared == 1 and "\n".join(count.faults) == ""


@pytest.mark.parametrize(
    ("trouble", "name", "number"),
    [("interrupt", "sft", 0), ("interrupt", "generate", 1), ("clock", "quantize", 0)],
)
def test_other_troubles_change_nothing_either(driver: Driver, trouble: str, name: str, number: int) -> None:
    before = driver.counts[name].compared
    getattr(driver, trouble)(name, number)
    assert driver.counts[name].compared == before + 1 and "\n".join(driver.counts[name].faults) == ""
    assert trouble == "clock" or driver.counts[name].interrupts


@pytest.mark.parametrize(("trouble", "name"), [("full_disk", "quantize"), ("read_only_disk", "calibrate")])
def test_a_disk_that_takes_no_more_costs_no_work(driver: Driver, trouble: str, name: str, tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("no file system of one's own can be mounted here")
    before = driver.counts[name].compared
    getattr(driver, trouble)(name, 0)
    assert driver.counts[name].compared == before + 1 and "\n".join(driver.counts[name].faults) == ""


def test_the_driver_sees_a_difference(driver: Driver, tmp_path: Path) -> None:
    """Else it would prove nothing: one bit of the weights, or one file that was left behind."""
    assert {"pretrain", "sft", "rlvr", "rlhf", "trm", "quantize", "generate", "eval"} <= COMMANDS.keys()
    made = shutil.copytree(driver.reference("quantize").leaves, tmp_path / "made")
    assert left_in(made) == driver.reference("quantize").files
    weights = min(made.glob("out/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (made / ".rest.tmp").touch()
    wanted = driver.reference("quantize").files
    assert differing(left_in(made), wanted) == [".rest.tmp", f"out/{weights.name}"]
