"""Our metadata, passed through Kaggle's own client; what it would send is looked at, and nothing is sent."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from requests import HTTPError, Response

from pairclf.config import Package
from pairclf.hardware import MACHINES
from pairclf.packaging.metadata import (
    DATASET_METADATA,
    KERNEL_METADATA,
    LICENCES,
    PackagePart,
    Payload,
    dataset_metadata,
    kernel_metadata,
    model_metadata,
    source_of,
)
from pairclf.publish.client import _import_client

GOOD = {"owner": "someone", "name": "a-notebook"}
BASE = "google/gemma-2/transformers/gemma-2-9b-it/2"
NOTEBOOK = json.dumps({"cells": [{"cell_type": "code", "source": ["print(1)"], "outputs": []}], "nbformat": 4})
Change = Callable[[dict[str, Any]], Any]


class Client:
    """Kaggle's client, whose connection takes requests and keeps them."""

    def __init__(self) -> None:
        self.api = _import_client().KaggleApi()
        self.api.config_values = {"username": "someone"}
        self.sdk = MagicMock()
        self.sdk.__enter__.return_value = self.sdk
        self.datasets, self.models = self.sdk.datasets.dataset_api_client, self.sdk.models.model_api_client
        missing = Response()
        missing.status_code = 404
        self.datasets.get_dataset_status.side_effect = HTTPError(response=missing)
        self.api.build_kaggle_client = lambda: self.sdk
        self.api._upload_blob = lambda path, *_: Path(path).name

    def sent(self, call: MagicMock) -> dict[str, Any]:
        (request,) = call.call_args.args
        found: dict[str, Any] = request.to_dict(ignore_defaults=False)
        return found


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Client()


def part(package: Package, payload: Payload, number: int = 1) -> PackagePart:
    as_model = payload == "bundle" and package.bundles_as == "model"
    return PackagePart(
        payload=payload,
        kind="model" if as_model else "dataset",
        folder=payload,
        source=source_of(package, payload, number),
        marker="pairclf-marker.json",
        sha256="0" * 64,
        bytes=1,
    )


def write(folder: Path, name: str, tree: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return folder


def push_kernel(client: Client, folder: Path, package: Package, change: Change, code: str = "a-notebook.ipynb") -> Any:
    metadata = kernel_metadata(
        package, code, [part(package, "bundle"), part(package, "bundle", 2), part(package, "wheels")]
    )
    change(metadata)
    write(folder, code, NOTEBOOK if code.endswith("ipynb") else "print(1)")
    client.api.kernels_push(str(write(folder, KERNEL_METADATA, metadata)))
    return client.sent(client.sdk.kernels.kernels_api_client.save_kernel)


def create_dataset(client: Client, folder: Path, package: Package, payload: Payload, change: Change) -> Any:
    metadata = dataset_metadata(package, payload, source_of(package, payload, 1))
    change(metadata)
    write(folder, "one.zip", "not empty")
    client.api.dataset_create_new(str(write(folder, DATASET_METADATA, metadata)), quiet=True, dir_mode="zip")
    return client.sent(client.datasets.create_dataset)


def unchanged(tree: dict[str, Any]) -> None: ...


# --- what we write goes through --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MACHINES)
@pytest.mark.parametrize("code", ["a-notebook.ipynb", "a-notebook.py"])
def test_kernel_is_private_offline_and_on_its_machine(client: Client, tmp_path: Path, shape: str, code: str) -> None:
    package = Package.model_validate(GOOD | {"machine_shape": shape, "base_model_source": BASE})
    sent = push_kernel(client, tmp_path / "kernel", package, unchanged, code)
    assert (sent["slug"], sent["newTitle"]) == ("someone/a-notebook", "A notebook")
    assert sent["kernelType"] == ("notebook" if code.endswith("ipynb") else "script")
    assert sent["language"] == "python"
    assert (sent["isPrivate"], sent["enableInternet"], sent["enableTpu"]) == (True, False, False)
    assert sent["enableGpu"] is (shape != "None")
    assert sent["machineShape"] == ("" if shape == "None" else shape)
    assert sent["datasetDataSources"] == [f"someone/a-notebook-{end}" for end in ("bundle", "bundle-2", "wheels")]
    assert sent["competitionDataSources"] == ["lmsys-chatbot-arena"]
    assert sent["modelDataSources"] == [BASE]


def test_kernel_names_versions_of_our_models(client: Client, tmp_path: Path) -> None:
    package = Package.model_validate(GOOD | {"bundles_as": "model"})
    sent = push_kernel(client, tmp_path / "kernel", package, unchanged)
    assert sent["modelDataSources"] == [f"someone/a-notebook-bundle/other/part-{number}/1" for number in (1, 2)]
    assert sent["datasetDataSources"] == ["someone/a-notebook-wheels"]


@pytest.mark.parametrize("payload", ["bundle", "wheels"])
@pytest.mark.parametrize("name", ["a-run", "n" * 40])
def test_dataset_is_private_and_licensed(client: Client, tmp_path: Path, payload: Payload, name: str) -> None:
    package = Package.model_validate(GOOD | {"name": name})
    sent = create_dataset(client, tmp_path / "part", package, payload, unchanged)
    assert (sent["ownerSlug"], sent["slug"]) == ("someone", f"{name}-{payload}")
    assert sent["isPrivate"] is True
    assert sent["licenseName"] in LICENCES
    assert [file["token"] for file in sent["files"]] == ["one.zip"]
    assert 20 <= len(sent["subtitle"]) <= 80


@pytest.mark.parametrize("payload", ["bundle", "wheels"])
def test_new_version_of_a_dataset_keeps_the_old_ones(client: Client, tmp_path: Path, payload: Payload) -> None:
    package = Package.model_validate(GOOD)
    metadata = dataset_metadata(package, payload, source_of(package, payload, 1))
    write(tmp_path / "part", "one.zip", "not empty")
    client.api.dataset_create_version(str(write(tmp_path / "part", DATASET_METADATA, metadata)), "notes", quiet=True)
    sent = client.sent(client.datasets.create_dataset_version)
    assert (sent["ownerSlug"], sent["datasetSlug"]) == ("someone", f"a-notebook-{payload}")
    assert sent["body"]["deleteOldVersions"] is False


@pytest.mark.parametrize("licence", [name for name, other in LICENCES.items() if other is not None])
def test_model_and_instance_are_private_and_licensed(client: Client, tmp_path: Path, licence: str) -> None:
    package = Package.model_validate(GOOD | {"bundles_as": "model", "license": licence})
    for name, tree in model_metadata(package, source_of(package, "bundle", 1)).items():
        write(tmp_path / "part", name, tree)
    client.api.model_create_new(str(tmp_path / "part"))
    model = client.sent(client.models.create_model)
    assert (model["ownerSlug"], model["slug"], model["isPrivate"]) == ("someone", "a-notebook-bundle", True)
    client.api.model_instance_create(str(tmp_path / "part"), quiet=True)
    instance = client.sent(client.models.create_model_instance)
    assert (instance["ownerSlug"], instance["modelSlug"]) == ("someone", "a-notebook-bundle")
    assert (instance["body"]["instanceSlug"], instance["body"]["framework"]) == ("part-1", "MODEL_FRAMEWORK_OTHER")
    assert instance["body"]["licenseName"] == LICENCES[licence]


def test_titles_turn_into_our_slugs_by_the_clients_own_rule(client: Client) -> None:
    """Where they do not, Kaggle makes a thing of another name, and says so in a line that nobody reads."""
    from slugify import slugify

    package = Package.model_validate(GOOD | {"name": "lmsys-gemma2-9b-x5"})
    kernel = kernel_metadata(package, "a.ipynb", [])
    dataset = dataset_metadata(package, "bundle", source_of(package, "bundle", 2))
    for made in (kernel, dataset):
        assert slugify(made["title"]) == made["id"].partition("/")[2]


# --- and what is wrong does not --------------------------------------------------------------------------------------


def test_internet_is_on_where_nothing_is_said(client: Client, tmp_path: Path) -> None:
    """Why it is always written."""
    package = Package.model_validate(GOOD)
    sent = push_kernel(client, tmp_path / "kernel", package, lambda tree: tree.pop("enable_internet"))
    assert sent["enableInternet"] is True


def test_kernel_without_its_code_is_refused(client: Client, tmp_path: Path) -> None:
    package = Package.model_validate(GOOD)
    with pytest.raises(ValueError, match="Source file not found"):
        push_kernel(client, tmp_path / "kernel", package, lambda tree: tree.update(code_file="none.ipynb"))
    client.sdk.kernels.kernels_api_client.save_kernel.assert_not_called()


def test_dataset_with_a_long_slug_is_refused(client: Client, tmp_path: Path) -> None:
    """Why `package` limits names."""
    package, slug = Package.model_validate(GOOD), "someone/" + "n" * 51
    with pytest.raises(ValueError, match="slug must be between 6 and 50"):
        create_dataset(client, tmp_path / "part", package, "bundle", lambda tree: tree.update(id=slug))
    client.datasets.create_dataset.assert_not_called()


def test_model_instance_without_a_licence_is_refused(client: Client, tmp_path: Path) -> None:
    package = Package.model_validate(GOOD | {"bundles_as": "model"})
    for name, tree in model_metadata(package, source_of(package, "bundle", 1)).items():
        write(tmp_path / "part", name, tree | {"licenseName": ""})
    with pytest.raises(ValueError, match="specify a license"):
        client.api.model_instance_create(str(tmp_path / "part"), quiet=True)
    client.models.create_model_instance.assert_not_called()
