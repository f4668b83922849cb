"""Weights under Hugging Face's names: one declarative, reversible table per family, and what reads and writes by it."""

from tafkir.models.hf.convert import (
    architecture_of,
    drop_absent_mtp,
    read_hf_tensors,
    resolve_names,
    split_pieces,
    table_for,
    write_hf_tensors,
)
from tafkir.models.hf.parts import Part, read_hf_parts
from tafkir.models.hf.table import Resolved, WeightRule, WeightTable
from tafkir.recipe.hf_config import causal_keys, classification_keys, config_from_hf, config_to_hf

__all__ = [
    "Part",
    "Resolved",
    "WeightRule",
    "WeightTable",
    "architecture_of",
    "causal_keys",
    "classification_keys",
    "config_from_hf",
    "config_to_hf",
    "drop_absent_mtp",
    "read_hf_parts",
    "read_hf_tensors",
    "resolve_names",
    "split_pieces",
    "table_for",
    "write_hf_tensors",
]
