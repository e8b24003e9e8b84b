"""Packages too small to run, as `package` leaves them, and their records."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat

from pairclf.config import Package
from pairclf.files import write_json
from pairclf.packaging.build_record import Build, PackedBundle, identity_of, write_build
from pairclf.packaging.metadata import (
    KERNEL_METADATA,
    PackagePart,
    Payload,
    kernel_metadata,
    marker_name,
    package_part,
    part_metadata,
)
from pairclf.packaging.payload import seal
from pairclf.publish.ledger import LedgerRow
from pairclf.task import LMSYS

BUNDLE = "fold0-01234567"
BOARD = "lmsys-chatbot-arena"


def make_package(**settings: object) -> Package:
    return Package.model_validate({"owner": "someone", "name": "a-notebook", **settings})


def make_part(package: Package, payload: Payload, number: int = 1) -> PackagePart:
    return package_part(package, payload, number, sha256="0" * 64, size=1)


def make_build(**facts: object) -> Build:
    """The record of a package with one bundle, whose parts are not there."""
    bundle = PackedBundle(folder=BUNDLE, name="fold0", seal="0" * 64, fold=0, metrics={}, orders=2, base="embedded:x")
    fields: dict[str, object] = {
        "pairclf": "0.1.0", "identity": "a" * 64, "package": make_package(), "task": LMSYS,
        "kernel": "someone/a-notebook", "code_file": "a-notebook.ipynb", "parts": [], "bundles": [bundle],
        "requirements": {}, "config": "demo",
    }  # fmt: skip
    return Build.model_validate(fields | facts)


def write_package(
    folder: Path,
    package: Package,
    cells: Mapping[str, str],
    payloads: Mapping[Payload, Mapping[str, str]],
    *,
    extra: Mapping[str, str] | None = None,
    **facts: object,
) -> Path:
    """Write a package whose kernel has these cells `{id: code}`, and whose payloads hold these files `{path: text}`.

    `extra`: further `{path: SHA-256}` in the bundle's marker, of files that are not there; `facts`: of the record.
    """
    parts = [
        _write_part(folder, package, payload, files, (payload == "bundle" and extra) or {})
        for payload, files in payloads.items()
    ]
    script = package.kernel_type == "script"
    code = f"{package.name}.{'py' if script else 'ipynb'}"
    _write(folder / "kernel", {code: _script(cells) if script else _notebook(cells)})
    write_json(folder / "kernel" / KERNEL_METADATA, kernel_metadata(package, code, parts))
    facts |= {"kernel": f"{package.owner}/{package.name}", "code_file": code, "parts": parts}
    write_build(folder, make_build(package=package, identity=identity_of(folder, code, parts), **facts))
    return folder


def _write_part(
    folder: Path, package: Package, payload: Payload, files: Mapping[str, str], extra: Mapping[str, str]
) -> PackagePart:
    where = folder / payload
    _write(where, files)
    marker, digest = seal(where, payload, 1)
    if extra:
        tree = json.loads(marker.read_text())
        marker.unlink()
        text = json.dumps(tree | {"files": tree["files"] | extra})
        digest = hashlib.sha256(text.encode()).hexdigest()
        (where / marker_name(payload, digest)).write_text(text)
    part = package_part(package, payload, 1, sha256=digest, size=sum(map(len, files.values())))
    for name, tree in part_metadata(package, payload, part.source).items():
        write_json(where / name, tree)
    return part


def _write(folder: Path, files: Mapping[str, str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _script(cells: Mapping[str, str]) -> str:
    return "".join(f"# %% {name}\n{code}\n" for name, code in cells.items())


def _notebook(cells: Mapping[str, str]) -> str:
    made = [nbformat.v4.new_code_cell(code, id=name) for name, code in cells.items()]
    about = nbformat.v4.new_markdown_cell("# Title", id="about")
    return str(nbformat.writes(nbformat.v4.new_notebook(cells=[about, *made])))


def ledger_row(
    submission: int,
    *,
    oof: float | None = 0.95,
    public: float | None = None,
    private: float | None = None,
    competition: str = BOARD,
    bundles: Sequence[str] = ("5ea1" * 16,),
) -> LedgerRow:
    """A line of the ledger."""
    return LedgerRow(
        when="2026-01-02T03:04:05+00:00",
        build="b" * 64,
        config="demo/gemma2-tiny",
        competition=competition,
        metric="log_loss",
        folds={str(fold): 0.9 + fold / 100 for fold in range(submission % 3)},
        out_of_fold=oof,
        public=public,
        private=private,
        seconds=600.0,
        bundles=[*bundles],
        message=f"run {submission}",
        kernel="someone/a-notebook/1",
        submission=submission,
    )
