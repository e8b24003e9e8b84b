"""Bundles on the Hugging Face hub: upload one with its model card, and fetch one whose revision is known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pairclf.api.card import Card
from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.contents import MANIFEST
from pairclf.console import console, counted
from pairclf.errors import ModelError, cut, quoted

CARD = "README.md"

NOT_OF_A_BUNDLE = [CARD, ".gitattributes"]
"""Files of a repository that a bundle's folder has not."""


def push_bundle(folder: Path, repo_id: str, *, private: bool, card: Card) -> str:
    """Upload a verified bundle and its card in one commit, which deletes other files of the repository.

    Returns:
        The hash of the commit.

    Raises:
        BundleError: a file of the bundle was changed.
        ModelError: the hub refuses it, or can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    bundle, api = open_bundle(folder), HfApi()
    contents: dict[str, Path | bytes] = {name: folder / name for name in [MANIFEST, *bundle.manifest.files]}
    contents[CARD] = card.text(bundle, repo_id).encode()
    with _errors_of_hub(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        old = {*api.list_repo_files(repo_id)} - {*contents, *NOT_OF_A_BUNDLE}
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
                *(CommitOperationDelete(name) for name in sorted(old)),
            ],
            commit_message=f"Bundle {bundle.name}",
        )
    revision = str(commit.oid)
    count = counted(len(bundle.manifest.probes), "row")
    console.print(f"uploaded {bundle.name}, with the texts of {count} of its data (probes), to {repo_id}")
    console.print(f'open this revision: pairclf.load("{repo_id}", revision="{revision}")')
    return revision


def fetch_bundle(repo_id: str, revision: str | None) -> Path:
    """A folder with links to the bundle's files in the hub's cache; its last part is the commit.

    With `HF_HUB_OFFLINE=1` the cache alone is asked.

    Raises:
        ModelError: the hub has no such model, or can't be reached.
    """
    from huggingface_hub import constants, snapshot_download

    with _errors_of_hub(repo_id):
        snapshot = Path(snapshot_download(repo_id, revision=revision, ignore_patterns=NOT_OF_A_BUNDLE))
    console.print(f'{repo_id} at revision {snapshot.name}: pairclf.load("{repo_id}", revision="{snapshot.name}")')
    # The cache's folder may hold a card, too, where somebody has fetched the whole repository.
    folder = Path(constants.HF_HOME) / "pairclf" / repo_id.replace("/", "--") / snapshot.name
    for file in snapshot.rglob("*"):
        name = file.relative_to(snapshot)
        if file.is_file() and name.as_posix() not in NOT_OF_A_BUNDLE:
            _link(folder / name, file.resolve(), folder.parent / f"{os.getpid()}.tmp")
    return folder


def _link(link: Path, target: Path, temporary: Path) -> None:
    """Link to a file; at no time is the link gone, as another process may read it."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


@contextmanager
def _errors_of_hub(repo_id: str) -> Iterator[None]:
    """What the hub and its client raise, as a `ModelError`."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token = "set HF_TOKEN to a token of your account (or run `hf auth login`)"
    try:
        yield
    except GatedRepoError as error:
        page = f"https://huggingface.co/{repo_id}"
        raise ModelError(f"{repo_id} is gated", remedy=f"accept its terms on {page}, and {token}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{quoted(repo_id)} is no folder here, and the hub has no public model of this name",
            remedy=f"check the path or the name; if it is private, {token}",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo_id} has no such revision", remedy="give a commit, a branch or a tag") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{repo_id} is no folder here and not in the hub's cache, and the hub can't be reached or must not be "
            "asked (HF_HUB_OFFLINE)",
            remedy=f"connect this machine, or copy the cache of one that has fetched it: hf download {repo_id}",
        ) from error
    except (HTTPError, OSError) as error:
        raise ModelError(
            f"the hub refused {repo_id}, or can't be reached: {cut(error)}", remedy=f"connect this machine; {token}"
        ) from error
