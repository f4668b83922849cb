"""Writes src/tafkir/serve/web/vendor/ from npm packages: what the chat page of `tafkir serve` draws text with.

Run as `python tools/bundle_chat_page.py FOLDER`, where FOLDER holds what this leaves:
`npm pack marked@18.2.1 dompurify@3.4.18 katex@0.19.1`. Of KaTeX's fonts only woff2 is kept.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parents[1] / "src" / "tafkir" / "serve" / "web" / "vendor"
FILES = {
    "marked": {"lib/marked.umd.js": "marked.js", "LICENSE": "marked.LICENSE"},
    "dompurify": {"dist/purify.min.js": "purify.js", "LICENSE": "purify.LICENSE"},
    "katex": {"dist/katex.min.js": "katex.js", "dist/katex.min.css": "katex.css", "LICENSE": "katex.LICENSE"},
}
_OTHER_FORMATS = re.compile(r',url\([^)]+\.(?:woff|ttf)\) format\("(?:woff|truetype)"\)')
_SOURCE_MAP = re.compile(r"\n?//# sourceMappingURL=\S+\s*$")


def bundle(folder: Path, target: Path = VENDOR) -> None:
    """Take the files out of the packages, and write down where they come from."""
    shutil.rmtree(target, ignore_errors=True)
    (target / "fonts").mkdir(parents=True)
    sources = []
    for name, wanted in FILES.items():
        (tarball,) = folder.glob(f"{name}-*.tgz")
        with tarfile.open(tarball) as archive:
            content = {m.name.removeprefix("package/"): archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
        files = {kept: content[path] for path, kept in wanted.items()}
        if name == "katex":
            files |= {f"fonts/{Path(p).name}": data for p, data in content.items() if re.search(r"^dist.*woff2$", p)}
            files["katex.css"] = _OTHER_FORMATS.sub("", files["katex.css"].decode()).encode()
        for kept, data in files.items():
            text = kept.endswith(".js")
            (target / kept).write_bytes(_SOURCE_MAP.sub("\n", data.decode()).encode() if text else data)
        package = json.loads(content["package.json"])
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        sources.append({key: package[key] for key in ("name", "version", "license")} | {"integrity": integrity})
    (target / "source.json").write_text(json.dumps(sources, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    bundle(parser.parse_args().folder)
