"""Writes src/tafkir/export/runtime/ from the npm package onnxruntime-web: what `tafkir trm page` puts into its page.

Run as `python tools/bundle_onnxruntime_web.py TARBALL`, where TARBALL is what `npm pack onnxruntime-web@1.30.0` leaves.
LICENSE and ThirdPartyNotices.txt are not in that package; they are those of onnxruntime, and stay as they are.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import tarfile
from pathlib import Path

RUNTIME = Path(__file__).resolve().parents[1] / "src" / "tafkir" / "export" / "runtime"
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def bundle(tarball: Path, target: Path = RUNTIME) -> None:
    """Take the files out of the package, gzip them, and write down where they come from."""
    content = tarball.read_bytes()
    with tarfile.open(tarball) as archive:
        package = json.load(_open(archive, "package.json"))
        files = {name: _open(archive, f"dist/{name}").read() for name in FILES}
    target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (target / f"{name}.gz").write_bytes(gzip.compress(data, 9, mtime=0))
    source = {
        "package": package["name"],
        "version": package["version"],
        "license": package["license"],
        "integrity": "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode(),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    (target / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def _open(archive: tarfile.TarFile, name: str):  # type: ignore[no-untyped-def]
    member = archive.extractfile(f"package/{name}")
    assert member is not None, name
    return member


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tarball", type=Path)
    bundle(parser.parse_args().tarball)
