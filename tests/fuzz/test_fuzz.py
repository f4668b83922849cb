"""A few hundred broken inputs a family: the short form of `make fuzz`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from tafkir.checkpoint.files import open_files
from tafkir.errors import CheckpointError
from tafkir.recipe.model import ModelConfig
from tests.fuzz.driver import Result, _one, fuzz
from tests.fuzz.families import FAMILIES


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"answers"}))
def test_what_is_broken_is_refused_in_time(family: str, tmp_path: Path) -> None:
    result = fuzz(family, 400, tmp_path, seed=1)
    assert result.faults == {} and result.refused > 100 and result.accepted > 5


def test_a_fault_is_seen() -> None:
    """Else the table would prove nothing."""

    def broken(random: object) -> bool:
        raise KeyError("a")

    result = Result("x")
    _one(broken, random=None, number=7, result=result)  # type: ignore[arg-type]
    assert list(result.faults.values()) == ["case 7: 'a'"]


def test_what_was_a_fault_once(tmp_path: Path) -> None:
    index = {"weight_map": {"a.weight": "a\0.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected a file of the folder"), open_files(tmp_path):
        pass
    with pytest.raises(ValidationError, match="head_dim does not fit into 64 bits"):
        ModelConfig.model_validate({"head_dim": "9" * 400})
