"""Uploads a version of a model to the Hugging Face Hub, by the public interface of `huggingface_hub`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from tafkir.errors import BackendUnavailable, RegistryError

if TYPE_CHECKING:
    from tafkir.registry.registry import Registry
    from tafkir.registry.versions import Version

__all__ = ["push"]


def push(registry: Registry, version: Version, repo_id: str, *, private: bool, revision: str | None) -> str:
    """Upload every file of a version in one commit; what the Hub has already, it does not ask for again.

    Args:
        registry: where the blobs are.
        version: which was verified.
        repo_id: ORGANISATION/NAME; made where it is not there.
        private: of a repository that is made.
        revision: branch; None takes the main one.

    Returns:
        Address of the commit.

    Raises:
        BackendUnavailable: huggingface_hub is not installed.
        RegistryError: the Hub refuses or cannot be reached, or the blobs lie in an object store.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise BackendUnavailable("huggingface_hub is not installed", fix="pip install 'tafkir[serve]'") from error
    operations = []
    for name, entry in version.files.items():
        path = registry.blob(entry)
        if path is None:
            raise RegistryError(
                "its files lie in an object store", where=repo_id, fix="get the version, add it to a folder, push that"
            )
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path))
    failures: tuple[type[Exception], ...] = (HfHubHTTPError, OSError, *_network_errors())
    api = HfApi(library_name="tafkir")
    label = f"{version.name}@{version.version}"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        made = api.create_commit(repo_id, operations, commit_message=f"Add {label}", revision=revision)
    except HFValidationError as error:
        raise RegistryError(str(error), where=repo_id, expected="ORGANISATION/NAME") from error
    except failures as error:
        fix = "set HF_TOKEN to one that may write there, or try again"
        raise RegistryError(f"the Hub refuses or cannot be reached ({error})", where=repo_id, fix=fix) from error
    return str(made.commit_url)


def _network_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client lets through where nobody answers: its HTTP library's errors, whichever library it has."""
    found = []
    for library, name in (("httpx2", "HTTPError"), ("httpx", "HTTPError"), ("requests", "RequestException")):
        if importlib.util.find_spec(library) is not None:
            found.append(getattr(importlib.import_module(library), name))
    return tuple(found)
