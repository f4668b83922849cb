"""How recipes are read: precedence, origins, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tafkir.errors import RecipeError
from tafkir.recipe.bundled import bundled_recipes, find_recipe
from tafkir.recipe.load import describe_keys, flatten, load_recipe
from tafkir.recipe.resolve import resolve_recipe
from tafkir.recipe.rl import IcePop, NoAcceptance


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    return write(tmp_path / "a.toml", 'name = "a"\n\n[tokenizer]\n\n[sft]\nsteps = 5\nlearning_rate = 1e-3\n')


def message(files: list[Path | str], overrides: list[str] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(files, overrides or [])
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_lose_to_files_and_files_to_overrides(tmp_path: Path, base_file: Path) -> None:
    second = write(tmp_path / "b.toml", "[sft]\nsteps = 7\n")
    loaded = load_recipe([base_file, second], ["sft.warmup_steps=2", "description=two words"])
    sft = loaded.recipe.sft
    assert sft is not None
    assert (sft.steps, sft.learning_rate, sft.warmup_steps, sft.beta1) == (7, 1e-3, 2, 0.9)
    assert loaded.recipe.description == "two words"
    assert loaded.origins["sft.steps"] == f"{second}:2"
    assert loaded.origins["sft.learning_rate"] == f"{base_file}:7"
    assert loaded.origins["sft.warmup_steps"] == "--set"
    assert loaded.origins["sft.beta1"] == "default"


def test_every_value_has_an_origin(base_file: Path) -> None:
    loaded = load_recipe([base_file])
    assert set(loaded.origins) == set(flatten(loaded.recipe))


def test_lines_of_values_that_span_lines(tmp_path: Path) -> None:
    text = (
        '# x\nname = "m"\n[data]\nsources = [\n  "svamp", # [tokenizer]\n]\nmax_steps = 3\naugment = { rename = 0.1 }\n'
    )
    path = write(tmp_path / "m.toml", text + "[tokenizer]\n")
    origins = load_recipe([path]).origins
    assert origins["data.sources"] == f"{path}:4"
    assert origins["data.max_steps"] == f"{path}:7"
    assert origins["data.augment.rename"] == f"{path}:8"
    assert origins["data.augment.renumber"] == "default"


def test_an_empty_override_takes_a_value_or_a_stage_away(base_file: Path) -> None:
    loaded = load_recipe([base_file], ["sft.steps="])
    assert loaded.recipe.sft is not None and loaded.recipe.sft.steps == 100
    assert loaded.origins["sft.steps"] == "default"
    assert load_recipe([base_file], ["sft="]).recipe.sft is None
    assert "unknown key" in message([base_file], ["sfft="])


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("sft.learning_rte=1", "sft.learning_rate"),
        ("rlvr.acceptance.alpah=0.5", "rlvr.acceptance.alpha"),
        ("sftt.steps=1", "sft"),
        ("hidden_size=64", "model.hidden_size"),
        ("learning_rate=1", "sft.learning_rate"),
        ("model.num_expert=4", "model.num_experts"),
    ],
)
def test_an_unknown_key_names_the_nearest(base_file: Path, override: str, nearest: str) -> None:
    text = message([base_file], [override])
    assert override.partition("=")[0].split(".")[0] in text
    assert "unknown key" in text and nearest in text


def test_variants_of_a_table(base_file: Path) -> None:
    """A table without a `kind` is the default's; keys and errors do not show how variants are told apart."""
    loaded = load_recipe([base_file], ["rlvr.acceptance.beta=4.0"])
    assert loaded.recipe.rlvr is not None and loaded.recipe.rlvr.acceptance == IcePop(beta=4.0)
    assert loaded.origins["rlvr.acceptance.beta"] == "--set"
    other = load_recipe([base_file], ["rlvr.acceptance.kind=none"]).recipe.rlvr
    assert other is not None and other.acceptance == NoAcceptance()
    assert message([base_file], ["rlvr.acceptance.alpha=-3.0"]).startswith("--set: rlvr.acceptance.alpha: got -3.0")
    wrong = message([base_file], ["rlvr.acceptance.kind=icep"])
    assert "got rlvr.acceptance.kind = icep; expected one of" in wrong and "'none'" in wrong
    foreign = message([base_file], ["rlvr.acceptance.kind=none", "rlvr.acceptance.alpha=0.5"])
    assert "rlvr.acceptance.alpha: unknown key. Fix: it belongs to rlvr.acceptance.kind = icepop" in foreign
    assert "rlvr.acceptance.icepop: unknown key" in message([base_file], ["rlvr.acceptance.icepop=1"])


def test_an_unknown_key_in_a_file_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.toml", 'name = "x"\n[sft]\nsteps = 3\nlerning_rate = 1.0\n')
    assert message([path]).startswith(f"{path}:4: sft.lerning_rate: unknown key")


@pytest.mark.parametrize(
    ("override", "got", "expected"),
    [
        ("sft.steps=abc", '"abc" (string)', "integer"),
        ("sft.steps=2.5", "2.5 (float)", "integer"),
        ("sft.steps=true", "true (boolean)", "integer"),
        ("sft.steps=0", "0 (integer)", "greater than or equal to 1"),
        ("sft.schedule=cosin", '"cosin" (string)', "'cosine'"),
        ("sft=3", "3 (integer)", "a table"),
        ("data.sources=svamp", '"svamp" (string)', "an array"),
        ("data.sources=[]", "[] (array)", "at least 1 item"),
        ("description=3", "3 (integer)", "string"),
        ('name="A B"', '"A B" (string)', "pattern"),
    ],
)
def test_a_wrong_value_says_path_got_and_expected(base_file: Path, override: str, got: str, expected: str) -> None:
    text = message([base_file], [override])
    assert text.startswith(f"--set: {override.partition('=')[0]}: got {got}")
    assert "; expected" in text and expected in text.partition("; expected")[2]


def test_values_that_do_not_fit_together_are_refused(base_file: Path) -> None:
    assert "num_experts=32 is not a multiple of n_group=5" in message([base_file], ["model.n_group=5"])


def test_a_recipe_without_a_name_says_what_to_add(tmp_path: Path) -> None:
    assert "missing key. Fix: add it" in message([write(tmp_path / "x.toml", "seed = 1\n")])


@pytest.mark.parametrize(
    ("text", "line"),
    [('name = "x"\nseed = = 1\n', 2), ('name = "x"\nseed = [1,\n', 2), ("[sft\n", 1), ('name = "x"\nname = "y"\n', 2)],
)
def test_a_syntax_error_names_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path / "x.toml", text)
    assert message([path]).startswith(f"{path}:{line}: not valid TOML")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"name = \xff")
    assert "not a text file" in message([path])


def test_a_missing_file_suggests_the_nearest_bundled_recipe(tmp_path: Path) -> None:
    assert "did you mean the bundled 'wordmath-tiny'?" in message(["wordmath-tny"])
    assert "did you mean the bundled 'wordmath-tiny'?" in message([tmp_path / "wordmath_tiny.toml"])
    assert "tafkir recipe ls" in message(["qqqq"])
    assert "is a directory" in message([tmp_path])
    assert "no recipe given" in message([])


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=3", "a b=3"])
def test_what_is_not_an_override_is_refused(base_file: Path, override: str) -> None:
    assert "not an override; expected path=value" in message([base_file], [override])


def test_a_bundled_recipe_is_found_by_name_and_by_path() -> None:
    path = bundled_recipes()["wordmath-tiny"]
    assert find_recipe("wordmath-tiny") == find_recipe(path) == path


def test_stages_that_cannot_start_are_refused(base_file: Path) -> None:
    assert "tokenizer" in message([base_file], ["tokenizer="])
    assert "[tokenizer]" in message([base_file], ["base=base-tiny"])
    assert "vocab_size" in message([base_file], ["tokenizer.vocab_size=4096"])
    assert "no stage" in message([base_file], ["tokenizer=", "sft="])


def test_auto_threads_become_a_number_once(base_file: Path) -> None:
    resolved = resolve_recipe(load_recipe([base_file]))
    assert 1 <= resolved.recipe.threads <= 8
    assert resolved.origins["threads"] == "auto"
    assert resolve_recipe(load_recipe([base_file]), threads=5).recipe.threads == 5
    fixed = resolve_recipe(load_recipe([base_file], ["threads=3"]), threads=5)
    assert (fixed.recipe.threads, fixed.origins["threads"]) == (3, "--set")


@given(st.sampled_from(sorted(describe_keys())), st.integers(0, 30), st.sampled_from("abcz_9"))
def test_any_misspelt_key_is_refused_with_a_suggestion(path: str, at: int, letter: str) -> None:
    parent, _, key = path.rpartition(".")
    wrong = ".".join(filter(None, (parent, key[:at] + letter + key[at:])))
    if wrong in describe_keys():
        return
    # A misspelt key below a table that only another variant has is told where that table belongs, and one below an
    # array of tables how those are written.
    suggestion = r"unknown key.*(did you mean .*\?|it belongs to )|expected an array of tables. Fix: write \[\["
    with pytest.raises(RecipeError, match=suggestion):
        load_recipe(["smoke"], [f"{wrong}=1"])
