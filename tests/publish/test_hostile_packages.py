"""Packages that another person made to do harm: each is refused or does none, and what lies outside stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_kaggle import FakeKaggle, Fault
from kaggle_support import Ticks, small_package

from pairclf.errors import PackagingError, PairclfError
from pairclf.packaging.build_record import identity_of, read_build
from pairclf.publish.client import KaggleClient, KaggleError, WaitClock
from pairclf.publish.push import push
from pairclf.publish.submit import submit

pytestmark = pytest.mark.usefixtures("rehearsed")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return small_package(tmp_path / "package")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Another folder, with what a push removes where it is allowed to, and a file that is dear to somebody."""
    folder = tmp_path / "victim"
    for name in ("bundle", "wheels", "kernel", "Documents"):
        (folder / name).mkdir(parents=True)
        (folder / name / "dear.txt").write_text("dear")
    return folder


def unharmed(victim: Path) -> bool:
    names = ("bundle", "wheels", "kernel", "Documents")
    return all((victim / name / "dear.txt").read_text() == "dear" for name in names)


def refused(package: Path, says: str) -> None:
    for go in (False, True):
        with pytest.raises(PairclfError, match=says):
            push(package, go=go)


def test_linked_upload_folder(package: Path, victim: Path, kaggle: FakeKaggle) -> None:
    (package / "upload").symlink_to(victim)
    refused(package, "'upload' is a link")
    assert unharmed(victim)
    assert kaggle.calls == []


def test_folders_in_the_package_are_never_removed(
    package: Path, victim: Path, kaggle: FakeKaggle, ticks: Ticks
) -> None:
    victim.rename(package / "upload")
    push(package, go=False)
    push(package, go=True, clock=ticks.clock)
    assert unharmed(package / "upload")


@pytest.mark.parametrize("name", [".push.lock", "bundle/more", "kernel/more.py", "rehearsal"])
def test_links_anywhere(package: Path, victim: Path, kaggle: FakeKaggle, name: str) -> None:
    (package / name).symlink_to(victim / "Documents" / "dear.txt")
    refused(package, f"'{name}' is a link")
    assert unharmed(victim)


Change = Callable[[dict[str, Any]], None]


def part(**fields: object) -> Change:
    return lambda build: build["parts"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (part(folder="../victim/Documents"), "parts.folder='../victim/Documents'"),
        (part(folder=""), "parts.folder=''"),
        (part(folder="kernel"), "parts.folder='kernel'"),
        (part(folder="bundle-2"), "parts.folder='bundle-2'"),
        (part(marker="../../victim/Documents/dear.txt"), "parts.marker="),
        (part(sha256="../" * 5), "sha256"),
        (part(source="somebody/else"), "parts.source='somebody/else'"),
        (part(kind="model"), "parts.kind='model'"),
        (lambda build: build.update(kernel="somebody/else"), "kernel='somebody/else'"),
        (lambda build: build.update(code_file="../../victim/Documents/dear.txt"), "code_file="),
        (lambda build: build.update(identity="../../victim"), "identity"),
        (lambda build: build["bundles"][0].update(folder="../../victim"), "a bundle in"),
        (lambda build: build["package"].update(base_model_source="../.."), "base_model_source"),
        (lambda build: build["package"].update(competition="../.."), "competition"),
        (lambda build: build["package"].update(python_versions=["../3.12"]), "python_versions"),
    ],
)
def test_names_that_package_does_not_give(
    package: Path, victim: Path, kaggle: FakeKaggle, change: Change, says: str
) -> None:
    build = json.loads((package / "build.json").read_text())
    change(build)
    (package / "build.json").write_text(json.dumps(build))
    refused(package, says)
    assert unharmed(victim)
    assert kaggle.calls == []


def test_names_are_part_of_the_identity(package: Path) -> None:
    build = read_build(package)
    (package / "bundle").rename(package / "bundle-2")
    renamed = [build.parts[0].model_copy(update={"folder": "bundle-2"}), *build.parts[1:]]
    assert identity_of(package, build.code_file, renamed) != build.identity
    (package / "bundle-2").rename(package / "bundle")
    for change in ({"source": "somebody/else"}, {"kind": "model"}):
        changed = [build.parts[0].model_copy(update=change), *build.parts[1:]]
        assert identity_of(package, build.code_file, changed) != build.identity


def test_marker_that_lists_files_outside(tmp_path: Path, victim: Path, kaggle: FakeKaggle) -> None:
    package = small_package(tmp_path / "package", extra={"../../victim/Documents/dear.txt": "0" * 64})
    refused(package, "leads out of its folder")
    assert unharmed(victim)


def test_addresses_and_tokens_that_lie_in_the_package_are_not_used(
    package: Path, kaggle: FakeKaggle, ticks: Ticks
) -> None:
    """The note of an upload says where bytes go, and which upload becomes part of the dataset."""
    (package / "upload").mkdir()
    for one in read_build(package).parts:
        names = [path.name for path in (package / one.folder).iterdir() if path.is_file()]
        blob = {"sha256": "0" * 64, "url": f"{kaggle.url}/store/theirs", "token": "theirs", "since": 9e12}
        state = {"marker": one.marker, "sent": True, "blobs": dict.fromkeys(names, blob)}
        (package / "upload" / f"{one.folder}.json").write_text(json.dumps(state))
    push(package, go=True, clock=ticks.clock)
    assert "theirs" not in json.dumps(kaggle.calls)
    assert kaggle.names().count("CreateDataset") == 2, "`sent` in the package says nothing"


def test_version_that_the_package_names_is_not_submitted(package: Path, kaggle: FakeKaggle, tmp_path: Path) -> None:
    build = read_build(package)
    pushed = {
        "build": build.identity,
        "kernel": "someone/other",
        "version": 7,
        "url": "",
        "when": "",
        "output": "s.csv",
    }
    (package / "push.json").write_text(json.dumps(pushed))
    for go in (False, True):
        with pytest.raises(PackagingError, match="has not pushed the build"):
            submit(package, "one", go=go, ledger=tmp_path / "ledger.jsonl")
    assert kaggle.calls == []


@pytest.mark.parametrize(
    ("url", "is_kaggles"),
    [
        ("https://www.googleapis.com/upload/storage/v1/b/kaggle-data-sets/o?uploadType=resumable&upload_id=a", True),
        ("https://storage.googleapis.com/kaggle-models-data/1/upload.zip?X-Goog-Signature=a", True),
        ("https://storage.googleapis.com:443/a", True),
        ("https://www.kaggle.com/upload", True),
        ("http://storage.googleapis.com/a", False),
        ("https://storage.googleapis.com:8443/a", False),
        ("https://storage.googleapis.com@example.org/a", False),
        ("https://user@storage.googleapis.com/a", False),
        ("https://storage.googleapis.com.example.org/a", False),
        ("https://notkaggle.com/a", False),
        ("https://169.254.169.254/latest", False),
        ("file:///etc/passwd", False),
        ("", False),
    ],
)
def test_bytes_go_to_kaggles_stores_alone(kaggle: FakeKaggle, url: str, is_kaggles: bool) -> None:
    client = KaggleClient(WaitClock())
    if is_kaggles:
        client.check_store(url)
    else:
        with pytest.raises(PackagingError, match="upload address"):
            client.check_store(url)


def test_store_that_sends_elsewhere_is_not_followed(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    there = {"Location": f"{kaggle.url}/store/theirs"}
    kaggle.faults["PUT"].extend([Fault(307, headers=there)] * 100)
    with pytest.raises(KaggleError, match="could not be uploaded"):
        push(package, go=True, clock=ticks.clock)
    assert "theirs" not in {body["token"] for body in kaggle.bodies("PUT")}


def test_older_marker_on_kaggle_that_lists_files_outside(
    package: Path, victim: Path, tmp_path: Path, kaggle: FakeKaggle, ticks: Ticks
) -> None:
    push(package, go=True, clock=ticks.clock)
    (version,) = kaggle.datasets["someone/a-notebook-bundle"].versions
    files = {"../../../../../victim/Documents/dear.txt": "0" * 64}
    version["pairclf-bundle-000000000000.json"] = json.dumps({"files": files}).encode()
    with pytest.raises(PairclfError, match="leads out of its folder"):
        push(small_package(tmp_path / "newer", weights="others"), go=True, clock=ticks.clock)
    assert unharmed(victim)
