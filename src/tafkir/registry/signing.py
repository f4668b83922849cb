"""Signatures of a registry's records: Ed25519 over their canonical JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tafkir.errors import BackendUnavailable, RegistryError

__all__ = ["PrivateKey", "PublicKey", "write_keys"]

ALGORITHM = "ed25519"


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable("cryptography is not installed", fix="pip install 'tafkir[serve]'") from error


class PublicKey:
    """Says whether a record is signed by the owner of the private key.

    Args:
        pem: as `write_keys` writes it.

    Raises:
        RegistryError: it is no Ed25519 public key.
    """

    def __init__(self, pem: bytes, where: str = "public key") -> None:
        _require_cryptography()
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            key = serialization.load_pem_public_key(pem)
        except ValueError as error:
            raise RegistryError("not a public key", where=where, fix="tafkir registry keygen writes one") from error
        if not isinstance(key, Ed25519PublicKey):
            raise RegistryError("not an Ed25519 key", where=where, fix="tafkir registry keygen writes one")
        self._key = key
        self.key_id = _key_id(key.public_bytes_raw())

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """From a file."""
        return cls(_read(path), str(path))

    def check(self, record: Mapping[str, Any], signature: Mapping[str, Any] | None, where: str) -> None:
        """Do nothing where the record is signed with this key.

        Raises:
            RegistryError: it is not signed, by another key, or was changed after it was signed.
        """
        from cryptography.exceptions import InvalidSignature

        if signature is None:
            raise RegistryError("not signed", where=where, expected=f"a signature by {self.key_id}")
        if signature.get("algorithm") != ALGORITHM or signature.get("key_id") != self.key_id:
            raise RegistryError(f"signed by {signature.get('key_id')}", where=where, expected=f"by {self.key_id}")
        try:
            self._key.verify(base64.b64decode(str(signature.get("value"))), _canonical(record))
        except (InvalidSignature, ValueError) as error:
            raise RegistryError(
                "the signature does not belong to this record: one of them was changed",
                where=where,
                fix="do not use it; restore it from a copy",
            ) from error


class PrivateKey:
    """Signs records.

    Args:
        path: the key, as `write_keys` writes it.

    Raises:
        RegistryError: the file is missing, no Ed25519 private key, or readable by others.
    """

    def __init__(self, path: Path) -> None:
        _require_cryptography()
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        pem = _read(path)
        if path.stat().st_mode & 0o077:
            raise RegistryError("others may read the private key", where=str(path), fix=f"chmod 600 {path}")
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise RegistryError(
                "not a private key", where=str(path), fix="tafkir registry keygen writes one"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise RegistryError("not an Ed25519 key", where=str(path), fix="tafkir registry keygen writes one")
        self._key = key
        self.key_id = _key_id(key.public_key().public_bytes_raw())

    def sign(self, record: Mapping[str, Any]) -> dict[str, str]:
        """The signature of a JSON record, itself JSON."""
        value = base64.b64encode(self._key.sign(_canonical(record))).decode()
        return {"algorithm": ALGORITHM, "key_id": self.key_id, "value": value}


def write_keys(path: Path) -> tuple[Path, str]:
    """Make a key pair: the private key at `path`, readable by its owner alone, the public one beside it as `.pub`.

    Returns:
        The public key's file and its id.

    Raises:
        RegistryError: one of the files is there already.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_path = path.with_name(f"{path.name}.pub")
    for file in (path, public_path):
        if file.exists():
            raise RegistryError("is there already", where=str(file), fix="choose another name")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as private:
        private.write(pem)
    public = key.public_key()
    public_path.write_bytes(
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return public_path, _key_id(public.public_bytes_raw())


def _key_id(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RegistryError(f"cannot read the key ({error.strerror})", where=str(path)) from error
