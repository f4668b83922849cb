"""The registry over folders and fsspec stores: content, signatures, promotion by evidence, kills, and the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tafkir.errors import RegistryError
from tafkir.registry.registry import Registry
from tafkir.registry.signing import PrivateKey, PublicKey, write_keys
from tests.conftest import Cli


def make_checkpoint(folder: Path, *, seed: int = 0, quantized: bool = True) -> Path:
    """Two shards: the first is the same for every seed."""
    folder.mkdir(parents=True)
    for number, value in ((1, 0), (2, seed)):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"weight.{number}": np.full((64, 64), value, np.float32)}, folder / name)
    extra = {"quantization_config": {"quant_method": "modelopt"}} if quantized else {}
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], **extra}))
    (folder / "tafkir.json").write_text(json.dumps({"lineage": {"recipe": "base-tiny", "step": 12}}))
    (folder / "README.md").write_text("could be anything: a card in plain words.\n")
    return folder


def make_report(file: Path, **kept: float | None) -> Path:
    """What `tafkir verify --task ... --json` prints, as far as a promotion reads it."""
    tasks = [
        {
            "task": task,
            "metric": "greedy",
            "retention": {"greedy": value and {"value": value, "low": value - 0.01, "high": None}},
        }
        for task, value in kept.items()
    ]
    file.write_text(json.dumps({"ratio": 3.0, "retention": {"min_retention": 0.98, "tasks": tasks}}))
    return file


def blobs_of(root: Path) -> set[str]:
    return {file.name for file in (root / "blobs").rglob("*") if file.is_file()}


@pytest.fixture(params=["folder", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    kinds = {"folder": str(tmp_path / "reg"), "file": f"file://{tmp_path}/reg", "memory": f"memory://{tmp_path}/reg"}
    yield kinds[request.param]


def test_versions_by_content(place: str, tmp_path: Path) -> None:
    registry = Registry(place)
    registry.add("base", make_checkpoint(tmp_path / "base", quantized=False))
    report = make_report(tmp_path / "report.json", wordmath=0.991)
    first = registry.add("small", make_checkpoint(tmp_path / "a", seed=1), parent="base", report=report)
    second = registry.add("small", make_checkpoint(tmp_path / "b", seed=2), parent="base@1")
    assert (first.version, second.version, second.parent) == (1, 2, "base@1")
    assert first.recipe == {"recipe": "base-tiny", "step": 12} and first.architecture == "Qwen3ForCausalLM"
    shared = "model-00001-of-00002.safetensors"
    assert first.files[shared] == second.files[shared]
    assert registry.names() == ["base", "small"] and registry.version("small") == second
    assert [version.version for version in registry.versions("small")] == [1, 2]
    for version in registry.versions("small"):
        registry.verify(version)
    registry.get(first, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()
    }
    with pytest.raises(RegistryError, match="is there already"):
        registry.get(first, tmp_path / "out")
    for wanted, message in (("other", "no model 'other'.*base, small"), ("small@7", "no version 7.*1 to 2")):
        with pytest.raises(RegistryError, match=message):
            registry.version(wanted)
    with pytest.raises(RegistryError, match="no model 'nobody'"):
        registry.add("small", tmp_path / "a", parent="nobody")
    with pytest.raises(RegistryError, match="is no name"):
        registry.add("../small", tmp_path / "a")


def test_promotion_needs_evidence(place: str, tmp_path: Path) -> None:
    registry = Registry(place)
    registry.add("m", make_checkpoint(tmp_path / "a", seed=1))
    reports = {2: {"wordmath": 0.985, "svamp": 1.01}, 3: {"wordmath": 0.995, "svamp": 0.9704}, 4: {"svamp": None}}
    for number, kept in reports.items():
        report = make_report(tmp_path / f"{number}.json", **kept)
        registry.add("m", tmp_path / "a", report=report)
    registry.add("m", make_checkpoint(tmp_path / "plain", quantized=False))
    with pytest.raises(RegistryError, match=r"m@1: a quantized model needs a retention report"):
        registry.promote("m@1")
    with pytest.raises(RegistryError, match=r"m@3: svamp keeps 97\.04% \(96\.04% to any\); expected at least 98\.00%"):
        registry.promote("m@3")
    with pytest.raises(RegistryError, match="the source solves nothing of svamp"):
        registry.promote("m@4")
    assert registry.channels("m") == {}
    assert registry.promote("m@2").kept == {"wordmath": 0.985, "svamp": 1.01}
    assert registry.promote("m@3", min_kept=0.97).min_kept == 0.97
    assert registry.promote("m@5", channel="staging").kept == {}
    assert registry.channels("m") == {"production": 3, "staging": 5}
    assert registry.rollback("m").version == 2 and registry.version("m@production").version == 2
    with pytest.raises(RegistryError, match="served nothing before"):
        registry.rollback("m")
    registry.promote("m@3", min_kept=0.9)
    assert [(move.action, move.version) for move in registry.moves("m", "production")] == [
        ("promote", 2), ("promote", 3), ("rollback", 2), ("promote", 3),
    ]  # fmt: skip
    with pytest.raises(RegistryError, match=r"no retention in the report.*tafkir verify"):
        (tmp_path / "other.json").write_text("{}")
        registry.add("m", tmp_path / "a", report=tmp_path / "other.json")


def test_signatures(tmp_path: Path) -> None:
    public, key_id = write_keys(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    other, _ = write_keys(tmp_path / "other")
    root, trusted = tmp_path / "reg", PublicKey.load(public)
    signed = Registry(str(root), key=PrivateKey(tmp_path / "key"), trusted=trusted)
    folder = make_checkpoint(tmp_path / "a")
    signed.add("m", folder, report=make_report(tmp_path / "r.json", wordmath=1.0))
    signed.promote("m")
    assert signed.version("m@production").version == 1 and trusted.key_id == key_id
    with pytest.raises(RegistryError, match=f"signed by {key_id}; expected by"):
        Registry(str(root), trusted=PublicKey.load(other)).version("m")
    Registry(str(root)).add("m", folder)
    with pytest.raises(RegistryError, match="not signed"):
        signed.version("m@2")
    record = root / "models" / "m" / "versions" / "000001.json"
    record.write_text(record.read_text().replace("base-tiny", "base-mini"))
    with pytest.raises(RegistryError, match="the signature does not belong to this record"):
        signed.version("m@1")
    assert Registry(str(root)).version("m@1").recipe["recipe"] == "base-mini"
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(RegistryError, match="chmod 600"):
        PrivateKey(tmp_path / "key")
    with pytest.raises(RegistryError, match="not a private key"):
        (tmp_path / "text").write_text("no key")
        (tmp_path / "text").chmod(0o600)
        PrivateKey(tmp_path / "text")
    with pytest.raises(RegistryError, match="is there already"):
        write_keys(tmp_path / "key")


def test_damage_is_found(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "reg"))
    version = registry.add("m", make_checkpoint(tmp_path / "a"))
    name = "model-00002-of-00002.safetensors"
    blob = registry.blob(version.files[name])
    assert blob is not None
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(RegistryError, match=f"m@1: {name}: its bytes were changed"):
        registry.verify(version)
    with pytest.raises(RegistryError, match="its bytes were changed"):
        registry.get(version, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    blob.unlink()
    with pytest.raises(RegistryError, match="its bytes are missing"):
        registry.verify(version)
    registry.add("m", tmp_path / "a")  # brings the blob back
    registry.verify(version)
    (tmp_path / "reg" / "models" / "m" / "versions" / "000001.json").write_text("{")
    with pytest.raises(RegistryError, match="the record is damaged"):
        registry.version("m@1")


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch pickled-code-ran",)


def test_pickles_are_refused_by_name_and_by_content(tmp_path: Path) -> None:
    registry, folder = Registry(str(tmp_path / "reg")), make_checkpoint(tmp_path / "a")
    for suffix in (".bin", ".pt", ".pkl", ".pth"):
        file = folder / f"weights{suffix}"
        file.write_bytes(b"harmless")
        with pytest.raises(RegistryError, match=rf"weights\{suffix}: \{suffix} files may hold pickles"):
            registry.add("m", folder)
        file.unlink()
    file = folder / "notes.txt"
    for protocol in range(6):
        file.write_bytes(pickle.dumps(Runs(), protocol))
        with pytest.raises(RegistryError, match="is a pickle, which runs code, whatever its name"):
            registry.add("m", folder)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
    with pytest.raises(RegistryError, match="is a pickle"):
        registry.add("m", folder)
    file.write_text("plain words.")
    (folder / "extra.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(RegistryError, match="truncated or damaged"):
        registry.add("m", folder)
    (folder / "extra.safetensors").unlink()
    (folder / "link.json").symlink_to("/etc/passwd")
    with pytest.raises(RegistryError, match="a symbolic link"):
        registry.add("m", folder)
    (folder / "link.json").unlink()
    assert registry.names() == [] and registry.add("m", folder).version == 1
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(RegistryError, match="no weights"):
        registry.add("m", folder)


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_adds_at_the_same_time(kind: str, tmp_path: Path) -> None:
    place = str(tmp_path / "reg") if kind == "folder" else f"memory://{tmp_path}/many"
    folders = [make_checkpoint(tmp_path / str(seed), seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda folder: Registry(place).add("m", folder), folders))
    registry = Registry(place)
    if kind == "folder":  # where a name is taken in one step; stores in memory have no such thing
        assert sorted(version.version for version in made) == list(range(1, 9))
        assert (
            len({version.files["model-00002-of-00002.safetensors"].sha256 for version in registry.versions("m")}) == 8
        )
    for version in registry.versions("m"):
        registry.verify(version)
    assert registry._store.names("incoming") == []


def test_a_killed_add_is_not_to_be_seen(tmp_path: Path) -> None:
    folder, root = make_checkpoint(tmp_path / "a"), tmp_path / "reg"
    Registry(str(root)).add("m", folder)
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    big = make_checkpoint(tmp_path / "big", seed=3)
    save_file({"weight.3": np.zeros((16 << 20,), np.float32)}, big / "model-00003.safetensors")
    script = (
        "import sys, pathlib\nfrom tafkir.registry import store\nfrom tafkir.registry.registry import Registry\n"
        "store.CHUNK_BYTES = 1 << 16\n"
        "Registry(sys.argv[1]).add('m', pathlib.Path(sys.argv[2]), step=lambda f, s: print(f, flush=True))"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(root), str(big)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if "00003" in line:
            break
    deadline = time.monotonic() + 20
    while not any((root / "incoming").iterdir()) and time.monotonic() < deadline:
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert {file: file.read_bytes() for file in before} == before
    registry = Registry(str(root))
    assert [version.version for version in registry.versions("m")] == [1]
    left = list((root / "incoming").iterdir())
    assert left
    for file in left:
        os.utime(file, (1, 1))
    second = registry.add("m", big)
    assert second.version == 2 and not any((root / "incoming").iterdir())
    registry.verify(second)


# ---- the Hub --------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a commit with large files needs."""

    protocol_version = "HTTP/1.1"
    stored: dict[str, bytes]
    files: dict[str, bytes]
    seen: list[str]

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any = None, status: int = 200) -> None:
        content = json.dumps(value or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_PUT(self) -> None:
        content = self.body()
        self.stored[hashlib.sha256(content).hexdigest()] = content
        self.answer()

    def do_POST(self) -> None:
        content = self.body()
        self.seen.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "who are you?"}, 401)
        host = f"http://{self.headers['Host']}"
        if self.path.endswith("/repos/create"):
            return self.answer({"url": f"{host}/tiny/model"})
        if self.path.endswith("/validate-yaml"):  # of the card
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(content)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
            told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self.answer({"files": told})
        if self.path.endswith("/objects/batch"):
            objects = json.loads(content)["objects"]
            return self.answer({"transfer": "basic", "objects": [
                one if one["oid"] in self.stored
                else {**one, "actions": {"upload": {"href": f"{host}/upload/{one['oid']}"}}}
                for one in objects
            ]})  # fmt: skip
        for line in content.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
        return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{host}/tiny/model/commit/0"})


def test_push_to_a_hub(tmp_path: Path, cli_env: dict[str, str]) -> None:
    pytest.importorskip("huggingface_hub")
    handler = type("Handler", (Hub,), {"stored": {}, "files": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, place = f"http://127.0.0.1:{server.server_port}", str(tmp_path / "reg")
    env = cli_env | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    folder = make_checkpoint(tmp_path / "a", seed=5)
    Registry(place).add("m", folder)

    def push(token: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tafkir.cli.main", "registry", "push", "m", "tiny/model", "-r", place]
        return subprocess.run(command, env=env | {"HF_TOKEN": token}, capture_output=True, text=True, check=False)

    try:
        done = push("hf_test")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{address}/tiny/model/commit/0"
        assert handler.files == {file.name: file.read_bytes() for file in folder.iterdir()}  # type: ignore[attr-defined]
        refused = push("hf_other")
        assert refused.returncode == 1 and "the Hub refuses" in refused.stderr and "Traceback" not in refused.stderr
    finally:
        server.shutdown()
        server.server_close()


def test_the_command_line(tmp_path: Path, here: Cli) -> None:
    place, folder = str(tmp_path / "reg"), make_checkpoint(tmp_path / "a")
    report = make_report(tmp_path / "r.json", wordmath=0.9912)

    def run(*args: str) -> Any:
        done = here("registry", *args)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in args else done.stdout

    run("keygen", str(tmp_path / "key"))
    run("add", "m", str(folder), "-r", place, "--report", str(report), "--key", str(tmp_path / "key"))
    run("promote", "m@1", "-r", place, "--key", str(tmp_path / "key"))
    trust = ("--trust", str(tmp_path / "key.pub"))
    (row,) = run("ls", "m", "-r", place, "--json", *trust)
    assert (row["version"], row["kept"], row["channels"]) == (1, {"wordmath": 0.9912}, ["production"])
    assert "wordmath keeps 99.12%" in run("show", "m@production", "-r", place, *trust)
    assert run("verify", "-r", place, *trust) == "m@1: whole and signed\n"
    low = here("registry", "promote", "m", "-r", place, "--min-retention", "99.5")
    assert low.returncode == 1 and "wordmath keeps 99.12%" in low.stderr and low.stderr.count("\n") == 1
