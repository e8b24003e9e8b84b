"""A package too small to run, and a clock that does not wait: for the tests of push, submit and ledger."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from fake_kaggle import USER

from pairclf.config import Package
from pairclf.packaging.record import Build, PackedBundle, Part, write_build
from pairclf.publish.client import Clock
from pairclf.task import LMSYS


@dataclass
class Ticks:
    """A clock that is told the time by those who wait."""

    time: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds

    @property
    def clock(self) -> Clock:
        return Clock(self.sleep, lambda: self.time)


def small_package(
    folder: Path, *, weights: str = "weights", bundles_as: str = "dataset", code: str = "print(1)"
) -> Path:
    """A folder as `package` leaves it, with a bundle of a few bytes and a wheel that is none."""
    seal = hashlib.sha256(weights.encode()).hexdigest()
    model = bundles_as == "model"
    source = f"{USER}/a-notebook-bundle" + "/transformers/bundle" * model
    bundle = {f"fold0-{seal[:8]}/adapter/weights.bin": weights * 1000, f"fold0-{seal[:8]}/manifest.json": "{}"}
    parts = [
        _part(folder, "bundle", bundles_as, source, bundle),
        _part(folder, "wheels", "dataset", f"{USER}/a-notebook-wheels", {"pairclf-0.1.0-py3-none-any.whl": "a wheel"}),
    ]
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None, "source": [code]}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    metadata = {
        "id": f"{USER}/a-notebook",
        "title": "A notebook",
        "code_file": "a-notebook.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": [part.source for part in parts if part.kind == "dataset"],
        "competition_sources": ["lmsys-chatbot-arena"],
        "kernel_sources": [],
        "model_sources": [f"{source}/1"] if model else [],
    }
    _write(folder / "kernel", {"a-notebook.ipynb": json.dumps(notebook), "kernel-metadata.json": json.dumps(metadata)})
    packed = PackedBundle(
        folder=f"fold0-{seal[:8]}",
        name="fold0",
        seal=seal,
        fold=0,
        metrics={"log_loss": 0.9},
        base="embedded:llama-tiny",
    )
    build = Build(
        pairclf="0.1.0",
        identity=hashlib.sha256((code + weights).encode()).hexdigest(),
        package=Package(owner=USER, name="a-notebook", bundles_as="model" if model else "dataset"),
        task=LMSYS,
        kernel=f"{USER}/a-notebook",
        code_file="a-notebook.ipynb",
        parts=parts,
        bundles=[packed],
        requirements={},
        config="demo/llama-tiny",
        out_of_fold=0.95,
    )
    write_build(folder, build)
    return folder


def _part(folder: Path, payload: str, kind: str, source: str, files: dict[str, str]) -> Part:
    where = folder / payload
    _write(where, files)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    marker = json.dumps({"payload": payload, "part": 1, "files": hashes})
    digest = hashlib.sha256(marker.encode()).hexdigest()
    name = f"pairclf-{payload}-{digest[:12]}.json"
    owner, _, slug = source.partition("/")
    slug = slug.partition("/")[0]
    title = slug.replace("-", " ").capitalize()
    dataset = {
        "id": source,
        "title": title,
        "licenses": [{"name": "Apache 2.0"}],
        "subtitle": "What is needed in a test",
    }
    model = {"ownerSlug": owner, "title": title, "slug": slug, "isPrivate": True, "description": "Weights"}
    instance = {
        "ownerSlug": owner,
        "modelSlug": slug,
        "instanceSlug": "bundle",
        "framework": "transformers",
        "licenseName": "Apache 2.0",
    }
    described = (
        {"dataset-metadata.json": dataset}
        if kind == "dataset"
        else {"model-metadata.json": model, "model-instance-metadata.json": instance}
    )
    _write(where, {name: marker, **{path: json.dumps(tree) for path, tree in described.items()}})
    size = sum(len(text) for text in files.values()) + len(marker)
    return Part.model_validate(
        {
            "payload": payload,
            "kind": kind,
            "folder": payload,
            "source": source,
            "marker": name,
            "sha256": digest,
            "bytes": size,
        }
    )


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
