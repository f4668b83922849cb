"""What goes wrong for people: one line that says what, where and how to fix it, and nothing half-written."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import Cli
from tests.e2e.conftest import HERE, Tafkir, copy_of, differing, listing, outcome, rows_of_sums, write_jsonl

ONLY_TOKENIZER = ("--set", "pretrain=", "--set", "sft=", "--set", "rlvr=", "--set", "eval=", "--set", "report=")
ONLY_PRETRAIN = ("--set", "sft=", "--set", "rlvr=", "--set", "eval=", "--set", "report=")
FROM_BASE = ("--set", "tokenizer=", "--set", "pretrain=", "--set", "rlvr=", "--set", "eval=", "--set", "report=")


def half_written(run: Path) -> list[str]:
    """Names of what should not stay behind a stage that failed before it made anything."""
    made = ("checkpoint", "state", "metrics.jsonl", "result.json")
    return [name for name in listing(run) if name.endswith((".tmp", ".old")) or Path(name).name in made]


# ---- the recipe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "[sft]\nlerning_rate = 1e-3",
            "mine.toml:2: sft.lerning_rate: unknown key. Fix: did you mean sft.learning_rate?",
        ),
        ("[rlrv]\nsteps = 3", "mine.toml:1: rlrv: unknown key. Fix: did you mean rlvr?"),
        (
            "[rlvr]\nbatch_problems = 3",
            "unknown key. Fix: did you mean pretrain.batch_problems, sft.batch_problems or qat.batch_problems?",
        ),
        ('[sft]\nsteps = "ten"', 'mine.toml:2: sft.steps: got "ten" (string); expected a valid integer'),
        ("[sft]\nsteps = 2.5", "mine.toml:2: sft.steps: got 2.5 (float); expected a valid integer"),
        ("[sft]\nsteps = 0", "mine.toml:2: sft.steps: got 0 (integer); expected greater than or equal to 1"),
        ('[data]\nsources = "svamp"', 'mine.toml:2: data.sources: got "svamp" (string); expected an array'),
        ('[sft]\nschedule = "cosin"', "expected 'constant', 'linear', 'cosine' or 'wsd'"),
        ("sft = 3", "mine.toml:1: sft: got 3 (integer); expected a table"),
        ("[model]\nnum_key_value_heads = 3", "num_attention_heads=2 is not a multiple of num_key_value_heads=3"),
    ],
)
def test_a_wrong_recipe_names_the_line_and_the_way_out(
    tafkir: Tafkir, tmp_path: Path, lines: str, message: str
) -> None:
    (tmp_path / "mine.toml").write_text(f"{lines}\n")
    done = tafkir("run", "smoke", "mine.toml", cwd=tmp_path)
    assert done.code == 2 and message in done.error
    assert listing(tmp_path) == ["mine.toml"]


def test_a_recipe_that_is_not_there_names_the_nearest(tafkir: Tafkir, tmp_path: Path) -> None:
    done = tafkir("run", "recipes/smoke-big.toml", cwd=tmp_path)
    assert done.code == 2 and "recipes/smoke-big.toml: no such recipe. Fix: did you mean the bundled" in done.error
    assert listing(tmp_path) == []


# ---- data --------------------------------------------------------------------------------------------------------

BROKEN = b'{"question": "How many?", "answer": 4\n'


def broken_sums(path: Path, *bad: bytes) -> Path:
    """The sums, with malformed lines after the second."""
    lines = write_jsonl(path, rows_of_sums()).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], *bad, *lines[2:]]))
    return path


def run_on(path: Path, *more: str) -> tuple[str, ...]:
    return ("run", "smoke", str(HERE / "tiny.toml"), "--set", f"data.sources=[{str(path)!r}]", *more)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (BROKEN, "valid JSON"),
        (b"[1, 2]\n", "a JSON object"),
        (b'{"answer": 4}\n', "a non-empty string in field 'question'"),
        (b'{"question": "How many?", "answer": "four"}\n', "a number"),
        (b'{"question": "How many?", "answer": 4, "split": "dev"}\n', "train, validation or test in field 'split'"),
    ],
)
def test_a_malformed_row_names_file_and_line(tafkir: Tafkir, tmp_path: Path, row: bytes, expected: str) -> None:
    path = broken_sums(tmp_path / "sums.jsonl", row)
    done = tafkir(*run_on(path), cwd=tmp_path)
    assert done.code == 1
    assert f"{path}:3: malformed row; expected {expected}" in done.error
    assert 'set data.on_bad_row = "skip"' in done.error
    assert half_written(tmp_path / "runs" / "tiny") == []


def test_malformed_rows_are_left_out_when_that_is_asked_for(tafkir: Tafkir, tmp_path: Path) -> None:
    path = broken_sums(tmp_path / "sums.jsonl", BROKEN, b"[]\n", b"{}\n")
    done = tafkir(*run_on(path, "--set", "data.on_bad_row=skip", *ONLY_TOKENIZER), cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"WARNING 3 of 67 rows are malformed and left out; the first: {path}:3: expected valid JSON" in done.err
    whole = write_jsonl(tmp_path / "whole.jsonl", rows_of_sums())
    assert tafkir(*run_on(whole, "--name", "whole", *ONLY_TOKENIZER), cwd=tmp_path).code == 0
    one, other = (tmp_path / "runs" / name / "stages/01-tokenizer/checkpoint" for name in ("tiny", "whole"))
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, (), "the data file does not exist; expected a JSONL file, or one of the bundled sets gsm8k, svamp"),
        (b"", (), "no valid rows (0 malformed)"),
        (BROKEN * 4, ("--set", "data.on_bad_row=skip"), "no valid rows (4 malformed)"),
        (b'{"question": "How many?", "answer": 4, "split": "test"}\n', (), "no problem is left to train on"),
        (b'{"question": "\xff"}\n', (), "sums.jsonl:1: the file is not UTF-8"),
    ],
)
def test_data_without_a_valid_row_stops_the_run(
    tafkir: Tafkir, tmp_path: Path, content: bytes | None, more: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "sums.jsonl"
    if content is not None:
        path.write_bytes(content)
    done = tafkir(*run_on(path, *more), cwd=tmp_path)
    assert done.code == 1 and str(path) in done.error and message in done.error
    assert half_written(tmp_path / "runs" / "tiny") == []


@pytest.mark.slow
def test_the_real_process_ends_in_one_line_too(cli: Cli, tmp_path: Path) -> None:
    path = broken_sums(tmp_path / "sums.jsonl", BROKEN)
    done = cli("run", "smoke", str(HERE / "tiny.toml"), "--set", f"data.sources=[{str(path)!r}]")
    assert done.returncode == 1 and done.stdout == ""
    progress, error = done.stderr.splitlines()
    assert progress.endswith("INFO tokenizer: starts")
    assert error.startswith(f"error: {path}:3: malformed row")


# ---- the run directory -------------------------------------------------------------------------------------------


SmallDisk = Callable[[int], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mounts a file system of a few bytes; called again, gives the same one another size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def resize(size: int) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (subprocess.CalledProcessError, FileNotFoundError):
            pytest.skip("no file system can be mounted here")
        mounted = True
        return place

    yield resize
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def blocks(*paths: Path) -> int:
    """Bytes that files take on a disk with pages of 4 KiB."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in files if file.is_file())


@pytest.mark.parametrize("moment", ["tiny/", "01-tokenizer/checkpoint", "02-pretrain/state/", "02-pretrain/checkpoint"])
def test_a_full_disk_stops_the_run_and_more_space_lets_it_go_on(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path, small_disk: SmallDisk, moment: str
) -> None:
    stages = reference / "stages"
    one_state = blocks(stages / "01-tokenizer", stages / "02-pretrain") - blocks(stages / "02-pretrain" / "checkpoint")
    size = {
        "tiny/": 8_192,
        "01-tokenizer/checkpoint": 24_576,
        "02-pretrain/state/": 131_072,
        # One state fits, beside the log and the recipe, and half of the checkpoint after it.
        "02-pretrain/checkpoint": one_state + 16_384 + blocks(stages / "02-pretrain/checkpoint/model.safetensors") // 2,
    }[moment]
    command = (*tiny, *ONLY_PRETRAIN, "--set", "pretrain.save_every=100", "--runs-dir", str(small_disk(size)))
    done = tafkir(*command, cwd=tmp_path)
    assert done.code == 1
    assert moment in done.error and "the disk is full. Fix: free" in done.error
    run = tmp_path / "disk" / "tiny"
    assert [name for name in listing(run) if name.endswith((".tmp", ".old"))] == []
    small_disk(64 << 20)
    done = tafkir(*command, cwd=tmp_path)
    assert done.code == 0, done.err
    made, wanted = outcome(run), outcome(reference)
    assert [name for name in differing(made, wanted) if name in made and name != "recipe.resolved.toml"] == []
    assert "stages/02-pretrain/checkpoint/model.safetensors" in made


def test_a_file_that_may_not_grow_stops_the_run(tafkir: Tafkir, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk where nothing can be mounted."""
    done = tafkir(*tiny, *ONLY_PRETRAIN, cwd=tmp_path, max_file_bytes=100_000)
    assert (
        done.code == 1
        and "02-pretrain/state/step-00000005.safetensors: cannot be written (File too large)" in done.error
    )
    assert [name for name in listing(tmp_path) if name.endswith(".tmp")] == []


@pytest.fixture
def read_only() -> Iterator[tuple[Path, int | None]]:
    """A folder that anybody may read and nobody but its owner may write, and who is to try; the sums are in it."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        write_jsonl(Path(name) / "sums.jsonl", rows_of_sums()).chmod(0o644)
        Path(name).chmod(0o755 if root else 0o555)
        yield Path(name), 65534 if root else None
        Path(name).chmod(0o755)


def test_a_place_that_is_not_writable_stops_the_run(tafkir: Tafkir, read_only: tuple[Path, int | None]) -> None:
    place, uid = read_only
    done = tafkir(*run_on(place / "sums.jsonl"), cwd=place, uid=uid)
    assert done.code == 1
    assert "error: runs/tiny: not writable. Fix: change its permissions, or choose another place" in done.error
    assert listing(place) == ["sums.jsonl"]


def test_what_another_user_keeps_is_neither_read_nor_written(
    tafkir: Tafkir, reference: Path, tmp_path: Path, read_only: tuple[Path, int | None]
) -> None:
    place, uid = read_only
    if uid is None:
        pytest.skip("only root can act as two users")
    run = copy_of(reference, place)
    done = tafkir(*run_on(place / "sums.jsonl"), "--from", "rlvr", cwd=place, uid=uid)
    assert done.code == 1 and "not writable. Fix: change its permissions, or choose another" in done.error
    assert listing(run) == listing(reference)
    private = write_jsonl(tmp_path / "sums.jsonl", rows_of_sums())
    private.chmod(0o600)
    done = tafkir(*run_on(private), cwd=place, uid=uid)
    assert done.code == 1 and f"{private}: Permission denied. Fix: change its permissions" in done.error


def test_the_kernels_own_folders_take_no_run(tafkir: Tafkir, tiny: tuple[str, ...], tmp_path: Path) -> None:
    done = tafkir(*tiny, "--runs-dir", "/proc/tafkir", cwd=tmp_path)
    assert done.code == 1 and "/proc/tafkir/tiny" in done.error and "--runs-dir" in done.error


def test_a_run_that_another_process_writes_is_not_touched(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    run = copy_of(reference, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with open(run / ".lock", "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = tafkir(*tiny, "--from", "sft", cwd=tmp_path)
    holder = (run / ".lock").read_text()
    assert done.code == 1
    assert f"runs/tiny: process {holder} is writing this run. Fix: wait for it, or choose another --name" in done.error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# ---- checkpoints -------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + (name == 'lm_head.weight')}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(bytes(content))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": (
        lambda folder: edit_config(folder, architectures=["LlamaForCausalLM"], model_type="llama"),
        "config.json: architecture LlamaForCausalLM is not supported; expected one of Bailing",
    ),
    "weights cut in half": (
        lambda folder: cut(folder / "model.safetensors", 60_000),
        "model.safetensors: the file is truncated or damaged",
    ),
    "weights cut in the header": (lambda folder: cut(folder / "model.safetensors", 100), "truncated or damaged"),
    "empty weights": (lambda folder: cut(folder / "model.safetensors", 0), "truncated or damaged"),
    "a pointer instead of weights": (
        lambda folder: (folder / "model.safetensors").write_text(POINTER),
        "truncated or damaged",
    ),
    "a flipped bit": (
        lambda folder: flip_a_bit(folder / "model.safetensors"),
        "model.safetensors does not hold the tensor that tafkir.json describes",
    ),
    "a missing tensor": (lose_a_tensor, "1 tensors missing: model.layers.1.mlp.gate.weight"),
    "a missing shard": (lose_a_shard, "model-00002-of-00002.safetensors: the file is missing"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: the file is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: there is no tokenizer"),
    "half a config": (lambda folder: cut(folder / "config.json", 200), "config.json:"),
    "half a tokenizer": (lambda folder: cut(folder / "tokenizer.json", 200), "tokenizer.json: the tokenizer cannot be"),
    "half a manifest": (lambda folder: cut(folder / "tafkir.json", 200), "tafkir.json:"),
    "an empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "there is no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_named_and_nothing_is_trained_on_it(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path, damage: str
) -> None:
    change, message = DAMAGES[damage]
    base = copy_of(reference / "stages" / "02-pretrain" / "checkpoint", tmp_path)
    change(base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    done = tafkir(*tiny, *FROM_BASE, "--set", f"base={base}", cwd=tmp_path)
    assert done.code == 1
    assert str(base) in done.error and message in done.error
    assert "Fix: " in done.error or "expected " in done.error
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert half_written(tmp_path / "runs" / "tiny") == []


@pytest.mark.parametrize("command", ["chat", "serve", "eval"])
def test_a_damaged_checkpoint_cannot_be_used_either(
    tafkir: Tafkir, reference: Path, sums: Path, tmp_path: Path, command: str
) -> None:
    checkpoint = copy_of(reference / "stages" / "03-sft" / "checkpoint", tmp_path)
    cut(checkpoint / "model.safetensors", 60_000)
    more = ("--set", f"data.sources=[{str(sums)!r}]") if command == "eval" else ()
    done = tafkir(command, checkpoint, *more, cwd=tmp_path)
    assert done.code == 1 and f"{checkpoint}/model.safetensors: the file is truncated or damaged" in done.error


def test_a_checkpoint_of_another_shape_than_the_recipes(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    base = reference / "stages" / "02-pretrain" / "checkpoint"
    changes = ("--set", "model.num_hidden_layers=3", "--set", "model.num_experts=16")
    done = tafkir(*tiny, *FROM_BASE, "--set", f"base={base}", *changes, cwd=tmp_path)
    assert done.code == 1
    assert "the checkpoint is another model: num_hidden_layers=2 (recipe: 3), num_experts=8 (recipe: 16)" in done.error
    assert str(base) in done.error and "[model] table" in done.error
    assert half_written(tmp_path / "runs" / "tiny") == []


def test_a_base_that_was_damaged_and_is_whole_again_goes_on(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    base = copy_of(reference / "stages" / "02-pretrain" / "checkpoint", tmp_path)
    whole = (base / "model.safetensors").read_bytes()
    command = (*tiny, *FROM_BASE, "--set", "sft.steps=1", "--set", f"base={base}")
    cut(base / "model.safetensors", 60_000)
    assert tafkir(*command, cwd=tmp_path).code == 1
    (base / "model.safetensors").write_bytes(whole)
    done = tafkir(*command, cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.parametrize("size", [0, 60_000])
def test_a_truncated_training_state_says_what_to_delete(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path, size: int
) -> None:
    run = copy_of(reference, tmp_path)
    stage = run / "stages" / "03-sft"
    # As a stage stands that was killed after its last state.
    (stage / "result.json").unlink()
    (state,) = (stage / "state").iterdir()
    cut(state, size)
    before = listing(run)
    done = tafkir(*tiny, cwd=tmp_path)
    assert done.code == 1
    assert "cannot read the training state" in done.error and str(state.relative_to(tmp_path)) in done.error
    assert "delete this file to redo the stage" in done.error
    assert listing(run) == before
    if size:
        return
    state.unlink()
    done = tafkir(*tiny, cwd=tmp_path)
    assert done.code == 0, done.err
    assert differing(outcome(run), outcome(reference)) == []


def test_a_damaged_checkpoint_inside_a_run_stops_the_next_stage(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    run = copy_of(reference, tmp_path)
    cut(run / "stages" / "03-sft" / "checkpoint" / "model.safetensors", 60_000)
    done = tafkir(*tiny, "--only", "rlvr", cwd=tmp_path)
    assert done.code == 1
    assert "runs/tiny/stages/03-sft/checkpoint/model.safetensors: the file is truncated or damaged" in done.error
    assert half_written(run / "stages" / "06-rlvr") == []
    kept = run / "stages" / "06-rlvr.old-1" / "checkpoint" / "model.safetensors"
    assert kept.read_bytes() == (reference / "stages/06-rlvr/checkpoint/model.safetensors").read_bytes()
