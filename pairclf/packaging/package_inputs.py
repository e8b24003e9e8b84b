"""What to package: a config and the bundles of its run, or bundles alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, load_config, override, run_folder
from pairclf.errors import ConfigError
from pairclf.run import bundles_of


class Request(NamedTuple):
    """Settings, folders of bundles, and the name of the package's folder where none is given."""

    config: Config
    bundles: list[Path]
    name: str


def read_package_inputs(paths: Sequence[Path], overrides: Sequence[str], folds: Sequence[int] = ()) -> Request:
    """Settings and bundles from a config (and bundles that take the place of its run's), or from bundles alone.

    Raises:
        ConfigError: the first path is a folder and no bundle; a setting can't be used; the run has no bundle, or not of
            these `folds`; folds of no run are named.
        BundleError: a bundle's settings are not as they were saved.
    """
    first, *others = paths
    if folds and (first.is_dir() or others):
        raise ConfigError(f"--fold {folds[0]} chooses among a run's bundles, and bundles are given", remedy="give one")
    if first.is_dir():
        if not (first / "bundle.json").is_file():
            raise ConfigError(f"{first} is no bundle", remedy="give bundles, such as RUN/fold0/bundle, or a config")
        config = _config_of_bundle(first, overrides)
        return Request(config, [first, *others], config.package.name)
    config = load_config(first, overrides)
    if not others and config.package.ensemble is None:
        others = bundles_of(config, folds)
    return Request(config, others, first.stem)


def _config_of_bundle(folder: Path, overrides: Sequence[str]) -> Config:
    """A bundle's settings, without those that would let a stranger's bundle choose files and wheels."""
    config = open_bundle(folder, verified=True).config
    package = config.package.model_copy(update={"ensemble": None, "image_freezes": None, "extra_packages": []})
    update = {"output_dir": run_folder(folder / "config.yaml"), "package": package, "data": config.data.of_bundle}
    return override(config.model_copy(update=update), overrides)
