"""`package`: build a folder that can be rehearsed and pushed to Kaggle.

build.json      the record for the later commands; never uploaded
kernel/         NAME.ipynb or NAME.py, kernel-metadata.json
bundle/         a dataset or model: each bundle in a folder NAME-SEAL, the marker, metadata; bundle-2/ ... if need be
wheels/         a dataset: pairclf's wheel and what Kaggle's images lack, the marker, metadata
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from pairclf import __version__
from pairclf.bundles.bundle import Bundle, open_bundle
from pairclf.config import Config, Package
from pairclf.console import console
from pairclf.data.scores import scores_frame
from pairclf.data.submission import open_sample, possible_forms
from pairclf.errors import PackagingError
from pairclf.files import (
    atomic_folder,
    link_or_copy,
    private_folder,
    refuse_special_files,
    sha256_tree,
    write_json,
    write_text,
)
from pairclf.hardware import MACHINES
from pairclf.inference.ensemble import Ensemble, EnsembleFile, NestedFigures, open_ensemble, read_ensemble
from pairclf.own_files import shipped
from pairclf.packaging.build_record import BUILD, Build, PackedBundle, identity_of, own_note, write_build
from pairclf.packaging.install_check import check_wheels_suffice
from pairclf.packaging.metadata import (
    KERNEL,
    KERNEL_METADATA,
    PAYLOADS,
    PackagePart,
    Payload,
    check_package,
    deadline_seconds,
    kernel_metadata,
    package_part,
    part_metadata,
)
from pairclf.packaging.notebook import Value, make_notebook, make_script
from pairclf.packaging.payload import seal, split
from pairclf.packaging.secret_search import refuse_secrets
from pairclf.packaging.wheelhouse import Wheelhouse, fill_wheelhouse
from pairclf.run import mean_over_folds, out_of_fold_metric
from pairclf.scores.calibration import FLATTERING, NESTED
from pairclf.scores.figures import titled
from pairclf.task import Task, competition, hidden_rows
from pairclf.trust import REMOTE_CODE, granted

TEMPLATE = "kaggle/notebook.py"
_NOTE_OF_TRUST = (
    f"\n\n**Python files that come with the model are run here**: the package was built with `{REMOTE_CODE}`."
)


@dataclass(frozen=True, slots=True)
class _PackagedModels:
    """The bundles `{folder in the payload: bundle}` and their ensemble; `weighted`: it came from a file."""

    bundles: Mapping[str, Bundle]
    file: EnsembleFile
    weighted: bool
    ensemble: Ensemble


def package(config: Config, bundles: Sequence[Path], out: Path) -> Path:
    """Build the folder `out`, whole or not at all; an older one is replaced.

    Args:
        config: its `package` section names competition, owner, kernel, machine and wheels.
        bundles: folders of trained bundles of one task, whose scores are averaged in the kernel; with
            `package.ensemble`, that file's members are taken instead.
        out: the folder to make.

    Returns:
        `out`.

    Raises:
        PackagingError: a setting breaks one of Kaggle's rules, the bundles do not go together, a wheel can't be had,
            or a file holds a secret or a path of this machine.
        BundleError: a bundle is not as it was saved.
        ConfigError: the ensemble's file can't be used.
        OSError: the disk is full or read-only; nothing half built is left.
    """
    check_package(config.package)
    private_folder(own_note("packages", "").parent)  # found out now, and not after the wheels were fetched
    models = _open(bundles, config)
    config = _without_needless_base(config, models)
    settings = config.package
    with atomic_folder(out, known_by=BUILD) as folder:
        members = _fill_bundles(folder / "bundle", models)
        wheels = _fill_wheels(folder / "wheels", settings)
        wheelhouse = next((folder / "wheels").iterdir()).name
        parts = [part for payload in PAYLOADS for part in _parts(folder, payload, settings)]
        values = _values(config, models, members, parts, wheels, wheelhouse)
        code = _write_kernel(folder / KERNEL, settings, values, parts)
        refuse_secrets(folder, settings.owner, [KERNEL, *(part.folder for part in parts)])
        write_build(folder, _record(config, models, parts, wheels, code))
    return out


# --- bundles ---------------------------------------------------------------------------------------------------------


def _open(folders: Sequence[Path], config: Config) -> _PackagedModels:
    """Open the bundles, and check that they go together and find their base models."""
    settings = config.package
    if not folders and settings.ensemble is None:
        raise PackagingError("a package needs at least one bundle", remedy="give a folder that `pairclf train` wrote")
    paths = [*folders] if settings.ensemble is None else [settings.ensemble]
    file, ensemble = read_ensemble(paths), open_ensemble(paths, None, config.data.naming)
    opened = {_folder_of(bundle): bundle for bundle in (open_bundle(member.bundle) for member in file.members)}
    _check_task(ensemble.task, settings)
    _check_bases(list(opened.values()), settings)
    _check_shares(ensemble, settings)
    return _PackagedModels(opened, file, settings.ensemble is not None, ensemble)


def _folder_of(bundle: Bundle) -> str:
    """NAME-SEAL. A dataset also holds older builds of a run, so the name contains a hash."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", bundle.name).strip("-.")
    return f"{name}-{bundle.manifest.seal[:8]}"


def _check_bases(bundles: Sequence[Bundle], settings: Package) -> None:
    bases = sorted({str(bundle.manifest.base) for bundle in bundles if bundle.manifest.needs_base})
    if len(bases) > 1:
        raise PackagingError(
            f"the bundles stand on {len(bases)} base models, {', '.join(bases)}; a package attaches one",
            remedy="merge or export the bundles of the others whole (docs/export.md), or package them apart",
        )
    if bases and settings.base_model_source is None:
        raise PackagingError(
            f"the bundles stand on {bases[0]}, and the kernel, which has no internet, would not find it",
            where="package.base_model_source",
            remedy="name what to attach: owner/model/framework/instance/version of a model, or owner/slug of a dataset",
        )


def _without_needless_base(config: Config, models: _PackagedModels) -> Config:
    source = config.package.base_model_source
    if source is None or any(bundle.manifest.needs_base for bundle in models.bundles.values()):
        return config
    console.print(f"note: no bundle needs the base model {source}, so it is not attached")
    return config.model_copy(update={"package": config.package.model_copy(update={"base_model_source": None})})


def _check_task(task: Task, settings: Package) -> None:
    """A known competition's submission has the columns of its task."""
    known = competition(settings.competition)
    expected = task if known is None else known.task
    if (expected.classes, expected.label_column) != (task.classes, task.label_column):
        raise PackagingError(
            f"the bundles answer {', '.join(task.classes)}, and {settings.competition} asks for "
            f"{expected.label_column or ', '.join(expected.classes)}",
            where="package.competition",
            remedy="name the competition that the bundles were trained for, or bundles of this one",
        )


def _check_shares(ensemble: Ensemble, settings: Package) -> None:
    """An inference server gets its rows in batches, so it can't pick the most uncertain of all rows."""
    for place, member in enumerate(ensemble.members):
        if settings.kernel_type == "server" and member.share < 1:
            raise PackagingError(
                f"members.{place}.share={member.share:g} asks for the most uncertain of all rows, and "
                "package.kernel_type=server gets them in batches",
                where=settings.ensemble,
                remedy="set share: 1, or package.kernel_type=notebook",
            )
        if settings.kernel_type == "server" and member.swap_share < 1:
            raise PackagingError(
                f"members.{place}.swap_share={member.swap_share:g} chooses orders by the uncertainty of all rows, and "
                "package.kernel_type=server gets them in batches",
                where=settings.ensemble,
                remedy="remove it, or package.kernel_type=notebook",
            )


def _fill_bundles(folder: Path, models: _PackagedModels) -> list[str]:
    """Put the bundles into the payload; returns the models to predict with: their folders, or the ensemble's file."""
    for name, bundle in models.bundles.items():
        refuse_special_files(bundle.folder)  # a link would bring a file of this machine along
        shutil.copytree(bundle.folder, folder / name, copy_function=_link)
    if not models.weighted:
        return list(models.bundles)
    members = [
        member.model_copy(update={"bundle": Path(name), "base": None})  # what is attached is found as --base
        for name, member in zip(models.bundles, models.file.members, strict=True)
    ]
    tree = models.file.model_copy(update={"members": members}).model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(tree, sort_keys=False)
    name = f"ensemble-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    write_text(folder / name, text)
    return [name]


def _link(source: str, target: str) -> None:
    """Link a file instead of copying gigabytes of weights; bundles are never written to."""
    link_or_copy(Path(source).resolve(), Path(target))


# --- wheels ----------------------------------------------------------------------------------------------------------


def _fill_wheels(folder: Path, settings: Package) -> Wheelhouse:
    """Fill `folder/wheels-HASH`, and check that nothing else is needed. One version of pairclf has many builds."""
    unnamed = folder / "wheels"
    console.print(f"wheels for Python {', '.join(settings.python_versions)}: resolving, fetching, checking")
    wheels = fill_wheelhouse(unnamed, settings.python_versions, settings.image_freezes, settings.extra_packages)
    for note in wheels.notes:
        console.print(f"note: {note}")
    for python, how in check_wheels_suffice(unnamed, wheels.requirements, settings.image_freezes).items():
        console.print(f"Python {python}: the wheels install on its image ({how})")
    content = "".join(f"{digest} {name}\n" for name, digest in sha256_tree(unnamed).items())
    unnamed.rename(folder / f"wheels-{hashlib.sha256(content.encode()).hexdigest()[:8]}")
    return wheels


# --- parts and kernel ------------------------------------------------------------------------------------------------


def _parts(folder: Path, payload: Payload, settings: Package) -> list[PackagePart]:
    """Split a payload by Kaggle's limits, and write each part's marker and metadata."""
    parts = []
    for number, part_folder in enumerate(split(folder / payload, payload), 1):
        _, digest = seal(part_folder, payload, number)
        size = sum(path.stat().st_size for path in part_folder.rglob("*") if path.is_file())
        part = package_part(settings, payload, number, sha256=digest, size=size)
        for name, tree in part_metadata(settings, payload, part.source).items():
            write_json(part_folder / name, tree)
        parts.append(part)
    return parts


def _write_kernel(folder: Path, settings: Package, values: Mapping[str, Value], parts: Sequence[PackagePart]) -> Path:
    template = shipped(TEMPLATE).read_text(encoding="utf-8")
    tag = "server" if settings.kernel_type == "server" else "submission"
    is_script = settings.kernel_type == "script"
    code = folder / f"{settings.name}.{'py' if is_script else 'ipynb'}"
    write_text(code, (make_script if is_script else make_notebook)(template, values, tag))
    write_json(folder / KERNEL_METADATA, kernel_metadata(settings, code.name, parts))
    return code


def _values(
    config: Config,
    models: _PackagedModels,
    members: Sequence[str],
    parts: Sequence[PackagePart],
    wheels: Wheelhouse,
    wheelhouse: str,
) -> dict[str, Value]:
    """The values of the template's placeholders."""
    settings, data = config.package, models.ensemble.data
    seconds = deadline_seconds(settings)
    assert seconds is not None  # check_package
    by_payload = {name: [part for part in parts if part.payload == name] for name in PAYLOADS}
    return {
        "title": settings.name,
        "version": __version__,
        "competition": settings.competition,
        "landmark": "kaggle_evaluation" if settings.kernel_type == "server" else "sample_submission.csv",
        "base": settings.base_model_source or "",
        "bundles": list(models.bundles),
        "members": list(members),
        "standalone": [name for name, bundle in models.bundles.items() if not bundle.manifest.needs_base],
        "bundle_table": "\n".join(
            _line(name, bundle, models.ensemble.task, f"{member.weight:g}" if models.weighted else "equal")
            for (name, bundle), member in zip(models.bundles.items(), models.file.members, strict=True)
        ),
        "pythons": settings.python_versions,
        "requirements": wheels.requirements,
        "wheelhouse": wheelhouse,
        "parts": {name: {part.marker: part.sha256 for part in group} for name, group in by_payload.items()},
        "prior": _prior(models.ensemble, _existing(config.data.sample_file)),
        "settings": config.data.naming,
        "ids": [data.test.columns.get("id") or "id", data.settled_submission.id or "id"],
        "trust": [REMOTE_CODE] if granted().remote_code else [],
        "note_of_trust": _NOTE_OF_TRUST if granted().remote_code else "",
        "gpus": MACHINES[settings.machine_shape].gpus,
        "deadline": seconds,
        "limit": settings.limit,
        "rows": hidden_rows(settings.competition),
    }


def _existing(path: Path | None) -> Path | None:
    return path if path is not None and path.is_file() else None


def _prior(ensemble: Ensemble, sample: Path | None) -> dict[str, str]:
    """`{column: text}` of a row that could not be scored, for every column that a sample submission may have."""
    task, settings = ensemble.task, ensemble.submission
    row = scores_frame(["row"], np.atleast_2d(ensemble.prior), task, orders=1, models=[])
    forms = possible_forms(task, settings) if sample is None else [open_sample(sample, task, settings)[0]]
    cells = {
        name: column.item() for form in forms for name, column in form.fill(row).to_dict().items() if name != form.id
    }
    return {name: f"{cell:.9f}" if isinstance(cell, float) else str(cell) for name, cell in cells.items()}


def _line(folder: str, bundle: Bundle, task: Task, weight: str) -> str:
    """A row of the notebook's table of bundles. A merged or exported bundle also shows its own metrics."""
    figures = bundle.manifest.metrics
    named: dict[str, float] = {}
    for prefix in ("", "merged_", "exported_"):
        named |= titled(figures, task, prefix)
        named |= {name.replace("_", " "): figures[name] for name in [f"{prefix}rows"] if name in figures}
    metrics = ", ".join(f"{name} {value:,.{0 if value.is_integer() else 4}f}" for name, value in named.items())
    fold = "nothing" if bundle.manifest.fold is None else f"fold {bundle.manifest.fold}"
    base = "none" if bundle.manifest.base is None else f"`{bundle.manifest.base}`"
    return f"| `{folder}` | {base} | {fold} | {metrics} | {weight} | `{bundle.manifest.seal[:12]}` |"


# --- record ----------------------------------------------------------------------------------------------------------


def _record(
    config: Config, models: _PackagedModels, parts: Sequence[PackagePart], wheels: Wheelhouse, code: Path
) -> Build:
    settings, data = config.package, config.data
    copied = ("name", "seal", "fold", "metrics", "base")
    packed = [
        PackedBundle(folder=name, orders=bundle.config.orders, **{key: getattr(bundle.manifest, key) for key in copied})
        for name, bundle in models.bundles.items()
    ]
    return Build(
        pairclf=__version__,
        identity=identity_of(code.parent.parent, code.name, parts),
        package=settings,
        task=models.ensemble.task,
        kernel=f"{settings.owner}/{settings.name}",
        code_file=code.name,
        parts=list(parts),
        bundles=packed,
        requirements=wheels.requirements,
        config=_run_name(config, models),
        out_of_fold=_out_of_fold(models),
        nested=_nested(models),
        test=None if data.test_file is None else data.test_file.resolve(),
        sample=None if data.sample_file is None else data.sample_file.resolve(),
        columns=models.ensemble.data.test.columns,
        submission=models.ensemble.submission,
    )


def _out_of_fold(models: _PackagedModels) -> float | None:
    """The task's metric on held-out rows: of the blend, where its file has it, or of the folds of one run."""
    metric = models.ensemble.task.metric
    if metric in models.file.out_of_fold:
        return models.file.out_of_fold[metric]
    return out_of_fold_metric(list(models.bundles.values()), metric)


def _nested(models: _PackagedModels) -> NestedFigures | None:
    """What the blend or calibration of the file gains; without one, what a temperature would gain that is not set."""
    if models.file.nested is not None:
        return models.file.nested
    bundles = list(models.bundles.values())
    found = [mean_over_folds(bundles, name) for name in ("log_loss", NESTED, FLATTERING)]
    known = [round(value, 6) for value in found if value is not None]
    if len(known) < len(found):
        return None
    raw, nested, flattering = known
    rows = sum(int(bundle.manifest.metrics["rows"]) for bundle in bundles)
    figures = {"raw": raw, "nested": nested, "flattering": flattering}
    return NestedFigures(method="temperature", applied=False, rows=rows, **figures)


def _run_name(config: Config, models: _PackagedModels) -> str:
    if config.output_dir is None or models.weighted:
        return " ".join(models.bundles)
    parts = config.output_dir.parts
    return "/".join(parts[parts.index("runs") + 1 :] if "runs" in parts else parts[-1:])
