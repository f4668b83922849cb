"""`tafkir registry`: versions of models by content, signed, promoted by what a retention report shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tafkir.registry.registry import Registry
    from tafkir.registry.versions import Version

__all__ = ["app"]

app = typer.Typer(
    help="Keep versions of models by their content: add, sign, promote by evidence, roll back, verify, push.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Place = Annotated[
    str,
    typer.Option(
        "--registry",
        "-r",
        envvar="TAFKIR_REGISTRY",
        metavar="URL",
        help="A folder, or s3://..., gs://..., memory://...",
    ),
]
Key = Annotated[
    Path | None,
    typer.Option("--key", envvar="TAFKIR_REGISTRY_KEY", metavar="FILE", help="Private key: sign what is written."),
]
Trust = Annotated[
    Path | None,
    typer.Option(
        "--trust", envvar="TAFKIR_REGISTRY_TRUST", metavar="FILE", help="Public key: refuse what it did not sign."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Wanted = Annotated[
    str,
    typer.Argument(metavar="NAME[@VERSION]", help="A version, or a channel such as NAME@production; else the newest."),
]
_HOME = "registry"


def _open(place: str, key: Path | None = None, trust: Path | None = None) -> Registry:
    from tafkir.registry.registry import Registry
    from tafkir.registry.signing import PrivateKey, PublicKey

    return Registry(place, key=PrivateKey(key) if key else None, trusted=PublicKey.load(trust) if trust else None)


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The private key; the public one is FILE.pub.")],
    as_json: Json = False,
) -> None:
    """Make an Ed25519 key pair: sign with the private key, give the public one to those who verify."""
    from tafkir.registry.signing import write_keys

    public, key_id = write_keys(path)
    _say(
        as_json, {"private_key": str(path), "public_key": str(public), "key_id": key_id}, f"{path}, {public}: {key_id}"
    )


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the model.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Checkpoint: safetensors, config, tokenizer.")],
    parent: Annotated[
        str | None, typer.Option("--parent", metavar="NAME[@VERSION]", help="What it was made from.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="What made it; else its manifest says.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="JSON of `tafkir verify --task ... --json`.")
    ] = None,
    place: Place = _HOME,
    key: Key = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Take a checkpoint in as the next version; files that are there already are not copied again.

    \b
    tafkir registry add r1-nvfp4 ./R1-NVFP4 --parent r1 --report verify.json --key release.key
    tafkir registry add r1-nvfp4 ./R1-NVFP4 -r s3://models/registry

    Only safetensors, JSON and text are let in: pickles (.bin, .pt, .pkl, or by their content) are refused.
    """
    registry = _open(place, key, trust)
    version = registry.add(name, folder, parent=parent, recipe=recipe, report=report)
    what = f"{version.name}@{version.version}: {len(version.files)} files, {_size(version.num_bytes)}"
    _say(as_json, version.model_dump(mode="json"), what)


@app.command("ls")
def list_(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Of a model; else all of them.")] = None,
    place: Place = _HOME,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """List models, or the versions of one, and what each channel serves."""
    registry = _open(place, trust=trust)
    rows = []
    for model in [registry.version(name).name] if name else registry.names():
        channels = registry.channels(model)
        for version in registry.versions(model) if name else registry.versions(model)[-1:]:
            serving = sorted(channel for channel, number in channels.items() if number == version.version)
            rows.append(_row(registry, version, serving if name else [f"{c}={n}" for c, n in sorted(channels.items())]))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        kept = "".join(f"  {task} keeps {share:.2%}" for task, share in row["kept"].items())
        served = f"  [{', '.join(row['channels'])}]" if row["channels"] else ""
        print(f"{row['name']}@{row['version']}  {row['created']}  {_size(row['bytes'])}{kept}{served}")


@app.command()
def show(wanted: Wanted, place: Place = _HOME, trust: Trust = None, as_json: Json = False) -> None:
    """Show a version: its files, what made it, what its report says."""
    registry = _open(place, trust=trust)
    version = registry.version(wanted)
    if as_json:
        print(json.dumps({**version.model_dump(mode="json"), "kept": _kept(registry, version)}, indent=2))
        return
    print(
        f"{version.name}@{version.version}, added {version.created}, {version.architecture or 'unknown architecture'}"
    )
    if version.parent:
        print(f"made from {version.parent}")
    for task, share in _kept(registry, version).items():
        print(f"{task} keeps {share:.2%}")
    for file, entry in version.files.items():
        print(f"  {entry.sha256[:12]}  {_size(entry.size):>10}  {file}")


@app.command()
def promote(
    wanted: Wanted,
    channel: Annotated[str, typer.Option("--to", metavar="CHANNEL", help="What is to serve it.")] = "production",
    min_retention: Annotated[
        float, typer.Option("--min-retention", min=0, max=100, metavar="PERCENT", help="What each task has to keep.")
    ] = 98.0,
    place: Place = _HOME,
    key: Key = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Let a channel serve a version, if its retention report shows that it keeps enough; else it is refused."""
    move = _open(place, key, trust).promote(wanted, channel=channel, min_kept=min_retention / 100)
    _say(as_json, move.model_dump(mode="json"), f"{move.channel} serves {move.name}@{move.version}")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the model.")],
    channel: Annotated[str, typer.Option("--to", metavar="CHANNEL", help="Which one.")] = "production",
    place: Place = _HOME,
    key: Key = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Let a channel serve what it served before its last promotion."""
    move = _open(place, key, trust).rollback(name, channel=channel)
    _say(as_json, move.model_dump(mode="json"), f"{move.channel} serves {move.name}@{move.version} again")


@app.command()
def verify(
    wanted: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME[@VERSION]]...", help="Versions; else every one of all models.")
    ] = None,
    place: Place = _HOME,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Read every byte of versions and compare it with what was added; with --trust, their signatures, too."""
    registry = _open(place, trust=trust)
    versions = [registry.version(name) for name in wanted or []] or [
        version for name in registry.names() for version in registry.versions(name)
    ]
    for version in versions:
        registry.verify(version)
    rows = [{"name": v.name, "version": v.version, "files": len(v.files), "bytes": v.num_bytes} for v in versions]
    signed = " and signed" if trust else ""
    _say(as_json, rows, "\n".join(f"{row['name']}@{row['version']}: whole{signed}" for row in rows) or "nothing there")


@app.command()
def get(
    wanted: Wanted,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The new folder; must not be there.")],
    place: Place = _HOME,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Write a version's files to a folder, each checked against its hash."""
    registry = _open(place, trust=trust)
    version = registry.version(wanted)
    registry.get(version, folder)
    said = {"name": version.name, "version": version.version, "folder": str(folder)}
    _say(as_json, said, f"{folder}: {version.name}@{version.version}, checked")


@app.command()
def push(
    wanted: Wanted,
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="On the Hugging Face Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Where it is made, for its owners alone.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="The main one, left out.")
    ] = None,
    place: Place = _HOME,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Upload a version to the Hugging Face Hub in one commit, after verifying it; HF_TOKEN says who you are."""
    from tafkir.registry.hub import push as upload

    registry = _open(place, trust=trust)
    version = registry.version(wanted)
    registry.verify(version)
    address = upload(registry, version, repo, private=private, revision=revision)
    _say(as_json, {"name": version.name, "version": version.version, "url": address}, address)


def _row(registry: Registry, version: Version, channels: list[str]) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.version,
        "created": version.created,
        "files": len(version.files),
        "bytes": version.num_bytes,
        "parent": version.parent,
        "kept": _kept(registry, version),
        "channels": channels,
    }


def _kept(registry: Registry, version: Version) -> dict[str, float]:
    from tafkir.registry.versions import kept_by

    report = registry.report(version)
    found = kept_by(report) if report else {}
    return {task: kept.value for task, kept in found.items() if kept is not None}


def _say(as_json: bool, record: Any, line: str) -> None:
    print(json.dumps(record, indent=2) if as_json else line)


def _size(num_bytes: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"
