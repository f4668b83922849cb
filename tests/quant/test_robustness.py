"""Quantizing when things go wrong: killed at any moment, no room left, sources that change, numbers that are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tafkir.checkpoint import save_checkpoint
from tafkir.errors import CheckpointError, RecipeError
from tafkir.models.build import build_decoder
from tafkir.quant import convert
from tafkir.quant.convert import quantize_checkpoint
from tafkir.recipe.quantize import QuantizeConfig
from tests.quant.test_convert import CONFIG

SHARD_BYTES = 20_000
EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"

# Kills the process as a power cut would, at the n-th call of a function, before it or half through what it writes.
KILLED = """
import os, signal, sys
from tafkir.quant import convert, shards
from tafkir.recipe.quantize import QuantizeConfig
moment, number = sys.argv[3], int(sys.argv[4])
calls = 0
def killing(module, name, half=False):
    real = getattr(module, name)
    def call(*args):
        global calls
        calls += 1
        if calls == number:
            if half:
                real(args[0], args[1][: len(args[1]) // 2], args[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    setattr(module, name, call)
places = {"job": (convert, "_run"), "write": (shards, "_write_at", True), "journal": (shards, "write_json"),
          "sidecars": (convert, "write_sidecars"), "check": (convert, "validate_checkpoint"),
          "rename": (convert, "publish_folder")}
if moment in places:
    killing(*places[moment])
result = convert.quantize_checkpoint(sys.argv[1], sys.argv[2], QuantizeConfig(), max_shard_bytes=20_000, workers=2)
print(result.resumed_bytes)
"""

# A file system of 2 MB that something else fills after a while; then there is room again.
FULL = """
import os, sys
from pathlib import Path
from tafkir.errors import TafkirError
from tafkir.quant import convert
from tafkir.recipe.quantize import QuantizeConfig
source, place = sys.argv[1], Path(sys.argv[2])
convert._MARGIN_BYTES = 0
run, filler, calls = convert._run, place / "filler", 0
def filling(*args):
    global calls
    calls += 1
    if calls == 12:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
    return run(*args)
convert._run = filling
try:
    convert.quantize_checkpoint(source, place / "out", QuantizeConfig(), max_shard_bytes=20_000)
except TafkirError as error:
    print(str(error))
print((place / "out").exists())
filler.unlink()
convert._run = run
result = convert.quantize_checkpoint(source, place / "out", QuantizeConfig(), max_shard_bytes=20_000)
print(result.resumed_bytes)
for file in sorted((place / "out").iterdir()):
    if file.read_bytes() != (Path(sys.argv[3]) / file.name).read_bytes():
        raise SystemExit(f"{file.name} is another")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    save_checkpoint(path, build_decoder(CONFIG, seed=0), dtype=torch.bfloat16)
    (path / "tafkir.json").unlink()
    return path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is made when nothing goes wrong."""
    path = tmp_path_factory.mktemp("whole") / "out"
    quantize_checkpoint(source, path, QuantizeConfig(), max_shard_bytes=SHARD_BYTES)
    return path


def copy_of(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def same(one: Path, other: Path) -> bool:
    return {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in other.iterdir()
    }


def run(script: str, *args: Any, env: dict[str, str], inside: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*inside, sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("moment", "number"),
    [("job", 1), ("job", 40), ("write", 61), ("journal", 3), ("sidecars", 1), ("check", 1), ("rename", 1)],
)
def test_killed_at_any_moment_it_goes_on(
    moment: str, number: int, source: Path, whole: Path, native_library: Path, cli_env: dict[str, str], tmp_path: Path
) -> None:
    env = cli_env | {"TAFKIR_KERNELS": "native"}
    killed = run(KILLED, source, tmp_path / "out", moment, number, env=env)
    assert killed.returncode == -9 and not (tmp_path / "out").exists(), killed.stderr
    staging = tmp_path / ".out.quantizing"
    journal = staging / ".progress.json"
    finished = json.loads(journal.read_text())["finished"] if journal.exists() else {}
    before = {file: (staging / file).stat().st_ino for file in finished}
    assert bool(before) == ((moment, number) != ("job", 1))
    again = run(KILLED, source, tmp_path / "out", "never", 0, env=env)
    assert again.returncode == 0, again.stderr
    assert same(tmp_path / "out", whole)
    # Every file that was finished is the same file still, and not another one with the same content.
    assert {file: (tmp_path / "out" / file).stat().st_ino for file in before} == before
    assert int(again.stdout) > 0 or not before


def test_a_disk_that_fills_up(
    source: Path, whole: Path, native_library: Path, cli_env: dict[str, str], tmp_path: Path
) -> None:
    mount = f'mount -t tmpfs -o size=2m none {tmp_path} && exec "$@"'
    inside = ("unshare", "--map-root-user", "--user", "--mount", "sh", "-c", mount, "sh")
    try:
        if run("", env=cli_env, inside=inside).returncode:
            pytest.skip("no file system of one's own can be mounted here")
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    done = run(FULL, source, tmp_path, whole, env=cli_env | {"TAFKIR_KERNELS": "native"}, inside=inside)
    assert done.returncode == 0, done.stderr
    message, exists, resumed = done.stdout.splitlines()
    assert "the disk is full. Fix: free some space, then run the same command again" in message
    assert exists == "False" and int(resumed) > 0


def test_a_limit_on_the_size_of_files(
    source: Path, whole: Path, native_library: Path, cli_env: dict[str, str], tmp_path: Path
) -> None:
    script = (
        "import resource, sys\nfrom tafkir.errors import TafkirError\nfrom tafkir.quant import convert\n"
        "from tafkir.recipe.quantize import QuantizeConfig\nrun, calls = convert._run, 0\n"
        "def limited(*args):\n    global calls\n    calls += 1\n    if calls == 30:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n    return run(*args)\n"
        "convert._run = limited\ntry:\n"
        "    convert.quantize_checkpoint(sys.argv[1], sys.argv[2], QuantizeConfig(), max_shard_bytes=20_000)\n"
        "except TafkirError as error:\n    print(error)"
    )
    done = run(script, source, tmp_path / "out", env=cli_env | {"TAFKIR_KERNELS": "native"})
    assert "(a file would be larger than the system allows). Fix: raise the limit" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()
    result = quantize_checkpoint(source, tmp_path / "out", QuantizeConfig(), max_shard_bytes=SHARD_BYTES)
    assert result.resumed_bytes > 0 and same(tmp_path / "out", whole)


@pytest.mark.parametrize("arithmetic", ["native", "torch"])
def test_a_source_that_is_cut_while_it_is_read(
    arithmetic: str, source: Path, whole: Path, native_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAFKIR_KERNELS", arithmetic)
    mine, work, calls = copy_of(source, tmp_path / "model"), convert._run, []
    content = (mine / "model.safetensors").read_bytes()

    def cutting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:
            os.truncate(mine / "model.safetensors", len(content) // 2)
        return work(*args)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_run", cutting)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the file was cut while it was read"):
            quantize_checkpoint(mine, tmp_path / "out", QuantizeConfig(), max_shard_bytes=SHARD_BYTES)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        quantize_checkpoint(mine, tmp_path / "out", QuantizeConfig(), max_shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "out").exists()
    # The file was brought back, but nobody knows whether it is the same: all is done again.
    (mine / "model.safetensors").write_bytes(content)
    result = quantize_checkpoint(mine, tmp_path / "out", QuantizeConfig(), max_shard_bytes=SHARD_BYTES)
    assert result.resumed_bytes == 0 and same(tmp_path / "out", whole)


@pytest.mark.parametrize("arithmetic", ["native", "torch"])
def test_weights_that_are_not_finite(
    arithmetic: str, source: Path, whole: Path, native_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAFKIR_KERNELS", arithmetic)
    mine = copy_of(source, tmp_path / "model")
    tensors = load_file(mine / "model.safetensors")
    tensors[EXPERT][3, 3], tensors["model.norm.weight"][2] = float("nan"), float("-inf")
    save_file(tensors, mine / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite.*"):
        quantize_checkpoint(mine, tmp_path / "out", QuantizeConfig())
    result = quantize_checkpoint(mine, tmp_path / "kept", QuantizeConfig(non_finite="keep"))
    after = load_file(tmp_path / "kept" / "model.safetensors")
    gate = EXPERT.replace("up_proj", "gate_proj")  # shares its scale
    for name in (EXPERT, gate, "model.norm.weight"):
        assert torch.equal(after[name].view(torch.int16), tensors[name].view(torch.int16))
    assert after[EXPERT.replace("up_proj", "down_proj")].dtype == torch.uint8
    reasons = {row["reason"]: row["tensors"] for row in result.rows if row["reason"]}
    assert reasons.pop("shares a scale with one that is not finite") == 1
    assert reasons.pop("not finite") == 1 and set(reasons) <= {"not finite"}
    config = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]
    assert {EXPERT.removesuffix(".weight"), gate.removesuffix(".weight")} <= set(config["ignore"])


def test_rows_that_do_not_split_into_blocks(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shape = CONFIG.model_copy(update={"moe_intermediate_size": 40})
    save_checkpoint(model, build_decoder(shape, seed=0), dtype=torch.bfloat16)
    result = quantize_checkpoint(model, tmp_path / "out", QuantizeConfig())
    (row,) = [row for row in result.rows if row["reason"]]
    assert row["component"] == "experts" and row["format"] == "keep"
    assert row["reason"] == "rows of 40 do not split into blocks of 16" and row["tensors"] == 2 * 4
    rule: Any = [{"tensors": "*.experts.*.down_proj.weight", "format": "nvfp4"}]
    with pytest.raises(RecipeError, match=r"down_proj\.weight cannot be nvfp4: rows of 40 do not split"):
        quantize_checkpoint(model, tmp_path / "forced", QuantizeConfig(rules=rule))
