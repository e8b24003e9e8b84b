"""The reader and writer of bundles: folders that hold all that a score needs but the base model's weights.

A bundle also holds the proof that it scores as it did when it was validated: the hash of every file, and probe rows
with their logits. It holds the files that `contents.py` lists and no others, none of them a link or a device; and its
files can't let code be run, nor another model be fetched (`model_files.check_model_folder`). Weights are read and
written by the bundle's approach; nothing here imports torch.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pairclf.bundles.base import EMBEDDED, resolve_base
from pairclf.bundles.contents import CONFIG, MANIFEST, BundleFiles, remove_unknown
from pairclf.bundles.manifest import FORMAT, Manifest, Probe, Weights, read_manifest
from pairclf.bundles.model_files import check_model_folder
from pairclf.config import MAX_YAML, Config, dump_config, parse_yaml, resolve
from pairclf.console import counted
from pairclf.errors import BundleError, ConfigError, ModelError, cut, quoted
from pairclf.files import home_folder, read_plain, sha256_file, sha256_tree
from pairclf.task import Task

MAX_PROMPTS, MAX_VALUES = 100_000_000, 1024
"""Rows of `trained_on.parquet` and values in one (257 are needed): what a file of a few bytes may not exceed once
unpacked."""

_MARKS = ({"prompt": pl.UInt64}, {"prompt": pl.UInt64, "sample": pl.List(pl.UInt32)})
"""Columns of `trained_on.parquet`, in older bundles and in newer ones."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle with verified files; its approach loads it (`approaches.approach_of`)."""

    folder: Path
    manifest: Manifest
    config: Config

    @property
    def files(self) -> BundleFiles:
        return BundleFiles(self.folder)

    @property
    def name(self) -> str:
        return self.manifest.name

    def trained_on(self) -> pl.DataFrame | None:
        """The prompts that the model was trained on, as `identity.prompt_marks` keeps them; None: nobody noted them.

        An older bundle has their hashes alone, and no column `sample`.

        Raises:
            BundleError: the file is no such table.
        """
        path = self.files.trained_on
        if not path.is_file():
            return None
        try:
            table = pl.scan_parquet(path, glob=False)
            rows = table.select(pl.len()).collect().item()
            if table.collect_schema() in _MARKS and rows <= MAX_PROMPTS and _values(path) <= rows * MAX_VALUES:
                return table.collect()
            what = (
                f"it must hold the columns prompt (UInt64) and sample, at most {MAX_PROMPTS:,} rows, and in each at "
                f"most {MAX_VALUES:,} values"
            )
        except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException) as error:
            what = cut(error)
        raise BundleError(f"{path.name} can't be used: {what}", where=path)

    def weights_source(self, base: Path | None = None) -> str:
        """Folder, or hub id, of the language model's weights, an adapter's base included.

        Args:
            base: folder of the base model on this machine, if it is not where `model.base` says.

        Raises:
            ModelError: the base is not there.
        """
        if self.manifest.weights == "whole":
            return str(self.files.backbone)
        return resolve_base(self.config.model.base, base)


class Saved(NamedTuple):
    """What an approach has written into a bundle's folder.

    Attributes:
        approach: its key.
        weights: where those of the language model lie.
        dtype: of the logits.
        packages: whose versions matter.
        base_fingerprint: of the base; None: there is none.
    """

    approach: str
    weights: Weights
    dtype: str
    packages: Sequence[str]
    base_fingerprint: str | None = None


def _values(path: Path) -> int:
    """Number of values in a Parquet file by its metadata, list elements included."""
    metadata = pq.read_metadata(path)
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return sum(group.column(number).num_values for group in groups for number in range(group.num_columns))


def write_bundle(
    new: Path,
    config: Config,
    saved: Saved,
    *,
    name: str,
    fold: int | None,
    metrics: dict[str, float],
    prior: Sequence[float],
    probes: Sequence[Probe],
    thresholds: Sequence[float] = (),
    trained_on: pl.DataFrame | None = None,
) -> None:
    """Complete a bundle: config and manifest beside what its approach has `saved` in the folder `new`.

    The caller verifies the bundle and then moves `new` to its place.

    Args:
        prior: mean target `(C,)` of the training rows.
        thresholds: `(C,)` that were fitted to held-out rows of several labels; empty: none were.
        trained_on: `identity.prompt_marks` of all rows that any of the weights was trained on. Without them the bundle
            can't say what it has seen, and its scores are refused as a teacher's.
    """
    config, files = portable(config), BundleFiles(new)
    remove_unknown(new)
    if trained_on is not None:
        trained_on.unique("prompt").sort("prompt").write_parquet(files.trained_on)
    files.config.write_text(dump_config(config), encoding="utf-8")
    has_base = saved.weights != "none"
    Manifest(
        format=FORMAT,
        name=name,
        fold=fold,
        approach=saved.approach,
        weights=saved.weights,
        needs_base=_needs_base(saved.weights, config),
        base=config.model.base if has_base else None,
        base_fingerprint=saved.base_fingerprint,
        dtype=saved.dtype,
        classes=list(config.task.classes),
        metrics=metrics,
        prior=[float(part) for part in prior],
        versions={package: version(package) for package in saved.packages} | {"python": platform.python_version()},
        files=sha256_tree(new),
        probes=list(probes),
        thresholds=list(thresholds),
    ).write(new)


def _needs_base(weights: Weights, config: Config) -> bool:
    return weights in ("adapter", "base") and not config.model.base.startswith(EMBEDDED)


def portable(config: Config) -> Config:
    """The config without what only the machine that trained knows: its folders, and the user's name in them."""
    home, base = home_folder(), config.model.base
    base = "~" + base[len(str(home)) :] if home is not None and base.startswith(f"{home}/") else base
    model = config.model.model_copy(update={"base": base})
    data = config.data.of_bundle  # what is repaired in a training row is repaired in a test row
    return config.model_copy(update={"output_dir": None, "data": data, "model": model})


def open_bundle(folder: Path, *, verified: bool = False) -> Bundle:
    """Read a bundle's manifest and config, and verify that no file was added, removed or changed.

    `verified`: another process of this run compares the hashes, which takes minutes for 18 GB. Only the manifest's seal
    and the config's hash are then checked.

    Raises:
        BundleError: names the files that differ, or do not belong there, or what in one of them can't be used.
    """
    manifest, path = read_manifest(folder), folder / CONFIG
    if verified:
        _compare_hashes(
            folder, {CONFIG: manifest.files.get(CONFIG, "")}, {CONFIG: sha256_file(path)} if path.is_file() else {}
        )
    else:
        _compare_hashes(folder, manifest.files, sha256_tree(folder, without=frozenset({MANIFEST})))
    try:
        config = resolve(parse_yaml(read_plain(path, MAX_YAML), path), path)
        for folder_part in (BundleFiles(folder).tokenizer, BundleFiles(folder).backbone):
            if folder_part.is_dir():
                check_model_folder(folder_part)
    except (OSError, ValueError) as error:
        raise BundleError(f"{CONFIG} can't be read: {cut(error)}", where=path) from error
    except (ConfigError, ModelError) as error:
        raise BundleError(error.what, where=error.where, remedy=error.remedy) from error
    if wrong := _contradiction(manifest, config):
        raise BundleError(f"{MANIFEST} and {CONFIG} contradict each other: {wrong}", where=folder)
    return Bundle(folder, manifest, config)


def verify_files(bundle: Bundle, between: Callable[[], object] = lambda: None) -> None:
    """Compare the hash of every file of a bundle, for bundles opened with `verified`. Takes minutes for 18 GB.

    Args:
        bundle: the bundle.
        between: is called for each MiB; what it raises ends the comparison.

    Raises:
        BundleError: names the files that differ.
    """
    hashes = sha256_tree(bundle.folder, without=frozenset({MANIFEST}), between=between)
    _compare_hashes(bundle.folder, bundle.manifest.files, hashes)


def _contradiction(manifest: Manifest, config: Config) -> str | None:
    """How a manifest contradicts its config; None: it does not."""
    task: Task = config.task
    classes, orders = len(task.classes), config.orders
    if manifest.classes != list(task.classes):
        return f"classes {quoted(manifest.classes)}, and the task has {quoted(list(task.classes))}"
    if manifest.approach != config.approach:
        return f"approach {quoted(manifest.approach)}, and the config's is {quoted(config.approach)}"
    if manifest.base != (None if manifest.weights == "none" else config.model.base):
        return f"base {quoted(manifest.base)}, and model.base is {quoted(config.model.base)}"
    if manifest.needs_base != _needs_base(manifest.weights, config):
        return f"needs_base {manifest.needs_base} with weights {manifest.weights} over {quoted(config.model.base)}"
    if len(manifest.prior) != classes or (not task.multi_label and abs(sum(manifest.prior) - 1) > 1e-3):
        return f"prior {quoted(manifest.prior)} is not one of {classes} classes"
    if len(manifest.thresholds) not in (0, classes * task.multi_label):
        return f"thresholds {quoted(manifest.thresholds)} are not those of several labels, one for each class"
    for probe in manifest.probes:
        if probe.fields.keys() != set(task.fields):
            return f"probe {quoted(probe.id)} has fields {quoted(list(probe.fields))}"
        if [len(values) for values in probe.logits] != [classes] * orders:
            return f"probe {quoted(probe.id)} must have {classes} logits in each of {orders} orders"
    return None


def _compare_hashes(folder: Path, saved: Mapping[str, str], actual: Mapping[str, str]) -> None:
    """Raise `BundleError` if a file's hash is not the saved one."""
    differing = sorted(name for name in actual.keys() | saved.keys() if actual.get(name) != saved.get(name))
    if differing:
        raise BundleError(
            f"files of the bundle were changed, added or removed, {counted(len(differing), 'file')}: "
            f"{', '.join(differing[:5])}",
            where=folder,
            remedy="copy the bundle again from where it was trained",
        )
