"""A package too small to run, and a clock that does not wait: for the tests of push, submit and ledger."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from fake_kaggle import USER

from pairclf.config import Package
from pairclf.packaging.metadata import PackagePart, Payload, kernel_metadata, part_metadata, source_of
from pairclf.packaging.payload import seal
from pairclf.packaging.record import Build, PackedBundle, identity_of, marker_name, write_build
from pairclf.publish.client import WaitClock
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
    def clock(self) -> WaitClock:
        return WaitClock(self.sleep, lambda: self.time)


def small_package(
    folder: Path,
    *,
    weights: str = "weights",
    bundles_as: str = "dataset",
    code: str = "print(1)",
    machine: str = "NvidiaTeslaT4",
    extra: dict[str, str] | None = None,
) -> Path:
    """A folder as `package` leaves it, with a bundle of a few bytes and a wheel that is none.

    `extra`: further `{path: SHA-256}` in the bundle's marker, of files that are not there.
    """
    for name in ("bundle", "wheels", "kernel"):
        shutil.rmtree(folder / name, ignore_errors=True)
    sealed = hashlib.sha256(weights.encode()).hexdigest()
    package = Package(
        owner=USER, name="a-notebook", bundles_as="model" if bundles_as == "model" else "dataset", machine_shape=machine
    )
    bundle = {f"fold0-{sealed[:8]}/adapter/weights.bin": weights * 1000, f"fold0-{sealed[:8]}/manifest.json": "{}"}
    parts = [
        _part(folder, package, "bundle", bundle, extra or {}),
        _part(folder, package, "wheels", {"pairclf-0.1.0-py3-none-any.whl": "a wheel"}),
    ]
    cell: dict[str, object] = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
        "source": [code],
    }
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    metadata = kernel_metadata(package, "a-notebook.ipynb", parts)
    _write(folder / "kernel", {"a-notebook.ipynb": json.dumps(notebook), "kernel-metadata.json": json.dumps(metadata)})
    packed = PackedBundle(
        folder=f"fold0-{sealed[:8]}",
        name="fold0",
        seal=sealed,
        fold=0,
        metrics={"log_loss": 0.9},
        base="embedded:llama-tiny",
    )
    build = Build(
        pairclf="0.1.0",
        identity=identity_of(folder, "a-notebook.ipynb", parts),
        package=package,
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


def _part(
    folder: Path, package: Package, payload: Payload, files: dict[str, str], extra: dict[str, str] | None = None
) -> PackagePart:
    where, source = folder / payload, source_of(package, payload, 1)
    _write(where, files)
    marker, digest = seal(where, payload, 1)
    if extra:
        tree = json.loads(marker.read_text())
        marker.unlink()
        text = json.dumps(tree | {"files": tree["files"] | extra})
        digest = hashlib.sha256(text.encode()).hexdigest()
        marker = where / marker_name(payload, digest)
        marker.write_text(text)
    metadata = part_metadata(package, payload, source)
    _write(where, {path: json.dumps(tree) for path, tree in metadata.items()})
    return PackagePart(
        payload=payload,
        kind="model" if "model-metadata.json" in metadata else "dataset",
        folder=payload,
        source=source,
        marker=marker.name,
        sha256=digest,
        bytes=sum(len(text) for text in files.values()) + marker.stat().st_size,
    )


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
