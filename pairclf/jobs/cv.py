"""Cross-validation: the fold queue, and one table of out-of-fold scores over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.config import Config
from pairclf.console import console, table
from pairclf.data.tables import read_scores, write_scores
from pairclf.errors import ConfigError
from pairclf.jobs.fit import fit, trained_as
from pairclf.jobs.launch import make_accelerator
from pairclf.jobs.run import OOF, OOF_AB, Paths, output_of
from pairclf.model.bundle import open_bundle


def cross_validate(config: Config, *, resume: bool | None = None, trust_checkpoint: bool = False) -> list[Path]:
    """Train every fold that `folds.run` names (all, if it is null) and join their held-out scores.

    Writes `oof.parquet` and `oof-ab.parquet` into the run folder; folds that were trained before with the same settings
    are in them, too.

    Returns:
        The bundles' folders, in the order of the folds.
    """
    chosen = config.folds.run if config.folds.run is not None else list(range(config.folds.n))
    if len(set(chosen)) != len(chosen):
        raise ConfigError(f"folds.run={chosen} names a fold twice")
    if unknown := [fold for fold in chosen if not 0 <= fold < config.folds.n]:
        raise ConfigError(f"folds.run names {unknown}; folds are counted from 0 and folds.n={config.folds.n}")
    bundles = []
    for place, fold in enumerate(chosen, start=1):
        console.rule(f"fold {fold} ({place} of {len(chosen)})", align="left")
        bundles.append(fit(config, fold, resume=resume, trust_checkpoint=trust_checkpoint))
    if make_accelerator(config).is_main_process:
        console.print(_join(config, chosen))
    return bundles


def _join(config: Config, chosen: list[int]) -> Table:
    """Write the scores of all folds that were trained with these settings, and tell of them fold by fold."""
    output, task = output_of(config), config.task
    # The settings of a fold just trained are those of its own folder: a chat template is written out by then.
    settings = _settings(Paths(output, chosen[0]))
    folds = [fold for fold in range(config.folds.n) if _settings(Paths(output, fold)) == settings]
    for name in (OOF, OOF_AB):
        parts = [read_scores(Paths(output, fold).folder / name, task) for fold in folds]
        write_scores(output / name, pl.concat(parts))
    shown = table(f"Out of fold: {len(folds)} of {config.folds.n} folds", "fold", "rows", "log loss", "accuracy")
    figures = [open_bundle(Paths(output, fold).bundle).manifest.metrics for fold in folds]
    for fold, found in zip(folds, figures, strict=True):
        shown.add_row(str(fold), f"{found['rows']:,.0f}", f"{found['log_loss']:.4f}", f"{found['accuracy']:.4f}")
    rows = [found["rows"] for found in figures]
    loss, right = (np.average([found[name] for found in figures], weights=rows) for name in ("log_loss", "accuracy"))
    shown.add_row("all", f"{sum(rows):,.0f}", f"{loss:.4f}", f"{right:.4f}", style="bold")
    return shown


def _settings(paths: Paths) -> dict[str, Any]:
    """The settings that a finished fold was trained with; empty where there is none."""
    return {name: value for name, value in trained_as(paths).items() if name not in ("rows", "held-out rows")}
