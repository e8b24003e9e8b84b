from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pairclf.config import Config
from pairclf.errors import BundleError, PackagingError
from pairclf.files import sha256_file, sha256_tree
from pairclf.packaging import build
from pairclf.packaging.build import package


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheelhouse at no cost."""

    def fill(folder: Path, projects: list[str]) -> list[Any]:
        folder.mkdir(parents=True)
        (folder / "pairclf-0.1.0-py3-none-any.whl").write_text("a wheel")
        return [build.Wheel.parse("pairclf-0.1.0-py3-none-any.whl")]

    monkeypatch.setattr(build, "fill_wheelhouse", fill)


Write = Callable[..., Path]


@pytest.mark.usefixtures("wheels")
def test_folder_is_complete_and_the_same_each_time(config: Config, bundle: Path, tmp_path: Path) -> None:
    made = package(config, [bundle], tmp_path / "a")
    files = sha256_tree(made)
    assert files == sha256_tree(package(config, [bundle], tmp_path / "b"))
    assert {name.rpartition("/")[2] for name in files} >= {"a-notebook.ipynb", "kernel-metadata.json", "bundle.json"}
    copied = {name.removeprefix("bundle/fold0/"): digest for name, digest in files.items() if "/fold0/" in name}
    assert copied == sha256_tree(bundle)
    notebook = (made / "notebook" / "a-notebook.ipynb").read_text()
    for payload in ("bundle", "wheels"):
        marker = made / payload / f"pairclf-{payload}.json"
        assert sha256_file(marker) in notebook
        uploaded = sha256_tree(made / payload, without=frozenset({"dataset-metadata.json", marker.name}))
        assert json.loads(marker.read_text())["files"] == uploaded
    assert "1.0100" in notebook  # the fold's metric


@pytest.mark.usefixtures("wheels")
def test_full_disk_leaves_the_older_package_and_nothing_half_built(
    config: Config, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "built" / "package"
    before = sha256_tree(package(config, [bundle], out))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_text", "write_json", "fill_wheelhouse", "seal"):
        with monkeypatch.context() as patch:
            patch.setattr(build, name, full)
            with pytest.raises(OSError, match="No space left"):
                package(config, [bundle], out)
    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space left"):
        package(config, [bundle], out)
    assert sha256_tree(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["package"]


@pytest.mark.usefixtures("wheels")
def test_path_of_this_machine_is_not_published(
    config: Config, tmp_path: Path, write_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone-private")
    told = config.model_copy(deep=True)
    told.data.folder = Path("/home/someone-private/data")
    with pytest.raises(PackagingError, match=r"bundle/fold0/config\.yaml names /home/someone-private"):
        package(config, [write_bundle(tmp_path / "bundle", told, "fold0")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("wheels")
def test_bundles_that_do_not_go_together(config: Config, bundle: Path, tmp_path: Path, write_bundle: Write) -> None:
    other = Config.model_validate({"task": "wsdm"})
    with pytest.raises(PackagingError, match="2 tasks"):
        package(config, [bundle, write_bundle(tmp_path / "other", other, "fold1")], tmp_path / "out")
    with pytest.raises(PackagingError, match="two bundles are named fold0"):
        package(config, [bundle, bundle], tmp_path / "out")
    with pytest.raises(PackagingError, match="at least one bundle"):
        package(config, [], tmp_path / "out")
    hub = config.model_copy(deep=True)
    hub.model.base = "google/gemma-2-9b-it"
    with pytest.raises(PackagingError, match=r"google/gemma-2-9b-it[\s\S]*package\.base_model_source"):
        package(hub, [write_bundle(tmp_path / "hub", hub, "fold0")], tmp_path / "out")


@pytest.mark.usefixtures("wheels")
def test_changed_bundle_is_not_packaged(config: Config, bundle: Path, tmp_path: Path) -> None:
    (bundle / "head.safetensors").write_text("other weights")
    with pytest.raises(BundleError, match=r"head\.safetensors"):
        package(config, [bundle], tmp_path / "out")
