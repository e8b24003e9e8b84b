"""`package`: a folder that is ready to be pushed to Kaggle.

notebook/   NAME.ipynb, kernel-metadata.json
bundle/     a dataset: each bundle in a folder of its own, the marker, dataset-metadata.json
wheels/     a dataset: pairclf's wheel and what Kaggle's image lacks, the marker, dataset-metadata.json
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pairclf import __version__
from pairclf.config import Config, Package
from pairclf.errors import PackagingError
from pairclf.files import atomic_folder, write_json, write_text
from pairclf.model.bundle import Bundle, open_bundle
from pairclf.packaging.metadata import PAYLOADS, Payload, check_package, dataset_metadata, kernel_metadata
from pairclf.packaging.notebook import Value, make_notebook
from pairclf.packaging.payload import DATASET_METADATA, KERNEL_METADATA, refuse_own_paths, seal
from pairclf.packaging.sources import shipped
from pairclf.packaging.wheelhouse import Wheel, fill_wheelhouse, supported_pythons

TEMPLATE = "kaggle/notebook.py"
_EMBEDDED = "embedded:"


def package(config: Config, bundles: Sequence[Path], out: Path) -> Path:
    """Build the folder `out`, whole or not at all; an older one is replaced.

    Args:
        config: its `package` section names competition, owner, notebook, machine and wheels.
        bundles: folders of trained bundles of one task; their scores are averaged in the notebook.
        out: the folder to make.

    Returns:
        `out`.

    Raises:
        PackagingError: a setting breaks one of Kaggle's rules, the bundles do not go together, a wheel can't be had,
            or a file names a path of this machine.
        BundleError: a bundle is not as it was saved.
        OSError: the disk is full or read-only; nothing half built is left.
    """
    settings = config.package
    check_package(settings)
    opened = _open(bundles, settings)
    with atomic_folder(out, known_by="notebook") as folder:
        for name, bundle in opened.items():
            shutil.copytree(bundle.folder, folder / "bundle" / name)
        wheels = fill_wheelhouse(folder / "wheels", settings.wheels)
        hashes = {payload: _dataset(folder / payload, settings, payload) for payload in PAYLOADS}
        notebook = folder / "notebook" / f"{settings.name}.ipynb"
        template = shipped(TEMPLATE).read_text(encoding="utf-8")
        write_text(notebook, make_notebook(template, _values(settings, opened, wheels, hashes)))
        write_json(notebook.with_name(KERNEL_METADATA), kernel_metadata(settings, notebook.name))
        refuse_own_paths(folder)
    return out


def _open(folders: Sequence[Path], settings: Package) -> dict[str, Bundle]:
    """`{name of the folder in the dataset: bundle}`, in the order given; they must answer one question."""
    opened: dict[str, Bundle] = {}
    for folder in folders:
        bundle = open_bundle(folder)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", bundle.name)
        if name in opened:
            raise PackagingError(f"two bundles are named {name}: {opened[name].folder} and {folder}")
        opened[name] = bundle
    if not opened:
        raise PackagingError("a package needs at least one bundle", remedy="give a folder that `pairclf train` wrote")
    tasks = {bundle.config.task.model_dump_json() for bundle in opened.values()}
    bases = {bundle.manifest.base for bundle in opened.values()}
    if len(tasks) > 1 or len(bases) > 1:
        raise PackagingError(
            f"the bundles {list(opened)} are for {len(tasks)} tasks and {len(bases)} base models; one package has one",
            remedy="package them apart",
        )
    base = bases.pop()
    if not base.startswith(_EMBEDDED) and settings.base_model_source is None:
        raise PackagingError(
            f"the bundles stand on {base}, and the notebook, which has no internet, would not find it",
            where="package.base_model_source",
            remedy="name the Kaggle model to attach: owner/model/framework/instance/version",
        )
    return opened


def _dataset(folder: Path, settings: Package, payload: Payload) -> str:
    write_json(folder / DATASET_METADATA, dataset_metadata(settings, payload))
    return seal(folder, payload)


def _values(
    settings: Package, bundles: Mapping[str, Bundle], wheels: Sequence[Wheel], hashes: Mapping[Payload, str]
) -> dict[str, Value]:
    """What the template's placeholders stand for."""
    pythons = supported_pythons(wheels)
    if not pythons:
        raise PackagingError(f"no version of Python runs all of {[wheel.requirement for wheel in wheels]}")
    return {
        "title": settings.name,
        "version": __version__,
        "competition": settings.competition,
        "base": settings.base_model_source or next(iter(bundles.values())).manifest.base,
        "base_model": settings.base_model_source or "",
        "bundles": list(bundles),
        "bundle_table": "\n".join(_line(name, bundle) for name, bundle in bundles.items()),
        "pythons": pythons,
        "requirements": [wheel.requirement for wheel in wheels],
        "bundle_sha256": hashes["bundle"],
        "wheels_sha256": hashes["wheels"],
    }


def _line(folder: str, bundle: Bundle) -> str:
    figures = bundle.manifest.metrics.items()
    metrics = ", ".join(f"{name} {value:,.{0 if value.is_integer() else 4}f}" for name, value in figures)
    fold = "nothing" if bundle.manifest.fold is None else f"fold {bundle.manifest.fold}"
    return f"| `{folder}` | {fold} | {metrics} | `{bundle.manifest.seal[:12]}` |"
